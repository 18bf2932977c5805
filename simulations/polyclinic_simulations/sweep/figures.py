"""What the page of a sweep shows: from the tidy table to rows and plots. Every mean is over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy import stats

from polyclinic.report.plots import BOTTOM, COLOURS, HEIGHT, OTHER, RIGHT, Figure
from polyclinic.report.svg import (
    CHARACTER,
    Axis,
    dots,
    drawing,
    element,
    line,
    polyline,
    text,
    tick_text,
)
from polyclinic.report.words import ALONE, row_name
from polyclinic_simulations.sweep.grid import SEED, Grid

FEDERATED = "federated"
ROW = 27
NAME = 7.0
"""Mean width of a character of a row's name, units."""
LONGEST = 34
"""Characters of a name beside a plot."""
MOST_SITES = 12
"""Of a matrix that can be read."""


@dataclass(frozen=True)
class Mean:
    """Of a figure over seeds, with its 95 % interval by Student's t; of one seed there is none."""

    value: float
    half: float
    seeds: int

    def __str__(self) -> str:
        """
        >>> str(Mean(0.8125, 0.01, 3)), str(Mean(0.8125, math.nan, 1))
        ('0.812 ± 0.010', '0.812')
        """
        return f"{self.value:.3f}" + ("" if math.isnan(self.half) else f" ± {self.half:.3f}")


def mean(values: Iterable[float]) -> Mean:
    """The mean of one figure a seed."""
    found = np.array([v for v in values if not math.isnan(v)])
    n = len(found)
    half = float(stats.t.ppf(0.975, n - 1) * found.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Mean(float(found.mean()) if n else math.nan, half, n)


class Table:
    """The tidy table of a grid, with its choices and conditions in words.

    Attributes:
        metric: by which choices are ranked: the classifier's AUC where one was fine-tuned, or else the probe's.
        conditions, choices: their names, in the order of the grid; one alone, "", where nothing of the kind varies.
    """

    def __init__(self, rows: pd.DataFrame, grid: Grid) -> None:
        self.rows = rows.assign(
            condition=_joined(rows, grid.conditions),
            choice=_joined(rows, grid.choices),
        )
        kept = rows.loc[rows["row"] == FEDERATED, "metric"]
        self.metric = "classifier_auc" if (kept == "classifier_auc").any() else "auc"
        self.choices = list(dict.fromkeys(self.rows.loc[self.rows["row"] == FEDERATED, "choice"]))
        self.conditions = list(dict.fromkeys(self.rows.loc[self.rows["row"] == FEDERATED, "condition"]))
        self.colours = dict(zip(self.choices, COLOURS, strict=False)) if len(self.choices) <= len(COLOURS) else {}

    def under(self, condition: str) -> pd.DataFrame:
        """The rows of a condition, with those that depend on none of it, or on a part."""
        exact, others = self.rows["condition"] == condition, self.rows["row"] != FEDERATED
        return self.rows[exact | (others & _fits(self.rows["condition"], condition))]

    def by_seed(
        self, condition: str, row: str, metric: str, choice: str | None = None, **where: Any
    ) -> "pd.Series[float]":
        """(seeds,) of one row under a condition; of a row that several choices trained, of theirs together."""
        own = self.under(condition)
        found = own[(own["row"] == row) & (own["metric"] == metric)]
        for column, value in {"site": "", "label_fraction": 1.0, **where}.items():
            found = found[found[column] == value]
        if choice is not None:
            exact = found["choice"] == choice
            found = found[exact] if exact.any() else found[_fits(found["choice"], choice)]
        return found.groupby(SEED)["value"].mean()

    def colour(self, choice: str) -> str:
        """Of a choice in all plots."""
        return str(self.colours.get(choice, OTHER))

    def ranked(self, condition: str) -> list[tuple[str, Mean]]:
        """The choices under a condition, the best first."""
        found = [(choice, mean(self.by_seed(condition, FEDERATED, self.metric, choice))) for choice in self.choices]
        return sorted((pair for pair in found if pair[1].seeds), key=lambda pair: -pair[1].value)

    def other_rows(self, condition: str) -> list[tuple[str, Mean]]:
        """The rows beside `federated`, single sites as their mean."""
        own = self.under(condition)
        names = [str(row) for row in dict.fromkeys(own["row"]) if row != FEDERATED]
        plain = [(row_name(r), mean(self.by_seed(condition, r, self.metric))) for r in names if ALONE not in r]
        alone = [self.by_seed(condition, r, self.metric) for r in names if r.startswith(ALONE)]
        if alone:
            plain.append(("mean single site", mean(pd.concat(alone, axis=1).mean(axis=1))))
        return sorted((pair for pair in plain if pair[1].seeds), key=lambda pair: -pair[1].value)


def _joined(rows: pd.DataFrame, axes: Sequence[str]) -> pd.Series:
    """What an axis says by itself stands as it is; numbers and the like get the axis's last name before them."""
    words = [[spoken(axis, value) for value in rows[axis]] for axis in axes]
    return pd.Series(
        [", ".join(filter(None, parts)) for parts in zip(*words, strict=True)] if words else "", rows.index
    )


def spoken(axis: str, value: str) -> str:
    """
    >>> spoken("rule", "median"), spoken("severity", "0.5"), spoken("encoder.norm", "batch"), spoken("rule", "")
    ('median', 'severity 0.5', 'norm batch', '')
    """
    named = "." not in axis and axis != "severity"
    return str(value) if named or not value else f"{axis.rpartition('.')[2]} {value}"


def _fits(choices: pd.Series, choice: str) -> pd.Series:
    """Of rows that do not depend on all axes of a choice: those whose own are all in it."""
    wanted = set(choice.split(", "))
    return choices.map(lambda own: set(filter(None, own.split(", "))) <= wanted)


def forest(table: Table, condition: str) -> Markup:
    """The ranking as a plot: choices in colour, other rows in grey, each with its interval over seeds."""
    rows = [(name, found, table.colour(name)) for name, found in table.ranked(condition)]
    rows += [(name, found, "") for name, found in table.other_rows(condition)]
    rows.sort(key=lambda row: -row[1].value)
    ends = [v for _, m, _ in rows for v in (m.value, m.value - m.half, m.value + m.half) if not math.isnan(v)]
    left = 16 + NAME * min(LONGEST, max(len(name or FEDERATED) for name, _, _ in rows))
    axis = Axis(max(0.0, min(ends) - 0.02), min(1.0, max(ends) + 0.02), left, RIGHT - 44)
    bottom = 10 + ROW * len(rows)
    marks = [line(axis.at(v), 10, axis.at(v), bottom, "grid") for v in axis.ticks()]
    marks += [text(axis.at(v), bottom + 15, tick_text(v), "middle") for v in axis.ticks()]
    marks.append(text((axis.start + axis.end) / 2, bottom + 30, "AUC", "middle", "axis"))
    marks += [_interval(axis, row, 10 + ROW * (place + 0.5)) for place, row in enumerate(rows)]
    return drawing(bottom + 34, "AUC of every choice, mean over seeds with its 95 % interval", *marks)


def _interval(axis: Axis, row: tuple[str, Mean, str], y: float) -> Markup:
    name, found, colour = row
    parts = [
        element("title", f"{name or FEDERATED}: {found}"),
        text(axis.start - 10, y + 4, _cut(name or FEDERATED), "end", "name"),
    ]
    if not math.isnan(found.half):
        parts.append(line(axis.at(found.value - found.half), y, axis.at(found.value + found.half), y, "whisker"))
    parts.append(element("circle", cx=axis.at(found.value), cy=y, r=5, class_="point"))
    parts.append(text(RIGHT - 2, y + 4, f"{found.value:.3f}", "end", "value"))
    return element("g", *parts, class_="row", style=f"--c:{colour}" if colour else "")


def _cut(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def lines(
    series: Mapping[str, Mapping[str, Mean]], places: Sequence[str], colours: Mapping[str, str], label: str
) -> Markup:
    """A line a name over places in a row, {name: {place: mean}}, with intervals over seeds."""
    found = [m for values in series.values() for m in values.values()]
    ends = [v for m in found for v in (m.value, m.value - m.half, m.value + m.half) if not math.isnan(v)]
    y = Axis(max(0.0, min(ends) - 0.02), min(1.0, max(ends) + 0.02), BOTTOM, 12)
    left = 12 + CHARACTER * max(len(tick_text(v)) for v in y.ticks())
    x = Axis(-0.5, len(places) - 0.5, left, RIGHT)
    marks = [line(left, y.at(v), RIGHT, y.at(v), "grid") for v in y.ticks()]
    marks += [text(left - 6, y.at(v) + 4, tick_text(v), "end") for v in y.ticks()]
    width = (RIGHT - left) / len(places) / CHARACTER
    marks += [text(x.at(k), BOTTOM + 17, _fit(place, width), "middle") for k, place in enumerate(places)]
    for number, (name, values) in enumerate(series.items()):
        shift = 5 * (number - (len(series) - 1) / 2)
        at = [(x.at(places.index(place)) + shift, m) for place, m in values.items()]
        whiskers = [
            line(a, y.at(m.value - m.half), a, y.at(m.value + m.half), "whisker")
            for a, m in at
            if not math.isnan(m.half)
        ]
        points = [(a, y.at(m.value)) for a, m in at]
        drawn = [element("path", d=polyline(points), class_="line"), element("path", d=dots(points), class_="dots")]
        marks.append(
            element(
                "g",
                element("title", name or FEDERATED),
                *whiskers,
                *drawn,
                class_="curve",
                style=f"--c:{colours[name]}",
            )
        )
    return drawing(HEIGHT, label, *marks)


def _fit(words: str, most: float) -> str:
    return words if len(words) <= most else f"{words[: max(int(most) - 1, 1)]}…"


def across(table: Table) -> Figure | None:
    """How the choices fare from condition to condition."""
    if len(table.conditions) < 2:
        return None
    series = {
        choice: {c: m for c in table.conditions if (m := mean(table.by_seed(c, FEDERATED, table.metric, choice))).seeds}
        for choice in table.choices
    }
    extra = {"pooled": "#222222", "mean single site": OTHER}
    for name in extra:
        own = {c: m for c in table.conditions for n, m in table.other_rows(c) if n == row_name(name) or n == name}
        series |= {name: own} if own else {}
    colours = {**{choice: table.colour(choice) for choice in table.choices}, **extra}
    svg = lines(series, table.conditions, colours, "AUC by condition")
    legend = [(row_name(name) or FEDERATED, colours[name]) for name in series]
    return Figure("From condition to condition", "Mean AUC over seeds, with 95 % intervals.", svg, legend)


def label_efficiency(table: Table, condition: str) -> Figure | None:
    """AUC of the probe against the part of the labels that it learns from."""
    own = table.under(condition)
    own = own[(own["metric"] == "auc") & (own["site"] == "")]
    fractions = sorted(own["label_fraction"].unique())
    if len(fractions) < 2:
        return None
    names: dict[str, tuple[str, str | None]] = {
        choice: (FEDERATED, choice) for choice, _ in table.ranked(condition)[: len(COLOURS) - 2]
    }
    names |= {row: (row, None) for row in ("pooled", "random") if row in set(own["row"])}
    colours = {**{c: table.colour(c) for c in table.choices}, "pooled": "#222222", "random": OTHER}
    series = {
        name: {
            f"{f:.0%}": m
            for f in fractions
            if (m := mean(table.by_seed(condition, row, "auc", choice, label_fraction=f))).seeds
        }
        for name, (row, choice) in names.items()
    }
    svg = lines(series, [f"{f:.0%}" for f in fractions], colours, "AUC by part of the labels")
    note = "AUC of a linear probe that learns from this part of the training patients' labels."
    return Figure(condition or "Labels", note, svg, [(row_name(n) or FEDERATED, colours[n]) for n in series])


def matrix(table: Table, condition: str) -> dict[str, Any] | None:
    """Site × site: trained where the row says, measured where the column says; means over seeds, with their shades."""
    own = table.under(condition)
    own = own[own["metric"].isin(["auc", "auc_own_probe"]) & (own["site"] != "")]
    sites = list(dict.fromkeys(own["site"]))
    alone = [row for row in dict.fromkeys(own["row"]) if row.startswith(ALONE)]
    if not alone or len(sites) > MOST_SITES:
        return None
    lines_of: list[tuple[str, str, str, str | None]] = [(row_name(row), row, "auc_own_probe", None) for row in alone]
    lines_of += [
        (f"federated: {name}" if name else FEDERATED, FEDERATED, "auc", name) for name, _ in table.ranked(condition)[:1]
    ]
    lines_of += [(row_name("pooled"), "pooled", "auc", None)] if "pooled" in set(own["row"]) else []
    cells = [
        (name, [mean(table.by_seed(condition, row, metric, choice, site=site)) for site in sites])
        for name, row, metric, choice in lines_of
    ]
    values = [m.value for _, row in cells for m in row if m.seeds]
    low, high = min(values), max(values)
    shaded = [
        (name, [(f"{m.value:.3f}", (m.value - low) / (high - low or 1)) if m.seeds else ("–", 0.0) for m in row])
        for name, row in cells
    ]
    return {"condition": condition, "sites": sites, "rows": shaded}


def fairness(table: Table) -> list[dict[str, Any]]:
    """A line a condition and choice: mean over sites, the worst site and the spread between sites, means over seeds."""
    found = []
    for condition in table.conditions:
        for choice, _ in table.ranked(condition):
            own = table.rows[
                (table.rows["condition"] == condition)
                & (table.rows["choice"] == choice)
                & (table.rows["row"] == FEDERATED)
                & (table.rows["metric"] == "auc")
                & (table.rows["site"] != "")
            ]
            by_seed = own.groupby(SEED)["value"]
            if own.empty:
                continue
            worst = own.groupby("site")["value"].mean().idxmin()
            figures = [mean(by_seed.mean()), mean(by_seed.min()), mean(by_seed.max() - by_seed.min())]
            found.append({"condition": condition, "choice": choice or FEDERATED, "figures": figures, "worst": worst})
    return found


def sites_told_apart(table: Table) -> list[dict[str, Any]]:
    """A line a condition: AUC by which sites are told apart, before (pixels, untrained) and after (each choice)."""
    found = []
    for condition in table.conditions:
        before = [mean(table.by_seed(condition, row, "site_auc")) for row in ("pixels", "random")]
        after = [(c, mean(table.by_seed(condition, FEDERATED, "site_auc", c))) for c, _ in table.ranked(condition)]
        found += [
            {"condition": condition, "choice": choice or FEDERATED, "figures": [*before, m]}
            for choice, m in after
            if m.seeds
        ]
    return found


def costs(table: Table) -> list[dict[str, Any]]:
    """A line a choice: megabytes to and from all sites, seconds that sites worked, and the run's own time."""
    own = table.rows[table.rows["row"] == FEDERATED]
    return [
        {
            "choice": choice or FEDERATED,
            **{
                name: own.loc[(own["choice"] == choice) & (own["metric"] == name), "value"].mean()
                for name in ("rounds", "bytes_down", "bytes_up", "site_seconds", "wall_s")
            },
        }
        for choice in table.choices
    ]


def behind(table: Table, condition: str) -> list[tuple[str, Mean]]:
    """How far each choice is behind the best under a condition, and the best behind pooled, seed by seed."""
    order = table.ranked(condition)
    if not order:
        return []
    best = table.by_seed(condition, FEDERATED, table.metric, order[0][0])
    gaps = [(c, mean(best - table.by_seed(condition, FEDERATED, table.metric, c))) for c, _ in order[1:]]
    pooled = table.by_seed(condition, "pooled", table.metric)
    return [("pooled", mean((best - pooled).dropna())), *gaps] if len(pooled) else gaps
