"""What the tables show: goals, plots, curves, what was not run."""

import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from polyclinic_simulations.holdout import FRACTIONS
from polyclinic_simulations.papers.goals import verdicts
from polyclinic_simulations.papers.page import curves, plot, render_page
from polyclinic_simulations.papers.plans import (
    HOSPITALS,
    PARTS_OF_LABELS,
    SEEDS,
    STARTS,
    TIERS,
    Plan,
    plans,
    settings_of,
)
from polyclinic_simulations.papers.workshop import as_table

from .conftest import PLAN, row_of


def test_goals_are_met_missed_or_not_measured() -> None:
    def row(method: str, metric: str, *values: float) -> list[dict[str, Any]]:
        plan = Plan(1, "covid-ct", "published", "central", method, "random", 1.0, 0)
        rows = [as_table({replace(plan, seed=k): done(metric, value)}) for k, value in enumerate(values)]
        return pd.concat(rows).to_dict("records")

    def done(metric: str, value: float) -> dict[str, Any]:
        return row_of([value, None, None], metric)

    rows = [*row("sssd", "accuracy", 0.80, 0.82, 0.84), *row("sssd", "auc", 0.7, 0.8, 0.9)]
    assert verdicts(pd.DataFrame([*rows, *row("mae", "auc", 0.85)]))[1][1].endswith("not measured")  # one seed of three
    rows += row("mae", "auc", 0.85, 0.85, 0.85)
    said = verdicts(pd.DataFrame(rows))
    assert said[1] == [
        "accuracy of SSSD from these images alone, at least 0.8176: met: 0.820",
        "AUC of SSSD over that of the masked autoencoder, at least 0: missed: -0.050",
    ]
    assert all(text.endswith("not measured") for number in (2, 3, 4, 5) for text in said[number])
    assert set(verdicts(pd.DataFrame())) == {1, 2, 3, 4, 5}


def test_labels_spared_are_those_beyond_the_first_that_do_as_well() -> None:
    def within(width: float, hospital: str, method: str, fraction: float, value: float) -> pd.DataFrame:
        plan = Plan(4, hospital, "site", "federated", method, "random", fraction, 0)
        result = row_of([value, value - width, value + width])
        return as_table({replace(plan, seed=seed): result for seed in SEEDS})

    def at(hospital: str, method: str, fraction: float, value: float) -> pd.DataFrame:
        return within(0.05, hospital, method, fraction, value)

    noise = pd.concat([within(0.45, HOSPITALS[0], method, 1.0, 0.9) for method in ("scratch", "simclr")])
    assert all(text.endswith("not measured") for text in verdicts(noise)[4])
    for reached, expected in (
        (0.2, "met: 0.800"),
        (0.33, "met: 0.670"),
        (0.5, "missed: 0.500"),
        (2.0, "missed: -1.000"),
    ):
        rows = [at(HOSPITALS[0], "scratch", f, 0.9 if f == 1.0 else 0.7) for f in FRACTIONS if f != 0.01]
        rows += [at(HOSPITALS[0], "simclr", f, 0.9 if f >= reached else 0.8) for f in FRACTIONS if f != 0.01]
        own, supervised, *others = verdicts(pd.concat(rows))[4]
        assert own.endswith(expected)
        assert all(text.endswith("not measured") for text in (supervised, *others))
        both = pd.concat(rows).assign(init="supervised")
        assert verdicts(both)[4][1].endswith(expected)
        made = pd.concat(rows)
        unmade = (made["method"] == "simclr") & (made["label_fraction"] == 0.1) & (made["seed"] == 2)
        assert verdicts(made[~unmade])[4][0].endswith("not measured"), "a start is not judged before it is run"
        few = Plan(4, HOSPITALS[0], "site", "federated", "scratch", "random", 0.01, 2)
        assert verdicts(made, [few])[4][0].endswith("not measured"), "nor before what it is judged by is"
        assert verdicts(made, [replace(few, init="supervised")])[4][0].endswith(expected)


def test_a_goal_over_all_fractions_is_that_of_the_worst() -> None:
    def at(regime: str, method: str, *values: float) -> pd.DataFrame:
        plan = Plan(5, "ham10000-subset", "patient", regime, method, "random", 1.0, 0)
        return pd.concat(
            as_table({replace(plan, label_fraction=f, seed=seed): row_of([value, None, None]) for seed in SEEDS})
            for f, value in zip(PARTS_OF_LABELS, values, strict=True)
        )

    rows = pd.concat([
        at("federated", "mae", 0.7, 0.7, 0.8, 0.9), at("federated", "scratch", 0.6, 0.65, 0.78, 0.9),
        at("pooled", "mae", 0.7, 0.7, 0.805, 0.92), at("alone", "mae", 0.6, 0.6, 0.7, 0.8),
    ])  # fmt: skip
    assert [text.partition(": ")[2] for text in verdicts(rows)[5] if "AUC of mae" in text] == [
        "missed: 0.020", "missed: -0.020", "met: 0.100",
    ]  # fmt: skip


def test_micle_is_to_match_no_pretraining_with_fewer_labels() -> None:
    def at(method: str, fraction: float, value: float) -> pd.DataFrame:
        plan = Plan(2, "ham10000-subset", "patient", "federated", method, "random", fraction, 0)
        return as_table({replace(plan, seed=seed): row_of([value, None, None], "accuracy") for seed in SEEDS})

    rows = pd.concat([at("scratch", 1.0, 0.6), at("scratch", 0.3, 0.5), at("simclr+micle", 0.3, 0.61)])
    assert verdicts(rows)[2][2].endswith("met: 0.010")


def test_the_page_shows_what_was_run_and_lists_what_was_not() -> None:
    every = list(plans())
    assert len({plan.name for plan in every}) == len(every)
    assert {plan.table for plan in every} == {1, 2, 3, 4, 5}
    metrics = {"auc": [0.812, 0.7, 0.9], "accuracy": [0.75, 0.6, 0.8], "balanced_accuracy": [0.74, None, None]}
    done = {plan: {"metrics": metrics, "seconds": 60.0, "machine": "<b>machine</b>"} for plan in every[:2]}
    assert "<td>0.812</td>" in render_page(as_table(done), {}, TIERS["cpu"])  # one seed has no interval
    for seed, value in ((1, 0.7), (2, 0.9)):
        done[replace(every[0], seed=seed)] = row_of([value, None, None])
    without = {plan: plan == every[-1] for plan in every[2:]}
    page = render_page(as_table(done), without, TIERS["cpu"])
    assert "<td>0.804 ± 0.249</td>" in page  # t of 2 degrees of freedom: 4.303 * 0.1002 / sqrt(3)
    assert "0.8176" in page  # the paper's
    assert f"Not run ({len([p for p in every[2:] if p.table == 1])})" in page
    assert re.search(r"Not measurable .*\(1\)</summary><ul><li>" + every[-1].name.partition("-")[2], page)
    assert "<b>machine</b>" not in page
    assert render_page(as_table({}), dict.fromkeys(every, False), TIERS["cpu"])


@pytest.mark.parametrize("known", [[], [0], [0, 1, 2]])
def test_the_plot_draws_rows_without_an_interval(known: list[int]) -> None:
    ends = {seed: [0.6 + seed / 10, 0.9] if seed in known else [None, None] for seed in SEEDS}
    done = {
        replace(PLAN, seed=seed): row_of([0.8, *ends[seed]]) for seed in SEEDS
    }  # as of a mean over sites that train alone
    picture = plot(as_table(done))
    assert not re.search(r"nan|inf", picture, re.IGNORECASE)
    marks = [mark.get("class") for mark in ElementTree.fromstring(picture).iter()]
    assert (marks.count("strip"), marks.count("whisker")) == (3, len(known))
    assert "<svg" in render_page(as_table(done), {}, TIERS["cpu"])


def test_a_left_out_hospital_has_a_curve_of_every_start() -> None:
    done = {
        Plan(4, hospital, "site", "federated", method, "random", fraction, seed): row_of([0.6 + seed / 10, 0.1, 0.9])
        for hospital in HOSPITALS[:2]
        for method in STARTS
        for fraction in (0.0, 1.0)
        for seed in (0, 1)
    }
    drawn = curves(as_table(done))
    assert [hospital for hospital, _ in drawn] == list(HOSPITALS[:2])
    for _, picture in drawn:
        marks = [mark.get("class") for mark in ElementTree.fromstring(picture).iter()]
        assert (marks.count("whisker"), marks.count("line")) == (6, 3)
    page = render_page(as_table(done), {}, TIERS["cpu"])
    assert all(f"<h3>{hospital}</h3>" in page for hospital in HOSPITALS[:2])
    starts = as_table({**done, **{replace(plan, init="supervised"): result for plan, result in done.items()}})
    assert [hospital for hospital, _ in curves(starts)][2:] == [f"{h}, from supervised weights" for h in HOSPITALS[:2]]
    assert curves(as_table({PLAN: row_of([0.5, None, None])})) == []


def test_the_page_says_of_each_table_with_what_encoder_it_was_made() -> None:
    made = as_table({replace(PLAN, table=table): row_of([0.8, 0.7, 0.9]) for table in (1, 3)})
    page = render_page(made, {}, TIERS["cpu"])
    assert "resnet18, images of 64 px. " in page
    assert "vit_tiny with patches of 12 px, images of 96 px. " in page
    page = render_page(made, {}, settings_of("cpu", "vit_small"))
    assert "vit_small with patches of 16 px, images of 64 px. " in page
    assert "vit_small with patches of 12 px, images of 96 px. " in page
    assert "vit_tiny" not in page
