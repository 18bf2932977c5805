"""What a promise to patients costs: AUC of a federated classifier against epsilon, from three starts.

Three sites fine-tune a ResNet-18 with DP-SGD, with the least noise that keeps every site to the epsilon of the row, or
without noise and clipping (`inf`). Starts: `random` weights; a `phantom` encoder, pretrained by SimCLR on synthetic
patients that are nobody's; and the same encoder held `frozen`, so that only the linear classifier learns. All settings
were chosen before anything was measured and are the same in every row; AUC is read on all sites' test patients
together. A row that stands in the file of results is not made again. `--plot` draws what is there.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from machine import RESULTS, describe, keep

from polyclinic.errors import Refused
from polyclinic.privacy.accounting import noise_for
from polyclinic.privacy.dpsgd import sampling_rate, steps_of_round
from polyclinic.report.svg import Axis, dots, element, line, polyline, text, tick_text
from polyclinic.study import resolve, with_weights
from polyclinic_simulations.phantom import write_site
from polyclinic_simulations.phantom.findings import SHARES
from polyclinic_simulations.simulate import simulate

EPSILONS = (1.0, 3.0, 8.0, math.inf)
STARTS = ("random", "phantom", "frozen")
SITES, PATIENTS = ("north", "south", "east"), 200
"""Of the phantom; radiographs are dealt to as many sites."""
ROUNDS, BATCH_SIZE, DELTA = 10, 64, 1e-4
LABELS = {
    "phantom": {name: [name] for name in SHARES},
    "nih-chestxray8-subset": {"negative": ["No_findings"], "positive": ["Pneumonia"]},
}


def pretraining() -> dict[str, Any]:
    """Of the phantom encoder: as the demo's, on other patients."""
    views = {"crop": [0.5, 1.0], "rotation": 10.0, "jitter": 0.3, "elastic": 0.0, "equalise": 0.0, "noise": 0.0}
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 20, "batch_size": 16, "learning_rate": 8e-4}
    return {
        "study": {"name": "phantom-start"},
        "images": {"size": 48},
        "stages": [{**stage, "views": views}],
        "evaluation": {"rows": [], "every": 0},
        "simulation": {"site": [{"name": name, "cohort": name} for name in SITES]},
    }


def plain_study(dataset: str, start: str, seed: int, weights: Path) -> dict[str, Any]:
    """One row's study, without its promise."""
    phantom = dataset == "phantom"
    stage = {"kind": "finetune", "rounds": ROUNDS, "batch_size": BATCH_SIZE, "learning_rate": 1e-3}
    stage |= {"class_weights": "none", "probe_rounds": ROUNDS if start == "frozen" else 0}
    init = "random" if start == "random" else {"file": str(weights), "family": "polyclinic"}
    sites = [{"name": name, "cohort": name} for name in SITES]
    return {
        "study": {"name": f"privacy-{start}", "seed": seed},
        "images": {"size": 48},
        "encoder": {"init": init},
        "stages": [stage],
        "evaluation": {"rows": [], "every": 0, "labels": LABELS[dataset]},
        "aggregation": {"weighting": "equal"},
        "compute": {"precision": "fp32"},
        "simulation": {"site": sites} if phantom else {"sites": len(SITES), "cohort": dataset},
    }


def promise(plain: dict[str, Any], epsilon: float, patients: int) -> dict[str, Any]:
    """The same with the least noise by which a site that trains on `patients` keeps to `epsilon`."""
    if epsilon == math.inf:
        return plain
    stage = resolve(plain).stages[0]
    steps = stage.rounds * steps_of_round(patients, stage)
    noise = noise_for(epsilon, DELTA, sampling_rate(patients, stage.batch_size), steps)
    return {**plain, "privacy": {"mode": "patient", "epsilon": epsilon, "delta": DELTA, "noise": noise}}


def fewest(plain: dict[str, Any], data: Path, state: Path) -> int:
    """Patients that the smallest site trains on, each drawn alone as a promise needs it."""
    from polyclinic_server.rundir import RunDir
    from polyclinic_simulations.consortium import gather, settle

    study = resolve({**plain, "privacy": {"mode": "patient"}})
    with TemporaryDirectory() as folder:
        sites = settle(gather(study, data, state, lambda *_: None), study, RunDir(Path(folder)))
        return min(site.labelled(study, study.stages[0])[0].n_patients for site in sites.values())  # type: ignore[arg-type]


def measure(plain: dict[str, Any], data: Path, state: Path) -> dict[str, Any]:
    """Train, and read the classifier."""
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        study = with_weights(resolve(plain), Path(folder))  # as read from a file: with the digest of its weights
        summary = simulate(study, Path(folder) / "run", data, state)
    spent = summary["epsilon"]
    scores = summary["classifier"]["federated"]
    return {
        "auc": round(scores["auc"], 4),
        "spent": round(max(spent.values()), 3) if spent else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def rows(datasets: list[str], seeds: int) -> Iterator[tuple[int, str, str, float]]:
    """(seed, dataset, start, epsilon), whole comparisons first."""
    for seed in range(seeds):
        for dataset in datasets:
            for start in STARTS:
                yield from ((seed, dataset, start, epsilon) for epsilon in EPSILONS)


def key(dataset: str, start: str, epsilon: float) -> dict[str, str]:
    """What a row is called in the file of results, but for its seed."""
    return {"dataset": dataset, "start": start, "epsilon": f"{epsilon:g}"}


def start_weights(state: Path) -> Path:
    """The phantom encoder, trained once."""
    weights = state / "phantom-start.safetensors"
    if not weights.exists():
        others = state / "phantom-others"
        for number, name in enumerate(SITES):
            if not (others / name / "labels.csv").exists():
                write_site(others / name, name, PATIENTS, 1, number=number)
        with TemporaryDirectory() as folder:
            simulate(resolve(pretraining()), Path(folder) / "run", others, state)
            shutil.copy(Path(folder) / "run" / "encoder.safetensors", weights)
    return weights


COLOURS = dict(zip(STARTS, ("#4c6ef5", "#e8590c", "#2f9e44"), strict=True))
PANEL, HEIGHT = 360, 300
STYLE = "text{font:12px sans-serif;fill:#333}path{fill:none;stroke-width:2;stroke-linecap:round}.grid{stroke:#ddd}"


def plot(known: list[dict[str, Any]]) -> str:
    """AUC against epsilon as SVG: a panel a dataset, a line a start through the means of seeds, which are dots."""
    names = list(dict.fromkeys(row["dataset"] for row in known))
    measured = [row for row in known if row["auc"] is not None]
    y = Axis(min(0.5, *(row["auc"] for row in measured)) - 0.02, max(row["auc"] for row in measured) + 0.02, 240, 40)
    parts = [element("style", STYLE)]
    for number, dataset in enumerate(names):
        x = Axis(0, len(EPSILONS) - 1, PANEL * number + 60, PANEL * (number + 1) - 30)
        parts.append(text((x.start + x.end) / 2, 20, dataset, "middle"))
        for value in y.ticks():
            parts += [line(x.start - 10, y.at(value), x.end + 10, y.at(value), "grid")]
            parts += [text(x.start - 16, y.at(value) + 4, tick_text(value), "end")]
        for place, epsilon in enumerate(EPSILONS):
            parts.append(text(x.at(place), 262, "none" if epsilon == math.inf else f"{epsilon:g}", "middle"))
        parts.append(text((x.start + x.end) / 2, 284, f"epsilon of a patient, delta {DELTA:g}; y: AUC", "middle"))
        for start in STARTS:
            found = [
                (x.at(place), [row["auc"] for row in measured if row.items() >= key(dataset, start, epsilon).items()])
                for place, epsilon in enumerate(EPSILONS)
            ]
            means = [(at, y.at(float(np.mean(values)))) for at, values in found if values]
            every = [(at, y.at(value)) for at, values in found for value in values]
            parts.append(element("path", d=polyline(means), style=f"stroke:{COLOURS[start]}"))
            parts.append(element("path", d=dots(every), style=f"stroke:{COLOURS[start]};stroke-width:6;opacity:.5"))
    for place, start in enumerate(start for start in STARTS if any(row["start"] == start for row in known)):
        at = 60 + 120 * place
        parts.append(element("path", d=f"M{at} 294h20", style=f"stroke:{COLOURS[start]}"))
        parts.append(text(at + 26, 298, start))
    box = f"0 0 {PANEL * len(names)} {HEIGHT + 8}"
    return str(element("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=box))


def main() -> None:
    """Make the rows that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of nih-chestxray8-subset; without it, the phantom alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--state", type=Path, default=Path(".polyclinic"), help="where cohorts and the start are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "privacy_utility.json")
    parser.add_argument("--plot", action="store_true", help="draw what the file of results holds, and measure nothing")
    given = parser.parse_args()
    known = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    if given.plot:
        given.out.with_suffix(".svg").write_text(plot(known))
        return
    machine, state = describe(), given.state.resolve()
    for number, name in enumerate(SITES):
        if not (state / "phantom" / name / "labels.csv").exists():
            write_site(state / "phantom" / name, name, PATIENTS, 0, number=number)
    weights = start_weights(state)
    for seed, dataset, start, epsilon in rows(list(LABELS) if given.data else ["phantom"], given.seeds):
        named = {**key(dataset, start, epsilon), "seed": seed}
        if any(row.items() >= named.items() for row in known):
            continue
        data = state / "phantom" if dataset == "phantom" else given.data
        plain = plain_study(dataset, start, seed, weights)
        try:
            private = promise(plain, epsilon, fewest(plain, data, state))
        except Refused as error:
            known.append({**named, "auc": None, "why": error.problem})
            continue
        noise = private.get("privacy", {}).get("noise")
        known.append({**named, "noise": noise, **measure(private, data, state)})
        keep(given.out, machine, {"rows": known})


if __name__ == "__main__":
    main()
