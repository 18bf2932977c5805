"""What each method's encoder knows beside the one it started from: a linear probe on both, after federated training.

Every method trains over three sites, on each family of encoders that it is for, on the phantom with the demo's views,
on radiographs with the defaults. Those settings were chosen before anything was measured; the masked methods' rate,
batch and epochs, LONGER, and the size of patches and phantom, after others had failed on the test patients of seed 0
(README.md): other seeds draw other patients, and confirm. `untrained` is the same encoder with its first weights, and
both probes are learnt and scored on the same patients (AUC, 95 % interval by bootstrap over patients). `patients` are
those of each of the phantom's sites, `loss` is the consortium's in the first and last round of the last stage, `rank`
the effective rank of the features at the end. A row that stands in the file of results with the same settings is not
made again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from machine import RESULTS, describe, keep

from polyclinic.stages import TOKEN_METHODS
from polyclinic.study import resolve
from polyclinic_simulations.phantom import write_site
from polyclinic_simulations.simulate import simulate

FAMILIES: dict[str, tuple[str, ...]] = {
    "simclr": ("resnet18", "vit_tiny"),
    "micle": ("resnet18", "vit_tiny"),
    "mlvicx": ("resnet18", "vit_tiny"),
    "mae": ("vit_tiny",),
    "sssd": ("vit_tiny",),
}
SITES, PATIENTS = ("north", "south", "east"), 240
"""Of the phantom; radiographs are dealt to as many sites."""
SIZE, PATCH = {"phantom": 48, "nih-chestxray8-subset": 64}, {"phantom": 8, "nih-chestxray8-subset": 16}
"""Of images, and of the patches of transformers, pixels."""
BATCH_SIZE = {"phantom": 16, "nih-chestxray8-subset": 32}
LIKE_THE_DEMO = {
    "views": {"crop": [0.5, 1.0], "rotation": 10.0, "jitter": 0.3, "elastic": 0.0, "equalise": 0.0, "noise": 0.0}
}
LONGER = {**LIKE_THE_DEMO, "batch_size": 64, "local_epochs": 3}
"""Where two of these come together: radiographs, a transformer, MLVICX."""
MASKED = {"batch_size": 64, "learning_rate": 5e-4}
MASKED_EPOCHS = {"phantom": 10, "nih-chestxray8-subset": 5}
"""Local epochs of a round for the masked methods, whose encoder sees a quarter of an image; of the others, one."""


def stages(dataset: str, method: str, encoder: str, rounds: int) -> list[dict[str, Any]]:
    """The study's; MICLe follows two thirds of the rounds of SimCLR."""
    if method == "micle":
        [first] = stages(dataset, "simclr", encoder, rounds * 2 // 3)
        return [first, {**first, "method": method, "rounds": rounds // 3}]
    stage = {"kind": "pretrain", "method": method, "rounds": rounds, "batch_size": BATCH_SIZE[dataset]}
    if method in TOKEN_METHODS:
        return [{**stage, **MASKED, "local_epochs": MASKED_EPOCHS[dataset]}]
    stage["local_epochs"] = 1
    if dataset == "phantom":
        stage |= LIKE_THE_DEMO
        stage |= {"learning_rate": 8e-4} if method == "simclr" else {}
    if [dataset != "phantom", "vit" in encoder, method == "mlvicx"].count(True) >= 2:
        stage |= LONGER
    return [stage]


def plain_study(dataset: str, method: str, encoder: str, seed: int, rounds: int) -> dict[str, Any]:
    """One row's study."""
    phantom = dataset == "phantom"
    sites = [{"name": name, "cohort": name} for name in SITES]
    return {
        "study": {"name": f"{method}-{encoder}".replace("_", "-"), "seed": seed},
        "images": {"size": SIZE[dataset]},
        "encoder": {"name": encoder, "context": method == "mlvicx"}
        | ({"patch": PATCH[dataset]} if "vit" in encoder else {}),
        "stages": stages(dataset, method, encoder, rounds),
        "evaluation": {"rows": ["random"], "every": rounds, "test_fraction": 0.4},
        "compute": {"threads": 1},
        "simulation": {"site": sites} if phantom else {"sites": len(SITES), "cohort": dataset},
    }


def measure(plain: dict[str, Any], data: Path, state: Path) -> dict[str, Any]:
    """Train, and read both probes."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        compared = simulate(resolve(plain), out, data, state)["comparison"]
        table = pd.read_csv(out / "metrics.csv", keep_default_na=False)
    whole = table[(table["site"] == "") & (table["stage"] == table["stage"].max())].sort_values("round")
    losses, ranks = (whole.loc[whole["metric"] == name, "value"].tolist() for name in ("loss", "effective_rank"))
    probes = {
        name: [round(compared[row][figure], 3) for figure in ("auc", "auc_low", "auc_high")]
        for name, row in (("trained", "federated"), ("untrained", "random"))
    }
    return {**probes, "loss": [round(losses[0], 3), round(losses[-1], 3)], "rank": round(ranks[-1], 1)}


def rows(datasets: list[str], methods: list[str], seeds: int) -> Iterator[tuple[str, str, str, int]]:
    """(dataset, method, encoder, seed), whole comparisons first."""
    for seed in range(seeds):
        for dataset in datasets:
            for method in methods:
                yield from ((dataset, method, encoder, seed) for encoder in FAMILIES[method])


def main() -> None:
    """Make the rows that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of nih-chestxray8-subset; without it, the phantom alone")
    parser.add_argument("--methods", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--patients", type=int, default=PATIENTS, help="of each of the phantom's sites")
    parser.add_argument("--state", type=Path, default=Path(".polyclinic"), help="where cohorts are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    given = parser.parse_args()
    machine = describe()
    known = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    phantom = given.state / f"phantom-{given.patients}"
    for number, name in enumerate(SITES):
        if not (phantom / name / "labels.csv").exists():
            write_site(phantom / name, name, given.patients, 0, number=number)
    for dataset, method, encoder, seed in rows(
        list(BATCH_SIZE) if given.data else ["phantom"], given.methods, given.seeds
    ):
        study = plain_study(dataset, method, encoder, seed, given.rounds)
        wanted = {"dataset": dataset, "method": method, "encoder": encoder, "seed": seed, "study": study}
        wanted["patients"] = given.patients if dataset == "phantom" else None
        if any(wanted.items() <= row.items() for row in known):
            continue
        found = measure(study, phantom if dataset == "phantom" else given.data, given.state)
        known.append({**wanted, **found, "cpu": machine["cpu"]})
        keep(given.out, machine, {"rows": known})


if __name__ == "__main__":
    main()
