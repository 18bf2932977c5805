"""What the ready grids are compared by: the differences name rows that the grids have, and are taken seed by seed."""

import math
import runpy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from polyclinic_simulations.sweep.grid import read_grid

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"
NAMES = ("label-skew", "scanner-shift", "byzantine", "held-out")


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return runpy.run_path(str(FOLDER / "findings.py"))


def measured(path: Path) -> pd.DataFrame:
    """A line a row of each cell, overall and at each site; cells differ by 0.01, and so do rows and sites."""
    lines = []
    for place, cell in enumerate(read_grid(path).cells):
        sites = [f"site-{n + 1}" for n in range(cell.study.simulation.sites)]
        for row, worse in (("federated", 0), ("pooled", 1), ("scratch", 2)):
            line = {**cell.values, "row": row, "label_fraction": 1.0}
            lines.append({**line, "site": "", "metric": "classifier_auc", "value": (place - worse) / 100})
            for far, site in enumerate(sites):
                lines.append({**line, "site": site, "metric": "auc", "value": (place - worse * far) / 100})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("name", NAMES)
def test_every_difference_is_between_rows_that_the_grid_has(
    findings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    ready = findings["grid_for"](name, "phantom", tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = findings["found"](measured(ready), findings["GRIDS"][name])
    assert len(found) >= 4
    for words, figures in found.items():
        assert len(figures["seeds"]) == 3, words
        assert math.isfinite(figures["mean"]), words


def test_a_difference_is_taken_in_the_direction_that_its_words_say(findings: dict[str, Any], tmp_path: Path) -> None:
    rows = measured(findings["grid_for"]("label-skew", "phantom", tmp_path))
    found = findings["found"](rows, findings["label_skew"])  # three seeds to a partition, two partitions to a rule
    assert found["fedavg: even labels above skewed ones"]["mean"] == pytest.approx(-0.03)
    assert found["skewed: fedprox mu=0.1 above fedavg"]["mean"] == pytest.approx(0.06)
    held = findings["found"](measured(findings["grid_for"]("held-out", "phantom", tmp_path)), findings["held_out"])
    assert held["gap of supervised training alone"]["mean"] == pytest.approx(0.04)
    assert held["strong views: by how much pretraining narrows it"]["mean"] == pytest.approx(0.04)


@pytest.mark.parametrize("name", NAMES)
def test_radiographs_take_the_place_of_patients_and_of_nothing_else(
    findings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    ready = read_grid(findings["grid_for"](name, "phantom", tmp_path))
    other = read_grid(findings["grid_for"](name, findings["RADIOGRAPHS"], tmp_path))
    assert other.axes == ready.axes
    kept = {"simulation": {"cohort", "phantom"}, "evaluation": {"labels"}}
    for one, two in zip(ready.cells, other.cells, strict=True):
        assert two.study.simulation.cohort == findings["RADIOGRAPHS"]
        assert set(two.study.evaluation.classes) == {"normal", "pneumonia"}
        assert one.study.model_dump(exclude=kept) == two.study.model_dump(exclude=kept)
