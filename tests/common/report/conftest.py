import csv
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from polyclinic.report import save_views_figure
from polyclinic.study import resolve

SITES = ("east-general", "north", "south", "st-marys", "university")


def card(label):
    """A data-fitness card as polyclinic.cohort.card.make_card writes it."""
    return {
        "files": 130,
        "files_used": 120,
        "images": 120,
        "patients": 64,
        "images_per_patient": {"mean": 1.88, "most": 4, "patients_by_images": {"1": 30, "2": 34}},
        "labels": {label: {"images": 100, "patients": 60}, "": {"images": 20, "patients": 4}},
        "sites": {"": 120},
        "modalities": {"DX": 120},
        "views": {"PA": 120},
        "splits": {"": 120},
        "photometric": {"MONOCHROME2": 120},
        "sizes": {side: {"least": 200, "median": 512, "most": 2048} for side in ("height", "width")}
        | {"different": 12},
        "tensor": [1, 96, 96],
        "histogram": [1 / 32] * 32,
        "near_duplicates": {"pairs": 3, "across_patients": 1, "across_labels": 0, "bits": 4},
        "quarantine": {"no patient id": 10},
        "warnings": ["3 near-duplicate pairs"],
    }


def study(rounds, cohort=""):
    stages = [
        {"kind": "pretrain", "method": method, "rounds": n}
        for method, n in zip(("simclr", "mae"), rounds, strict=False)
    ]
    simulation = {"sites": 5, "cohort": cohort} if cohort else {}
    encoder = {"name": "vit_tiny"}
    return resolve({"study": {"name": "rehearsal", "seed": 7}, "encoder": encoder, "stages": stages,
                    "simulation": simulation})  # fmt: skip


def metrics(sites, rounds, total):
    rng = np.random.default_rng(0)
    for number in range(total + 1):
        stage = 0 if number <= rounds[0] else 1
        for site in (*sites, ""):
            fall = math.exp(-number / 5) + 0.01 * rng.normal()
            values = {"loss": 4 * fall + 1, "seconds": 3.0, "bytes_down": 45e6, "bytes_up": 45e6} if number else {}
            values |= {"probe_auc": 0.8 - 0.2 * fall, "knn_auc": 0.75 - 0.2 * fall}
            values |= {"effective_rank": 20 + 100 * fall, "feature_spread": 0.6 - 0.4 * fall}
            values |= {"alignment": 0.3 + fall, "uniformity": 3 - 2 * fall}
            yield from ((stage, number, site, metric, value) for metric, value in values.items())


def events(sites, total):
    yield {"event": "run_started", "rounds": total}
    for number in range(1, total + 1):
        yield {"event": "round_started", "round": number, "sites": list(sites)}
        yield from ({"event": "update_accepted", "round": number, "site": site} for site in sites[1:])
        yield {"event": "round_closed", "round": number}
    yield {"event": "update_refused", "round": 1, "site": sites[0], "reason": "its norm is 812 <times> too large"}
    yield {"event": "site_missing", "round": 2, "site": sites[0]}
    yield {"event": "warning", "text": "labels of two sites differ"}
    yield {"event": "warning", "text": "labels of two sites differ"}


def comparison(sites):
    areas = {"random": 0.66, "pixels": 0.7, "federated": 0.82, "pooled": 0.85}
    areas |= {f"alone:{site}": 0.72 + 0.001 * k for k, site in enumerate(sites)}
    return {
        row: {"auc": auc, "auc_low": auc - 0.04, "auc_high": auc + 0.03, "balanced_accuracy": auc - 0.1}
        for row, auc in areas.items()
    }


def summary(settings, sites):
    return {
        "study": settings.name,
        "hash": settings.hash,
        "engine": "local",
        "sites": {site: {"patients": 100 + k, "images": 200 + k} for k, site in enumerate(sites)},
        "rounds": settings.rounds,
        "comparison": comparison(sites),
        "notes": ["a note of the run"],
        "warnings": [],
        "wall_s": 431.2,
        "bytes_sent": 1.8e9,
        "epsilon": {},
        "versions": {"polyclinic": "0.1.0", "torch": "2.15.0"},
    }


@pytest.fixture
def make_run(tmp_path):
    """A function that makes a run directory as a simulation leaves it, finished or half-way."""

    def make(sites=SITES, rounds=(6, 4), finished=True, cohort="", label="positive"):
        settings = study(rounds, cohort)
        total = settings.rounds if finished else settings.rounds // 2
        run = tmp_path / "run"
        (run / "report").mkdir(parents=True)
        (run / "study.toml").write_text(settings.to_toml())
        (run / "seats.json").write_text(json.dumps({site: 100 + k for k, site in enumerate(sites)}))
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["stage", "round", "site", "metric", "value"])
            writer.writerows(metrics(sites, rounds, total))
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(sites, total)))
        (run / "report" / "cards.json").write_text(json.dumps({site: card(label) for site in sites}))
        if finished:
            (run / "summary.json").write_text(json.dumps(summary(settings, sites)))
            (run / "encoder.safetensors").touch()
            rng = np.random.default_rng(1)
            table = pd.DataFrame(rng.normal(size=(90, 2)), columns=["x", "y"])
            table["site"], table["label"] = rng.choice(sites, 90), rng.choice([label, "negative", ""], 90)
            table.to_csv(run / "report" / "embedding.csv", index=False)
            save_views_figure(run / "report" / "views.png", torch.rand(2, 1, 32, 32), [torch.rand(2, 1, 32, 32)] * 2)
        return run

    return make
