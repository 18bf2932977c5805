"""sweep.html: which choice wins under which condition, by how much, for whom, and at what price."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader

from polyclinic.report import figures as of_a_run
from polyclinic.report import words
from polyclinic.report.run import read_run
from polyclinic.study import Row
from polyclinic_simulations.sweep import figures
from polyclinic_simulations.sweep.figures import Mean, Table
from polyclinic_simulations.sweep.grid import Grid
from polyclinic_simulations.sweep.run import CELLS, Place, notes

MOST_NOTES = 20
"""Cells whose notes the page shows."""
MOST_DOUBTS = 5
"""Notes that half the studies or more have, which the page begins with."""
METRICS = {"auc": "linear probe on the frozen encoder", "classifier_auc": "fine-tuned classifier"}


def render_sweep(name: str, grid: Grid, rows: pd.DataFrame, place: Place, failed: Mapping[str, str]) -> str:
    """The page of results.csv (`rows`); of an unfinished sweep, as far as it is."""
    loader = ChoiceLoader([PackageLoader("polyclinic_simulations.sweep", ""), PackageLoader("polyclinic.report")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": words.duration, "size": words.size}
    made = sum(map(place.is_made, grid.cells))
    shown: dict[str, Any] = {"name": name, "made": made, "cells": len(grid.cells), "failed": failed, "axes": grid.axes}
    told = notes(grid, place)
    shown["notes"] = list(told.items())[:MOST_NOTES]
    often = Counter(text for texts in told.values() for text in texts)
    shown["doubts"] = [(text, count) for text, count in often.most_common(MOST_DOUBTS) if 2 * count >= made > 1]
    first = grid.cells[0].study
    shown["study"] = first.to_toml()
    shown["unasked"] = [words.row_name(row) for row in get_args(Row) if row not in first.evaluation.rows]
    if len(rows):
        shown |= _measured(Table(rows, grid), place)
    return environment.get_template("page.html.j2").render(shown)


def _measured(table: Table, place: Place) -> dict[str, Any]:
    conditions = [
        {
            "name": table.named(condition),
            "plot": figures.forest(table, condition),
            "ranking": [(table.name(choice), found) for choice, found in table.ranked(condition)],
            "others": table.other_rows(condition),
            "behind": figures.behind(table, condition),
            "matrix": figures.matrix(table, condition),
            "labels": figures.label_efficiency(table, condition),
        }
        for condition in table.conditions
        if table.ranked(condition)
    ]
    return {
        "metric": METRICS[table.metric],
        "lede": verdicts(table),
        "across": figures.across(table),
        "conditions": conditions,
        "cost_of_conditions": figures.cost_of_conditions(table),
        "fairness": figures.fairness(table),
        "held_out": [(words, found) for metric, words in METRICS.items() if (found := figures.held_out(table, metric))],
        "told_apart": figures.sites_told_apart(table),
        "costs": figures.costs(table),
        "maps": _maps(table, place),
    }


def verdicts(table: Table) -> list[str]:
    """The answer in sentences, a condition each: who wins, whether by more than the seeds' noise, and what is lost."""
    texts = []
    for condition in table.conditions:
        order, gaps = table.ranked(condition), figures.behind(table, condition)
        if not order:
            continue
        words, best, found = table.named(condition), table.name(order[0][0]), order[0][1]
        text = f"{words}: {best} reaches {found}" if words else f"{best} reaches {found}"
        if len(order) > 1 and (gap := gaps.get(second := table.name(order[1][0]))):
            text += f", {_against(gap, second)}"
        for row, what in (("scratch", "the same without pretraining"), ("pooled", "pooling all images")):
            if gap := gaps.get(row):
                text += f"; {_against(gap, what)}"
        texts.append(f"{text}.")
    return texts


def _against(gap: Mean, what: str) -> str:
    """A difference in the seeds that both have, and whether it is more than their noise."""
    doubt = " (one seed)" if gap.seeds == 1 else "" if abs(gap.value) > gap.half else " (within the noise of the seeds)"
    return f"{abs(gap.value):.3f} {'above' if gap.value >= 0 else 'below'} {what}{doubt}"


def _maps(table: Table, place: Place) -> list[dict[str, Any]]:
    """The embedding map of each condition's best choice, at its first finished seed."""
    found = []
    for condition in table.conditions:
        for choice, _ in table.ranked(condition)[:1]:
            own = table.of(condition, choice)
            run = read_run(place.out / CELLS / own.loc[own["row"] == figures.FEDERATED, "cell"].iloc[0])
            title = ", ".join(filter(None, (table.named(condition), table.name(choice))))
            found.append({"title": title, "figures": of_a_run.maps(run)})
    return found


def ranking(table: Table, failed: Mapping[str, str]) -> str:
    """What scripts read: under each condition the choices, the best first, the other rows, and what was not trained."""

    def plain(key: str, name: str, found: Mean) -> dict[str, Any]:
        half = None if math.isnan(found.half) else round(found.half, 4)
        return {key: name, table.metric: round(found.value, 4), "half": half, "seeds": found.seeds}

    conditions = [
        {
            "condition": table.named(condition),
            "ranking": [plain("choice", table.name(choice), found) for choice, found in table.ranked(condition)],
            "others": [plain("row", name, found) for name, found in table.other_rows(condition)],
        }
        for condition in table.conditions
    ]
    return json.dumps({"conditions": conditions, "failed": dict(failed)}, indent=2)
