"""What the page of a sweep shows: from the tidy table to rows and plots. Every mean is over seeds."""

import itertools
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
POOLED = "#222222"
MEAN_ALONE = "mean single site"
MOST_SITES = 12
"""Of a matrix that can be read."""

Line = tuple[str, list["Mean"]]
"""(a choice in words, its figures)."""


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


Values = tuple[str, ...]
"""Of some axes, in their order."""


class Table:
    """The tidy table of a grid, as rows, conditions and choices.

    Attributes:
        metric: by which choices are ranked: the classifier's AUC where one was fine-tuned, or else the probe's.
        conditions, choices: those that are there, in the order of the grid; one alone, (), where nothing varies.
    """

    def __init__(self, rows: pd.DataFrame, grid: Grid) -> None:
        self.rows, self._grid = rows, grid
        self._away = {cell.name: cell.study.simulation.held_out for cell in grid.cells}
        ours = rows[rows["row"] == FEDERATED]
        self.metric = "classifier_auc" if (ours["metric"] == "classifier_auc").any() else "auc"
        self.conditions = _in_order(ours, grid, grid.conditions)
        self.choices = _in_order(ours, grid, grid.choices)
        self._colours = dict(zip(self.choices, COLOURS, strict=False)) if len(self.choices) <= len(COLOURS) else {}

    def is_held_out(self, cell: str, site: str) -> bool:
        """Whether a site took no part in a cell."""
        return site in self._away[cell]

    def named(self, condition: Values) -> str:
        """A condition in words; "" where there is but one."""
        return _in_words(self._grid.conditions, condition)

    def name(self, choice: Values) -> str:
        """A choice in words."""
        return _in_words(self._grid.choices, choice) or FEDERATED

    def colour(self, choice: Values) -> str:
        """Of a choice in all plots."""
        return str(self._colours.get(choice, OTHER))

    def of(self, condition: Values, choice: Values | None = None) -> pd.DataFrame:
        """The rows under a condition (and of a choice), with those that do not depend on all of it."""
        wanted = dict(zip(self._grid.conditions, condition, strict=True))
        wanted |= dict(zip(self._grid.choices, choice, strict=True)) if choice is not None else {}
        kept = pd.Series(True, self.rows.index)
        for axis, value in wanted.items():
            kept &= self.rows[axis].isin([value, ""])
        return self.rows[kept]

    def by_seed(self, condition: Values, choice: Values, row: str, metric: str, **where: Any) -> "pd.Series[float]":
        """(seeds,) of one row; `where` says at which site, or with which part of the labels."""
        found = self.of(condition, choice)
        for column, value in {"row": row, "metric": metric, "site": "", "label_fraction": 1.0, **where}.items():
            found = found[found[column] == value]
        return found.groupby(SEED)["value"].mean()

    def ranked(self, condition: Values) -> list[tuple[Values, Mean]]:
        """The choices under a condition, the best first; last, those that could not be trained with every seed."""
        found = [(choice, mean(self.by_seed(condition, choice, FEDERATED, self.metric))) for choice in self.choices]
        return sorted((pair for pair in found if pair[1].seeds), key=lambda pair: (-pair[1].seeds, -pair[1].value))

    def other_rows(self, condition: Values) -> list[tuple[str, Mean]]:
        """The rows beside `federated`, single sites as their mean; several, where choices change them."""
        own = self.of(condition)
        own = own[(own["row"] != FEDERATED) & (own["metric"] == self.metric) & (own["site"] == "")]
        own = own[own["label_fraction"] == 1]
        own = own.assign(row=[MEAN_ALONE if row.startswith(ALONE) else row for row in own["row"]])
        found = []
        for name, rows in own.groupby("row", sort=False):
            choices = _values(rows, self._grid.choices)
            for choice in choices:
                kept = rows[(rows[self._grid.choices] == list(choice)).all(axis=1)]
                more = _in_words(self._grid.choices, choice) if len(choices) > 1 else ""
                value = mean(kept.groupby(SEED)["value"].mean())
                found.append((", ".join(filter(None, (row_name(str(name)), more))), value))
        return sorted(found, key=lambda pair: -pair[1].value)


def _in_order(rows: pd.DataFrame, grid: Grid, axes: list[str]) -> list[Values]:
    """The combinations of values that there are, in the order of the grid."""
    there = set(_values(rows, axes))
    return [values for values in itertools.product(*(grid.axes[axis] for axis in axes)) if values in there]


def _values(rows: pd.DataFrame, axes: list[str]) -> list[Values]:
    return list(dict.fromkeys(map(tuple, rows[axes].to_numpy().tolist())))


def _in_words(axes: Sequence[str], values: Values) -> str:
    return ", ".join(filter(None, (spoken(axis, value) for axis, value in zip(axes, values, strict=True))))


def spoken(axis: str, value: str) -> str:
    """
    >>> spoken("rule", "median"), spoken("severity", "0.5"), spoken("encoder.norm", "batch"), spoken("rule", "")
    ('median', 'severity 0.5', 'norm batch', '')
    """
    named = "." not in axis and axis != "severity"
    return str(value) if named or not value else f"{axis.rpartition('.')[2]} {value}"


def forest(table: Table, condition: Values) -> Markup:
    """The ranking as a plot: choices in colour, other rows in grey, each with its interval over seeds."""
    rows = [(table.name(choice), found, table.colour(choice)) for choice, found in table.ranked(condition)]
    rows += [(name, found, "") for name, found in table.other_rows(condition)]
    rows.sort(key=lambda row: -row[1].value)
    ends = [v for _, m, _ in rows for v in (m.value, m.value - m.half, m.value + m.half) if not math.isnan(v)]
    left = 16 + NAME * min(LONGEST, max(len(name) for name, _, _ in rows))
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
        element("title", f"{name}: {found}"),
        text(axis.start - 10, y + 4, _cut(name), "end", "name"),
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
    apart = min(5.0, 0.6 * (RIGHT - left) / len(places) / len(series))
    for number, (name, values) in enumerate(series.items()):
        shift = apart * (number - (len(series) - 1) / 2)
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
                element("title", name),
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
    names = {condition: table.named(condition) for condition in table.conditions}
    series: dict[str, dict[str, Mean]] = {table.name(choice): {} for choice in table.choices}
    colours = {table.name(choice): table.colour(choice) for choice in table.choices}
    colours |= {row_name("pooled"): POOLED, MEAN_ALONE: OTHER}
    for condition in table.conditions:
        for choice, found in table.ranked(condition):
            series[table.name(choice)][names[condition]] = found
        for name, found in table.other_rows(condition):
            if name in (row_name("pooled"), MEAN_ALONE):
                series.setdefault(name, {})[names[condition]] = found
    series = {name: values for name, values in series.items() if values}
    if len(names) < 2 or not series:
        return None
    svg = lines(series, list(names.values()), colours, "AUC by condition")
    note = "Mean AUC over seeds, with 95 % intervals."
    return Figure("From condition to condition", note, svg, [(name, colours[name]) for name in series])


def cost_of_conditions(table: Table) -> list[dict[str, Any]]:
    """A line a condition after the first, row and choice: AUC there, in the first, and what is lost, seed by seed."""
    found = []
    for condition in table.conditions[1:]:
        for row in (FEDERATED, "pooled"):
            lines: list[Line] = []
            for choice, _ in table.ranked(condition):
                at = [table.by_seed(place, choice, row, table.metric) for place in (table.conditions[0], condition)]
                before, after = pd.concat(at, axis=1, join="inner").dropna().T.to_numpy()
                lines.append((table.name(choice), [mean(before), mean(after), mean(before - after)]))
            found += _lines_of(table.named(condition), row, lines)
    return found


def label_efficiency(table: Table, condition: Values) -> Figure | None:
    """AUC of the probe against the part of the labels that it learns from."""
    own = table.of(condition)
    own = own[(own["metric"] == "auc") & (own["site"] == "")]
    fractions, order = sorted(own["label_fraction"].unique()), table.ranked(condition)
    if len(fractions) < 2 or not order:
        return None
    shown = {table.name(c): (FEDERATED, c, table.colour(c)) for c, _ in order[: len(COLOURS) - 2]}
    shown |= {row_name("pooled"): ("pooled", order[0][0], POOLED), row_name("random"): ("random", order[0][0], OTHER)}
    series: dict[str, dict[str, Mean]] = {}
    for name, (row, choice, _) in shown.items():
        found = {f"{f:.0%}": mean(table.by_seed(condition, choice, row, "auc", label_fraction=f)) for f in fractions}
        if kept := {fraction: value for fraction, value in found.items() if value.seeds}:
            series[name] = kept
    if not series:
        return None
    colours = {name: colour for name, (_, _, colour) in shown.items()}
    svg = lines(series, [f"{f:.0%}" for f in fractions], colours, "AUC by part of the labels")
    note = "AUC of a linear probe that learns from this part of the training patients' labels."
    title = table.named(condition) or "Labels"
    return Figure(title, note, svg, [(name, colours[name]) for name in series])


def matrix(table: Table, condition: Values) -> dict[str, Any] | None:
    """Site x site: trained where the row says, measured where the column says; means over seeds, with their shades."""
    order, own = table.ranked(condition), table.of(condition)
    own = own[own["metric"].isin(["auc", "auc_own_probe"]) & (own["site"] != "")]
    sites = sorted(set(own["site"]))
    alone = [row for row in dict.fromkeys(own["row"]) if row.startswith(ALONE)]
    if not alone or not order or len(sites) > MOST_SITES:
        return None
    best = order[0][0]
    asked = [(row_name(row), row, "auc_own_probe") for row in alone]
    asked += [(f"federated: {table.name(best)}", FEDERATED, "auc"), (row_name("pooled"), "pooled", "auc")]
    cells = [
        (name, [mean(table.by_seed(condition, best, row, metric, site=site)) for site in sites])
        for name, row, metric in asked
    ]
    values = [m.value for _, row in cells for m in row if m.seeds]
    if not values:
        return None
    low, high = min(values), max(values)
    shaded = [
        (name, [(f"{m.value:.3f}", (m.value - low) / (high - low or 1)) if m.seeds else ("–", 0.0) for m in row])
        for name, row in cells
        if any(m.seeds for m in row)
    ]
    return {"sites": sites, "rows": shaded}


def fairness(table: Table) -> list[dict[str, Any]]:
    """A line a condition and choice: mean over sites, the worst site and the spread between sites, means over seeds.

    `worst` is the site that most seeds have as their worst, "" where there is no such site; `sites`, those that a seed
    measures.
    """
    found = []
    for condition in table.conditions:
        for choice, _ in table.ranked(condition):
            own = table.of(condition, choice)
            own = own[(own["row"] == FEDERATED) & (own["metric"] == "auc") & (own["site"] != "")]
            own = own[own.groupby(SEED)["site"].transform("nunique") > 1]  # or there is nothing to be fair between
            if own.empty:
                continue
            by_seed = own.groupby(SEED)["value"]
            worst = own.loc[by_seed.idxmin(), "site"].value_counts()
            often = worst.index[0] if len(worst) == 1 or worst.iloc[0] > worst.iloc[1] else ""
            counts = by_seed.size()
            figures = [mean(by_seed.mean()), mean(by_seed.min()), mean(by_seed.max() - by_seed.min())]
            sites = str(counts.min()) + (f" to {counts.max()}" if counts.min() < counts.max() else "")
            found.append({**_of(table, condition, choice), "figures": figures, "worst": often, "sites": sites})
    return found


def held_out(table: Table, metric: str) -> list[dict[str, Any]]:
    """A line a condition, choice and row: mean AUC at sites that train, at those held out, and the gap between them.

    Of the seeds that have both. A row that is the same whatever is chosen has one line, without a choice.
    """
    own = table.rows[(table.rows["metric"] == metric) & (table.rows["site"] != "")]
    own = own[[table.is_held_out(cell, site) for cell, site in zip(own["cell"], own["site"], strict=True)]]
    found = []
    for condition in table.conditions if len(own) else []:
        for name in own["row"].unique():
            lines: list[Line] = []
            for choice, _ in table.ranked(condition):
                rows = table.of(condition, choice)
                at = rows[(rows["metric"] == metric) & (rows["site"] != "") & (rows["row"] == name)]
                by_seed = at.groupby([SEED, at.index.isin(own.index)])["value"].mean().unstack()
                inside, outside = by_seed.reindex(columns=[False, True]).dropna().T.to_numpy()
                lines.append((table.name(choice), [mean(inside), mean(outside), mean(inside - outside)]))
            found += _lines_of(table.named(condition), name, lines)
    return found


def _lines_of(condition: str, row: str, lines: list[Line]) -> list[dict[str, Any]]:
    """What was measured of a row, a line a choice; one for a row beside `federated` that is the same for all."""
    if row != FEDERATED and len({tuple(m.value for m in figures) for _, figures in lines}) == 1:
        lines = [("", lines[0][1])]
    return [
        {"condition": condition, "choice": choice, "row": row_name(row), "figures": figures}
        for choice, figures in lines
        if figures[-1].seeds
    ]


def sites_told_apart(table: Table) -> list[dict[str, Any]]:
    """A line a condition and choice: AUC by which sites are told apart, before (pixels, untrained) and after."""
    found = []
    for condition in table.conditions:
        for choice, _ in table.ranked(condition):
            rows = ("pixels", "random", FEDERATED)
            figures = [mean(table.by_seed(condition, choice, row, "site_auc")) for row in rows]
            if figures[-1].seeds:
                found.append({**_of(table, condition, choice), "figures": figures})
    return found


def costs(table: Table) -> list[dict[str, Any]]:
    """A line a condition and choice: rounds, bytes to and from all sites, seconds that sites worked, and of clocks."""
    names = ("rounds", "bytes_down", "bytes_up", "site_seconds", "wall_s", "virtual_s")
    found = []
    for condition in table.conditions:
        for choice, _ in table.ranked(condition):
            figures = {name: mean(table.by_seed(condition, choice, FEDERATED, name)) for name in names}
            found.append({**_of(table, condition, choice), **{n: m.value for n, m in figures.items() if m.seeds}})
    return found


def _of(table: Table, condition: Values, choice: Values) -> dict[str, str]:
    return {"condition": table.named(condition), "choice": table.name(choice)}


def behind(table: Table, condition: Values) -> dict[str, Mean]:
    """How far each choice is behind the best under a condition, and the rows `pooled` and `scratch`, seed by seed.

    Without those that share no seed with the best.
    """
    order = table.ranked(condition)
    if not order:
        return {}
    best = order[0][0]
    ours = table.by_seed(condition, best, FEDERATED, table.metric)
    others = {table.name(c): table.by_seed(condition, c, FEDERATED, table.metric) for c, _ in order[1:]}
    others |= {row: table.by_seed(condition, best, row, table.metric) for row in ("pooled", "scratch")}
    gaps = {name: mean((ours - other).dropna()) for name, other in others.items()}
    return {name: gap for name, gap in gaps.items() if gap.seeds}
