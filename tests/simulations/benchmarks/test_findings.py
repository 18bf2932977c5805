"""What the ready grids are compared by: the differences name rows that the grids have, and are taken seed by seed."""

import itertools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from polyclinic_simulations.sweep.grid import Cell, read_grid

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"
STUDIES = FOLDER.parent / "studies"
NAMES = ("label-skew", "scanner-shift", "byzantine", "held-out")


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return runpy.run_path(str(FOLDER / "findings.py"))


def measured(name: str, values: Callable[[Cell, str, str], float]) -> pd.DataFrame:
    """results.csv of a ready grid: each row once for the cells that share it, blank on the axes that it is free of."""
    grid = read_grid(STUDIES / f"grid-{name}.toml")
    lines = []
    for cell, row in itertools.product(grid.cells, ("federated", "pooled", "scratch", "random")):
        axes = {axis: value if axis in grid.axes_of(row) else "" for axis, value in cell.values.items()}
        for site in ["", *(f"site-{n + 1}" for n in range(cell.study.simulation.sites))]:
            for metric in ("auc", "classifier_auc") if site else ("classifier_auc",):
                line = {**axes, "row": row, "label_fraction": 1.0, "site": site, "metric": metric}
                lines.append({**line, "value": values(cell, row, site)})
    return pd.DataFrame(lines).drop_duplicates([*grid.axes, "row", "site", "metric"])


def by_seed(cell: Cell) -> float:
    """What a seed makes easier: no difference shows it."""
    return int(cell.values["seed"]) / 8


def test_skew_and_rules_are_taken_from_the_plain_mean(findings: dict[str, Any]) -> None:
    rules = {"fedavg": 0.0, "fedprox mu=0.1": 0.04, "ldawa": -0.01}

    def value(cell: Cell, row: str, site: str) -> float:
        skew = 0.1 if cell.values["partition"] != "iid" else 0.0
        own = 0.3 - skew / 2 if row == "pooled" else 0.2 - skew + rules.get(cell.values["rule"], 0.0)
        return by_seed(cell) + own

    found = findings["found"](measured("label-skew", value), findings["label_skew"])
    means = {words: figures["mean"] for words, figures in found.items()}
    assert means["fedavg: even labels above skewed ones"] == pytest.approx(0.1)
    assert means["pooled: even labels above skewed ones"] == pytest.approx(0.05)
    assert means["even: pooled above fedavg"] == pytest.approx(0.1)
    assert means["skewed: pooled above fedavg"] == pytest.approx(0.15)
    assert means["skewed: fedprox mu=0.1 above fedavg"] == pytest.approx(0.04)
    assert means["skewed: ldawa above fedavg"] == pytest.approx(-0.01)
    assert len(means) == 8
    assert all(len(figures["seeds"]) == 3 and figures["half"] == 0 for figures in found.values())


def test_what_scanners_cost_each_normalisation(findings: dict[str, Any]) -> None:
    losses = {"group norm": 0.1, "batch norm, averaged": 0.3, "batch norm, fedbn": 0.2}

    def value(cell: Cell, row: str, site: str) -> float:
        loss = losses[cell.values["normalisation"]] * float(cell.values["severity"])
        start = 0.05 if cell.values["normalisation"] == "group norm" else 0.0
        return by_seed(cell) - start - (loss / 2 if row == "pooled" else loss)

    found = findings["found"](measured("scanner-shift", value), findings["scanner_shift"])
    means = {words: figures["mean"] for words, figures in found.items()}
    assert means["group norm: like scanners above differing ones"] == pytest.approx(0.1)
    assert means["like scanners: group norm above batch norm, averaged"] == pytest.approx(-0.05)
    assert means["differing scanners: group norm above batch norm, averaged"] == pytest.approx(0.15)
    assert means["group norm: what it loses less than batch norm, averaged"] == pytest.approx(0.2)
    assert means["batch norm, fedbn: what it loses less than batch norm, averaged"] == pytest.approx(0.1)
    assert means["pooled, batch norm: like scanners above differing ones"] == pytest.approx(0.15)
    assert means["pooled, group norm: what it loses less than batch norm"] == pytest.approx(0.1)


def test_an_attack_is_stood_or_not(findings: dict[str, Any]) -> None:
    costs = {"fedavg": 0.3, "krum": 0.0}

    def value(cell: Cell, row: str, site: str) -> float:
        harm = costs.get(cell.values["rule"], 0.1) if cell.values["attack"] != "none" else 0.0
        return by_seed(cell) - harm - (0.2 if cell.values["rule"] == "krum" else 0.0)

    found = findings["found"](measured("byzantine", value), findings["byzantine"])
    means = {words: figures["mean"] for words, figures in found.items()}
    assert means["none: krum above fedavg"] == pytest.approx(-0.2)
    assert means["100 times: krum above fedavg"] == pytest.approx(0.1)
    assert means["sign flip, fedavg: without the attack above with it"] == pytest.approx(0.3)
    assert means["100 times, krum: without the attack above with it"] == pytest.approx(0)


def test_the_gap_is_that_of_the_site_held_out(findings: dict[str, Any]) -> None:
    gaps = {"federated": 0.1, "scratch": 0.3, "random": 0.4}
    levels = {"federated": 0.25, "scratch": 0.2}

    def value(cell: Cell, row: str, site: str) -> float:
        more = 0.02 if cell.values["views"] == "strong views" and row == "federated" else 0.0
        return by_seed(cell) + levels.get(row, 0.0) + more - (gaps.get(row, 0.0) if site == "site-4" else 0.0)

    rows = measured("held-out", value)
    classifiers = (rows["metric"] == "classifier_auc") & (rows["site"] == "site-4")
    rows.loc[classifiers & (rows["row"] == "scratch"), "value"] -= 0.125
    found = findings["found"](rows, findings["held_out"])
    means = {words: figures["mean"] for words, figures in found.items()}
    assert means["probe: gap of the untrained encoder"] == pytest.approx(0.4)
    assert means["probe: gap of supervised training alone"] == pytest.approx(0.3)
    assert means["classifier: gap of supervised training alone"] == pytest.approx(0.425)
    for what, more in (("probe", 0.0), ("classifier", 0.125)):
        assert means[f"{what}, strong views: gap with self-supervised pretraining"] == pytest.approx(0.1)
        assert means[f"{what}, strong views: by how much pretraining narrows it"] == pytest.approx(0.2 + more)
        beside = f"{what}, gentle views: with pretraining above without"
        assert means[f"{beside}, at the sites that train"] == pytest.approx(0.05)
        assert means[f"{beside}, at the site held out"] == pytest.approx(0.25 + more)


def test_what_was_not_trained_is_left_out(findings: dict[str, Any]) -> None:
    """Under one attack no seed of Krum was, and one of the median."""
    rows = measured("byzantine", lambda cell, row, site: 0.5)
    failed = (rows["attack"] == "sign flip") & (
        (rows["rule"] == "krum") | ((rows["rule"] == "median") & (rows["seed"] != "1"))
    )
    found = findings["found"](rows[~failed], findings["byzantine"])
    assert "sign flip: krum above fedavg" not in found and "100 times: krum above fedavg" in found
    assert found["sign flip: median above fedavg"] == {"mean": 0.0, "half": None, "seeds": [0.0]}
    whole = findings["found"](rows, findings["byzantine"])
    table = findings["tables"]({"one": {"byzantine": found}, "other": {"byzantine": whole}})
    assert "| sign flip: krum above fedavg | – | +0.000 ± 0.000 |" in table
    assert "| sign flip: median above fedavg | +0.000 | +0.000 ± 0.000 |" in table


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
