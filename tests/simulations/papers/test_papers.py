"""The papers' tables on a dataset of a few images: rows, resumption, documents, the page."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from polyclinic.errors import CohortError
from polyclinic_simulations.papers.page import render_page
from polyclinic_simulations.papers.plans import NOT_YET, TIERS, Plan, Tier, plans
from polyclinic_simulations.papers.run import as_table, dataset, document, run_plan

from ...tiny import draw

COLUMNS = [
    "table",
    "dataset",
    "split",
    "regime",
    "method",
    "init",
    "label_fraction",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "seconds",
    "machine",
]
TINY = Tier(
    images={"size": 16},
    encoder={"name": "vit_tiny", "patch": 8},
    epochs={"mae": 6, "sssd": 6, "simclr": 6, "mlvicx": 6, "vicreg": 6},
    batch_size=16,
    finetune={"rounds": 2, "batch_size": 16},
    threads=1,
)
PLAN = Plan(1, "covid-ct", "published", "central", "mae", "random", 1.0, 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """covid-ct and luna16-slices in miniature."""
    for name, images, label in (("covid-ct", 36, True), ("luna16-slices", 8, False)):
        folder = tmp_path / "data" / name
        (folder / "images").mkdir(parents=True)
        with (folder / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "label", "patient", "split", "source_file"])
            for k in range(images):
                word = ("COVID", "NonCOVID")[k % 2] if label else ""
                Image.fromarray(draw(k, "spot" if word == "COVID" else "clear")).save(folder / "images" / f"{k}.png")
                split = ("train", "train", "test")[k // 2 % 3] if label else ""
                table.writerow([f"images/{k}.png", word, f"patient {max(k, 4)}", split, f"document {k // 4}-p{k}.png"])
    return tmp_path / "data"


def run(plan: Plan, data: Path, work: Path) -> dict[str, object]:
    return run_plan(plan, TINY, data, work, lambda *_: None, None, None)


@pytest.mark.parametrize(
    ("method", "init", "name"),
    [
        ("scratch", "random", "covid-ct"),
        ("scratch", "random", "covid-ct-border"),
        ("mae", "outside", "covid-ct"),
        ("vicreg", "random", "covid-ct"),
    ],
)
def test_a_row_is_trained_scored_and_not_made_twice(
    method: str, init: str, name: str, data: Path, tmp_path: Path
) -> None:
    plan = replace(PLAN, method=method, init=init, dataset=name)
    result = run(plan, data, tmp_path / "work")
    found = as_table({plan: result}, "a machine")  # type: ignore[dict-item]
    assert list(found.columns) == COLUMNS
    assert found["metric"].tolist() == ["auc", "accuracy", "balanced_accuracy", "ece"]
    assert found["value"].between(0, 1).all()
    assert found["low"][0] <= found["value"][0] <= found["high"][0]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert run(plan, data, tmp_path / "work") == result
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_seeds_share_test_patients_and_outside_images_are_never_tested_on(data: Path, tmp_path: Path) -> None:
    results = [run(replace(PLAN, seed=seed), data, tmp_path / "work") for seed in (0, 1)]
    studies = sorted((tmp_path / "work" / "pretrained").glob("*/study.toml"))
    assert len(studies) == 2
    assert results[0]["metrics"] != results[1]["metrics"]


def test_documents_become_patients_whose_slices_stay_together(data: Path, tmp_path: Path) -> None:
    from polyclinic.study import resolve

    study = resolve(
        {
            "study": {"name": "x"},
            "images": {"size": 16},
            "stages": [{"kind": "pretrain", "method": "simclr", "rounds": 1}],
        }
    )
    cohort = dataset("covid-ct", "document", data, study, tmp_path / "work", lambda *_: None)
    assert cohort.n_patients == 8  # nine documents, two of which one patient shares
    assert len(cohort) == 36
    assert document("a-b-p12-3%1.png") == "a-b"


def test_the_border_control_sees_nothing_but_the_rim(data: Path, tmp_path: Path) -> None:
    from polyclinic.study import resolve

    study = resolve(
        {
            "study": {"name": "x"},
            "images": {"size": 16},
            "stages": [{"kind": "pretrain", "method": "simclr", "rounds": 1}],
        }
    )
    whole, rim = (
        dataset(name, "published", data, study, tmp_path / "work", lambda *_: None).pixels(slice(None))
        for name in ("covid-ct", "covid-ct-border")
    )
    assert (rim[:, :, 2:-2, 2:-2] == 0).all()
    assert (rim[:, :, :2] == whole[:, :, :2]).all()


def test_a_missing_dataset_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="nih-chestxray8-subset"):
        run(replace(PLAN, dataset="nih-chestxray8-subset", split="patient"), data, tmp_path / "work")


def test_the_page_shows_what_was_run_and_lists_what_was_not() -> None:
    every = list(plans())
    assert len({plan.name for plan in every}) == len(every)
    assert {plan.table for plan in every} | NOT_YET.keys() == {1, 2, 3, 4, 5}
    metrics = {"auc": [0.812, 0.7, 0.9], "accuracy": [0.75, 0.6, 0.8], "balanced_accuracy": [0.74, None, None]}
    done = {plan: {"metrics": metrics, "seconds": 60.0} for plan in every[:2]}
    page = render_page(as_table(done, "<b>machine</b>"), every[2:])
    assert "0.812 (0.812 – 0.812)" in page
    assert "0.8176" in page  # the paper's
    assert f"Not run ({len([p for p in every[2:] if p.table == 1])})" in page
    assert "<b>machine</b>" not in page
    assert render_page(pd.DataFrame(), every)


def test_tiers_know_every_method_and_dataset_of_their_rows() -> None:
    for plan in plans():
        assert all(plan.method in {*tier.epochs, "scratch"} for tier in TIERS.values())
    assert json.dumps(TINY.encoder)
