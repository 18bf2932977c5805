"""The figures of a sweep's page: means over seeds with t intervals, rankings, what belongs to which choice."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markupsafe import Markup

from polyclinic_simulations.sweep import figures, page
from polyclinic_simulations.sweep.figures import Table, mean
from polyclinic_simulations.sweep.grid import Cell, Grid
from polyclinic_simulations.sweep.page import verdicts
from polyclinic_simulations.sweep.run import Place

from ...tiny import tiny_study

AXES = {"rule": ["a", "b"], "partition": ["iid", "skew"], "seed": ["0", "1", "2"]}
GRID = Grid(AXES, conditions=["partition"], rules=["rule"], faults=[], cells=[])
IID, SKEW = ("iid",), ("skew",)


def line(**values: Any) -> dict[str, Any]:
    blank = {"rule": "", "site": "", "label_fraction": 1.0, "metric": "auc", "low": None, "high": None, "cell": "c"}
    return {**blank, **values}


@pytest.fixture
def table() -> Table:
    """Rule b is .1 above a at every seed under skew, and under iid below it by no more than noise."""
    rows = []
    for seed, ease in (("0", 0.0), ("1", 0.1), ("2", 0.2)):
        for partition in ("iid", "skew"):
            at = {"partition": partition, "seed": seed}
            better = 0.1 if partition == "skew" else -0.02 * (1 if seed == "0" else -0.3)
            rows.append(line(**at, row="federated", rule="a", value=0.6 + ease))
            rows.append(line(**at, row="federated", rule="b", value=0.6 + ease + better))
            rows.append(line(**at, row="pooled", value=0.75 + ease))
            for site, own in (("x", 0.02), ("y", -0.04)):
                rows.append(line(**at, row="federated", rule="a", site=site, value=0.6 + ease + own))
                rows.append(line(**at, row=f"alone:{site}", value=0.5 + own))
                rows.append(line(**at, row=f"alone:{site}", site="x", metric="auc_own_probe", value=0.5))
                rows.append(line(**at, row=f"alone:{site}", site="y", metric="auc_own_probe", value=0.4))
    return Table(pd.DataFrame(rows), GRID)


def test_an_interval_is_students() -> None:
    """By hand: t(0.975, 2) = 4.3027, deviation 0.1, three seeds."""
    found = mean([0.7, 0.8, 0.9])
    assert found.value == pytest.approx(0.8)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert math.isnan(mean([0.7]).half)
    assert mean([]).seeds == 0


def test_choices_are_ranked_under_each_condition_and_compared_seed_by_seed(table: Table) -> None:
    assert [name for name, _ in table.ranked(SKEW)] == [("b",), ("a",)]
    gaps = figures.behind(table, SKEW)
    assert (gaps["a"].value, gaps["a"].half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
    assert gaps["pooled"].value == pytest.approx(-0.05)
    said = verdicts(table)
    assert "skew: b reaches 0.800" in said[1] and "0.100 above a" in said[1] and "noise" not in said[1]
    assert "0.050 below pooling" in said[1]
    scratch = [line(partition="skew", seed=s, rule="b", row="scratch", value=v) for s, v in (("0", 0.5), ("1", 0.61))]
    more = Table(pd.concat([table.rows, pd.DataFrame(scratch)]), GRID)
    assert "0.195 above the same without pretraining;" in verdicts(more)[1]  # 0.7 - 0.5 and 0.8 - 0.61
    assert "within the noise" in said[0]


def test_a_choice_that_lacks_a_seed_is_ranked_behind_and_compared_in_those_that_both_have() -> None:
    """Of the easy seeds alone it looks better than it is."""
    values = {("a", "1"): 0.8, ("a", "2"): 0.8, ("b", "0"): 0.5, ("b", "1"): 0.82, ("b", "2"): 0.84}
    rows = [line(partition="iid", seed=s, row="federated", rule=r, value=v) for (r, s), v in values.items()]
    table = Table(pd.DataFrame(rows), GRID)
    assert [name for name, _ in table.ranked(IID)] == [("b",), ("a",)]
    assert "b reaches 0.720" in verdicts(table)[0] and "0.030 above a" in verdicts(table)[0]
    worse = [row | ({"value": 0.9} if row["rule"] == "a" else {}) for row in rows]
    assert "0.070 below a" in verdicts(Table(pd.DataFrame(worse), GRID))[0]


def test_conditions_stand_in_the_order_of_the_grid(table: Table) -> None:
    """Whichever of them is the first that was trained: the others are held against the first."""
    late = table.rows[(table.rows["rule"] != "a") | (table.rows["partition"] != "iid")]
    assert late.iloc[0]["partition"] == "iid" and late[late["row"] == "federated"].iloc[0]["rule"] == "b"
    assert Table(late.iloc[::-1], GRID).conditions == [IID, SKEW]


def test_rows_that_share_no_choice_stand_beside_all(table: Table) -> None:
    others = dict(table.other_rows(SKEW))
    assert others["all sites pooled"].value == pytest.approx(0.85)
    assert others["mean single site"].value == pytest.approx(0.49)


def test_fairness_is_the_worst_site_and_the_spread(table: Table) -> None:
    row = figures.fairness(table)[0]
    assert (row["condition"], row["choice"], row["worst"]) == ("iid", "a", "y")
    assert [found.value for found in row["figures"]] == pytest.approx([0.69, 0.66, 0.06])


def test_nobody_is_most_often_worst_where_seeds_disagree_as_often(table: Table) -> None:
    at_y = (table.rows["row"] == "federated") & (table.rows["site"] == "y")
    better = table.rows.assign(value=table.rows["value"] + at_y * (table.rows["seed"] == "1"))
    assert figures.fairness(Table(better, GRID))[0]["worst"] == "y", "in two of three seeds"
    two = better[better["seed"] != "2"]
    assert figures.fairness(Table(two, GRID))[0]["worst"] == ""
    gone = table.rows[~((table.rows["site"] == "y") & (table.rows["seed"] == "2"))]
    row = figures.fairness(Table(pd.concat([gone, gone[gone["site"] == "y"].assign(site="z")]), GRID))[0]
    assert row["sites"] == "3"


def test_what_a_condition_costs_is_taken_from_the_first_seed_by_seed(table: Table) -> None:
    """Skew gains b .1 and .12 or .094 more than that by seed, a and pooled nothing; pooled has one line for both."""
    a, b, pooled = sorted(figures.cost_of_conditions(table), key=lambda row: (row["row"] != "federated", row["choice"]))
    assert [row["condition"] for row in (a, b, pooled)] == ["skew"] * 3
    assert (a["choice"], b["choice"], pooled["choice"]) == ("a", "b", "")
    assert [m.value for m in a["figures"]] == pytest.approx([0.7, 0.7, 0])
    assert b["figures"][2].value == pytest.approx(-0.1 + (-0.02 + 2 * 0.006) / 3)
    assert pooled["figures"][2].value == pytest.approx(0)
    apart = table.rows[(table.rows["partition"] != "skew") | (table.rows["seed"] == "1")]
    assert all(row["figures"][0].seeds == 1 for row in figures.cost_of_conditions(Table(apart, GRID)))
    alone = Table(table.rows[table.rows["partition"] == "iid"], GRID)
    assert figures.cost_of_conditions(alone) == []


def test_the_matrix_says_where_a_site_alone_is_of_use(table: Table) -> None:
    found = figures.matrix(table, IID)
    assert found is not None
    assert found["sites"] == ["x", "y"]
    cells = dict(found["rows"])
    assert [text for text, _ in cells["x alone"]] == ["0.500", "0.400"]
    assert cells["y alone"][1] == ("0.400", 0.0)


def test_plots_hold_every_choice_and_escape_what_they_are_given(table: Table) -> None:
    named = replace(GRID, axes={**GRID.axes, "rule": ["<a>", "b"]})
    table = Table(table.rows.assign(rule=table.rows["rule"].replace("a", "<a>")), named)
    plot = str(figures.forest(table, SKEW))
    assert "&lt;a&gt;" in plot and "<a>" not in plot
    assert figures.across(table) is not None


def test_rows_that_a_choice_changes_are_read_beside_their_own() -> None:
    """Two norms: pooled is .1 above the better and .2 below the other, and no mean of both."""
    grid = Grid({"encoder.norm": ["group", "batch"], "seed": ["0", "1"]}, conditions=[], rules=[], faults=[], cells=[])
    rows = []
    for seed in ("0", "1"):
        for norm, ours, pooled in (("group", 0.8, 0.9), ("batch", 0.7, 0.5)):
            at = {"encoder.norm": norm, "seed": seed}
            rows += [line(**at, row="federated", value=ours), line(**at, row="pooled", value=pooled)]
    table = Table(pd.DataFrame(rows), grid)
    assert figures.behind(table, ())["pooled"].value == pytest.approx(-0.1)
    assert {name: found.value for name, found in table.other_rows(())} == {
        "all sites pooled, norm group": pytest.approx(0.9),
        "all sites pooled, norm batch": pytest.approx(0.5),
    }
    assert "0.100 below pooling" in verdicts(table)[0]


def test_few_labels_are_drawn_seed_by_seed_with_the_rows_that_no_choice_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: of 0.5 and 0.7 the mean is 0.6 and, with t(0.975, 1) = 12.706, the interval 12.706 * 0.1414 / 1.4142."""
    at = {"partition": "iid", "row": "federated", "rule": "a"}
    rows = [line(**at, seed=s, value=v, label_fraction=f) for s, f, v in (
        ("0", 0.1, 0.5), ("1", 0.1, 0.7), ("0", 1.0, 0.8), ("1", 1.0, 0.8),
    )]  # fmt: skip
    pooled = {"partition": "iid", "row": "pooled", "seed": "0"}
    rows += [line(**pooled, value=value, label_fraction=f) for f, value in ((0.1, 0.6), (1.0, 0.9))]
    drawn = dict[str, Any]()

    def lines(series: Any, places: Any, colours: Any, label: str) -> Markup:
        drawn.update(series)
        assert places == ["10%", "100%"]
        return Markup("")

    monkeypatch.setattr(figures, "lines", lines)
    found = figures.label_efficiency(Table(pd.DataFrame(rows), GRID), IID)
    assert found is not None and found.title == "iid"
    assert [name for name, _ in found.legend] == list(drawn) == ["a", "all sites pooled"]
    assert [drawn["a"][place].value for place in ("10%", "100%")] == pytest.approx([0.6, 0.8])
    assert drawn["a"]["10%"].half == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert [drawn["all sites pooled"][place].value for place in ("10%", "100%")] == pytest.approx([0.6, 0.9])


def test_sites_are_told_apart_before_and_after_training() -> None:
    rows = [line(partition="iid", seed="0", row="federated", rule=rule, value=0.7) for rule in ("a", "b")]
    about = {"partition": "iid", "metric": "site_auc"}
    rows += [line(**about, seed=seed, row="pixels", value=value) for seed, value in (("0", 0.9), ("1", 0.8))]
    rows += [line(**about, seed="0", row="random", value=0.75)]
    rows += [line(**about, seed=s, row="federated", rule="b", value=v) for s, v in (("0", 0.6), ("1", 0.7))]
    [found] = figures.sites_told_apart(Table(pd.DataFrame(rows), GRID))
    assert (found["condition"], found["choice"]) == ("iid", "b"), "of a nothing is known"
    assert [(m.value, m.seeds) for m in found["figures"]] == [
        (pytest.approx(0.85), 2), (pytest.approx(0.75), 1), (pytest.approx(0.65), 2)
    ]  # fmt: skip


def test_costs_are_of_the_federation_alone() -> None:
    rows = [line(partition="iid", seed="0", row="federated", rule="a", value=0.7)]
    told = {"rounds": (4, 6), "bytes_down": (100, 300), "bytes_up": (100, 200), "site_seconds": (8, 9)}
    about = {"partition": "iid", "rule": "a"}
    for metric, values in told.items():
        rows += [line(**about, seed=str(n), row="federated", metric=metric, value=v) for n, v in enumerate(values)]
    rows.append(line(**about, seed="0", row="pooled", metric="rounds", value=1000))
    expected = {"rounds": 5, "bytes_down": 200, "bytes_up": 150, "site_seconds": 8.5}
    assert figures.costs(Table(pd.DataFrame(rows), GRID)) == [{"condition": "iid", "choice": "a", **expected}]


def test_a_condition_shows_the_map_of_its_best_choice_at_its_first_seed(table: Table, tmp_path: Path) -> None:
    rows = table.rows.assign(cell=table.rows["rule"] + "-" + table.rows["seed"])
    for cell, embedding in (("a-0", "x,y,site,label\n0,1,north,ill\n1,0,south,well\n"), ("b-0", "x,y,site,label\n")):
        report = tmp_path / "cells" / cell / "report"
        report.mkdir(parents=True)
        (report.parent / "study.toml").write_text(tiny_study().to_toml())
        (report.parent / "seats.json").write_text('{"north": 1, "south": 1}')
        (report / "embedding.csv").write_text(embedding)
    by_site_and_label, none = page._maps(Table(rows, GRID), Place(tmp_path, tmp_path, tmp_path))
    assert [by_site_and_label["title"], none["title"]] == ["iid, a", "skew, b"]
    assert [name for figure in by_site_and_label["figures"] for name, _ in figure.legend] == [
        "north", "south", "ill", "well"
    ]  # fmt: skip
    assert none["figures"] == []


def test_what_half_of_the_studies_say_stands_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [Cell({"seed": str(seed)}, tiny_study(study={"name": "s", "seed": seed})) for seed in range(4)]
    told = {"0": ["all <alike>"], "1": ["all <alike>", "once"], "2": []}
    monkeypatch.setattr(page, "notes", lambda grid, place: told)
    monkeypatch.setattr(Place, "is_made", lambda place, cell: True)
    grid = Grid({"seed": list("0123")}, [], [], [], cells)
    shown = page.render_sweep("s", grid, pd.DataFrame(), Place(tmp_path, tmp_path, tmp_path), {})
    first = shown[: shown.index("<details>")]
    assert "<li>all &lt;alike&gt; (in 2 of 4 studies)</li>" in first and "once" not in first


def test_what_has_no_figures_has_no_plot(table: Table) -> None:
    few = Table(table.rows[(table.rows["row"] == "federated") & (table.rows["site"] == "")], GRID)
    assert figures.matrix(few, IID) is None
    assert figures.label_efficiency(few, IID) is None
    assert figures.sites_told_apart(few) == [] and figures.fairness(few) == []
    apart = Table(table.rows[(table.rows["rule"] != "b") | (table.rows["seed"] == "0")], GRID)
    assert "one seed" in " ".join(verdicts(apart))


def test_a_row_that_no_choice_changes_has_one_line_at_sites_held_out() -> None:
    study = tiny_study(simulation={"sites": 2, "cohort": "all", "held_out": ["site-2"]})
    cells = [Cell({"rule": rule, "seed": "0"}, study) for rule in ("a", "b")]
    grid = Grid({"rule": ["a", "b"], "seed": ["0"]}, [], rules=["rule"], faults=[], cells=cells)
    rows = [
        line(rule=cell.values["rule"], seed="0", cell=cell.name, row=row, site=site, value=value + gain * place)
        for place, cell in enumerate(cells)
        for row, gain in (("federated", 0.1), ("pixels", 0.0))
        for site, value in {"": 0.6, "site-1": 0.7, "site-2": 0.5}.items()
    ]
    found = figures.held_out(Table(pd.DataFrame(rows), grid), "auc")
    assert [(row["row"], row["choice"]) for row in found] == [
        ("federated", "b"), ("federated", "a"), ("16 × 16 pixels", "")
    ]  # fmt: skip


def test_the_gap_at_sites_held_out_is_taken_seed_by_seed() -> None:
    study = tiny_study(simulation={"sites": 3, "cohort": "all", "held_out": ["site-3"]})
    cells = [Cell({"severity": "1", "seed": seed}, study) for seed in ("0", "1")]
    grid = Grid({"severity": ["1"], "seed": ["0", "1"]}, ["severity"], rules=[], faults=[], cells=cells)
    at_sites = {
        "federated": {"site-1": 0.9, "site-2": 0.7, "site-3": 0.75},
        "scratch": {"site-1": 0.8, "site-2": 0.6, "site-3": 0.5},
    }
    rows = [
        line(severity="1", seed=cell.values["seed"], cell=cell.name, row=row, site=site, value=value + ease)
        for cell, ease in zip(cells, (0.0, 0.05), strict=True)
        for row, values in at_sites.items()
        for site, value in {"": 0.7, **values}.items()
    ]
    ours, other = figures.held_out(Table(pd.DataFrame(rows), grid), "auc")
    assert [m.value for m in ours["figures"]] == pytest.approx([0.825, 0.775, 0.05])
    assert [m.value for m in other["figures"]] == pytest.approx([0.725, 0.525, 0.2])
    assert (ours["figures"][2].half, ours["row"]) == (pytest.approx(0.0, abs=1e-9), "federated")
    half = [row for row in rows if row["site"] != "site-3" or row["seed"] == "0"]
    ours = figures.held_out(Table(pd.DataFrame(half), grid), "auc")[0]
    assert [m.value for m in ours["figures"]] == pytest.approx([0.8, 0.75, 0.05]), "of the seed that has both"
    nobody = tiny_study(simulation={"sites": 3, "cohort": "all"})
    unheld = [Cell(cell.values, nobody) for cell in cells]
    for was, cell in zip(cells, unheld, strict=True):
        rows = [{**row, "cell": cell.name} if row["cell"] == was.name else row for row in rows]
    assert figures.held_out(Table(pd.DataFrame(rows), replace(grid, cells=unheld)), "auc") == []
