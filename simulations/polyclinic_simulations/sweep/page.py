"""sweep.html: which choice wins under which condition, by how much, for whom, and at what price."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import tomli_w
from jinja2 import ChoiceLoader, Environment, PackageLoader

from polyclinic.report import figures as of_a_run
from polyclinic.report import words
from polyclinic.report.run import read_run
from polyclinic_simulations.sweep import figures
from polyclinic_simulations.sweep.figures import Table
from polyclinic_simulations.sweep.grid import Grid
from polyclinic_simulations.sweep.run import Place, is_made

METRICS = {"auc": "linear probe on the frozen encoder", "classifier_auc": "fine-tuned classifier"}


def render_sweep(name: str, grid: Grid, rows: pd.DataFrame, place: Place, failed: Mapping[str, str]) -> str:
    """The page of results.csv (`rows`); of an unfinished sweep, as far as it is."""
    loader = ChoiceLoader([PackageLoader("polyclinic_simulations.sweep", ""), PackageLoader("polyclinic.report")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": words.duration, "size": words.size}
    made = sum(is_made(place.folder(cell)) for cell in grid.cells)
    shown: dict[str, Any] = {"name": name, "made": made, "cells": len(grid.cells), "failed": failed, "axes": grid.axes}
    shown["study"] = tomli_w.dumps(grid.cells[0].study.model_dump(mode="json"))
    if len(rows):
        shown |= _measured(Table(rows, grid), grid, place)
    return environment.get_template("page.html.j2").render(shown)


def _measured(table: Table, grid: Grid, place: Place) -> dict[str, Any]:
    conditions = [
        {
            "name": condition,
            "plot": figures.forest(table, condition),
            "ranking": [(name or figures.FEDERATED, found) for name, found in table.ranked(condition)],
            "others": table.other_rows(condition),
            "behind": dict(figures.behind(table, condition)),
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
        "fairness": figures.fairness(table),
        "told_apart": figures.sites_told_apart(table),
        "costs": figures.costs(table),
        "maps": _maps(table, grid, place),
        "seeds": len(grid.axes["seed"]),
    }


def verdicts(table: Table) -> list[str]:
    """The answer in sentences, a condition each: who wins, whether by more than the seeds' noise, and what is lost."""
    texts = []
    for condition in table.conditions:
        order = table.ranked(condition)
        if not order:
            continue
        gaps = dict(figures.behind(table, condition))
        best, found = order[0]
        start = f"{condition}: " if condition else ""
        text = f"{start}{best or figures.FEDERATED} reaches {found}"
        if len(order) > 1:
            gap = gaps[order[1][0]]
            surely = gap.value - gap.half > 0
            text += f", {gap.value:.3f} above {order[1][0]}" + (
                "" if surely else " (within the noise of the seeds)" if gap.seeds > 1 else " (one seed)"
            )
        if "pooled" in gaps and gaps["pooled"].seeds:
            lost = gaps["pooled"]
            text += f"; {abs(lost.value):.3f} {'above' if lost.value > 0 else 'below'} pooling all images"
        texts.append(f"{text}.")
    return texts


def _maps(table: Table, grid: Grid, place: Place) -> list[dict[str, Any]]:
    """The embedding map of each condition's best choice, at its first finished seed."""
    found = []
    for condition in table.conditions:
        order = table.ranked(condition)
        if not order:
            continue
        own = table.rows[(table.rows["condition"] == condition) & (table.rows["choice"] == order[0][0])]
        run = read_run(place.out / "cells" / own["cell"].iloc[0])
        found.append({"title": ", ".join(filter(None, (condition, order[0][0]))), "figures": of_a_run.maps(run)})
    return found


def as_json(table: Table) -> str:
    """The ranking for scripts: {condition: [{"choice", "auc", "half", "seeds"}]}, the best first."""
    return json.dumps(
        {
            condition: [
                {
                    "choice": name,
                    "auc": round(m.value, 4),
                    "half": None if m.half != m.half else round(m.half, 4),
                    "seeds": m.seeds,
                }
                for name, m in table.ranked(condition)
            ]
            for condition in table.conditions
        },
        indent=2,
    )
