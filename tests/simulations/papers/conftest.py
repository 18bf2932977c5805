"""Datasets of a few images, and a tier that trains for no time."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyclinic_simulations.papers.plans import Plan, Tier
from polyclinic_simulations.papers.run import run_plan
from polyclinic_simulations.papers.workshop import Workshop

from ...tiny import draw

TINY = Tier(
    images={"size": 16},
    encoder={"name": "vit_tiny", "patch": 8},
    epochs=dict.fromkeys(("mae", "sssd", "simclr", "mlvicx", "vicreg"), 6),
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


def row_of(value: list[float | None], metric: str = "auc") -> dict[str, Any]:
    return {"metrics": {metric: value}, "seconds": 1.0, "machine": f"cpu tier {TINY.digest}, paper"}


def run(plan: Plan, data: Path, work: Path) -> dict[str, Any]:
    result = run_plan(plan, Workshop(TINY, data, work, row_of([])["machine"]))
    assert result is not None
    return result


@pytest.fixture
def colour(tmp_path: Path) -> Path:
    """ham10000-subset in miniature: seven classes, pairs of photographs."""
    folder = tmp_path / "data" / "ham10000-subset"
    folder.mkdir(parents=True)
    words = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "patient"])
        for k in range(7 * 24):
            grey = Image.fromarray(draw(k, "spot" if k // 2 % 7 % 2 else "clear"))
            grey.convert("RGB").save(folder / f"{k}.png")
            table.writerow([f"{k}.png", words[k // 2 % 7], f"lesion {k // 2}"])
    return tmp_path / "data"
