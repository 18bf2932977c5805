"""The comparison as a forest plot: AUC and interval of every encoder, one above the other."""

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from polyclinic.report.plots import RIGHT, palette
from polyclinic.report.run import Run
from polyclinic.report.svg import CHARACTER, WIDTH, Axis, dots, drawing, element, line, text, tick_text
from polyclinic.report.words import ALONE, row_name

MANY = 12
"""Single sites above which they share one row."""
ROW = 27


def forest(run: Run) -> Markup:
    """AUC and interval of every row, one above the other; the mean single site as a line through them."""
    rows, colours = run.comparison, palette(run.sites)
    values = [row[key] for row in rows.values() for key in ("auc", "auc_low", "auc_high") if key in row] + [0.5]
    axis = Axis(max(0.0, min(values) - 0.03), min(1.0, max(values) + 0.03), 148, RIGHT - 40)
    together = len(run.alone) > MANY
    shown = [name for name in rows if not (together and name in run.alone)]
    strip = [name for name in rows if name in run.alone] if together else []
    top = 10 if run.mean_alone is None else 30
    if strip:
        shown.insert(next((k for k, name in enumerate(shown) if name in ("federated", "pooled")), len(shown)), ALONE)
    bottom = top + ROW * len(shown)
    marks = [_vertical(axis, top, bottom), _mean_line(run, axis, top, bottom)]
    for place, name in enumerate(shown):
        y = top + ROW * (place + 0.5)
        if name == ALONE:
            marks.append(_strip(axis, [rows[n]["auc"] for n in strip], y, f"{len(strip)} sites alone"))
        else:
            marks.append(_interval(axis, name, rows[name], y, colours.get(name.removeprefix(ALONE), "")))
    return drawing(bottom + 34, "AUC of every encoder with its 95 % interval", *marks)


def _interval(axis: Axis, name: str, row: Mapping[str, float], y: float, colour: str) -> Markup:
    """One row: name, interval, point, value."""
    kind = "row federated" if name == "federated" else "row"
    mid, ends = axis.at(row["auc"]), [axis.at(row[key]) for key in ("auc_low", "auc_high") if key in row]
    style = f"--c:{colour}" if colour else ""
    band = element("rect", x=2, y=y - ROW / 2, width=WIDTH - 4, height=ROW, rx=5, class_="band")
    hover = f"{row_name(name)}: {row['auc']:.3f}"
    hover += f" ({row['auc_low']:.3f} to {row['auc_high']:.3f})" if ends else ""
    parts = [
        element("title", hover),
        band,
        text(axis.start - 12, y + 4, _cut(row_name(name), 18), "end", "name"),
        *([line(ends[0], y, ends[1], y, "whisker")] if ends else []),
        element("circle", cx=mid, cy=y, r=5, class_="point"),
        text(RIGHT - 2, y + 4, f"{row['auc']:.3f}", "end", "value"),
    ]
    return element("g", *parts, class_=kind, style=style)


def _strip(axis: Axis, areas: list[float], y: float, name: str) -> Markup:
    """One row for many sites: a dot each."""
    points = dots([(axis.at(area), y) for area in areas])
    mean = f"{np.mean(areas):.3f}"
    return element(
        "g",
        element("title", f"{name}: {min(areas):.3f} to {max(areas):.3f}, mean {mean}"),
        text(axis.start - 12, y + 4, name, "end", "name"),
        element("path", d=points, class_="strip"),
        text(RIGHT - 2, y + 4, mean, "end", "value"),
        class_="row",
    )


def _mean_line(run: Run, axis: Axis, top: float, bottom: float) -> Markup:
    if run.mean_alone is None:
        return Markup("")
    x = axis.at(run.mean_alone)
    words = f"mean single site {run.mean_alone:.3f}"
    half = len(words) * CHARACTER / 2
    label = text(min(max(x, half), WIDTH - half), top - 12, words, "middle", "mean")
    return line(x, top - 6, x, bottom, "mean") + label


def _vertical(axis: Axis, top: float, bottom: float) -> Markup:
    """Grid of the comparison: AUC along the bottom, chance as a firmer line."""
    marks = [line(axis.at(v), top, axis.at(v), bottom, "grid") for v in axis.ticks()]
    marks.append(line(axis.at(0.5), top, axis.at(0.5), bottom, "chance"))
    marks += [text(axis.at(v), bottom + 15, tick_text(v), "middle") for v in axis.ticks()]
    marks.append(text((axis.start + axis.end) / 2, bottom + 30, "AUC (0.5 is chance)", "middle", "axis"))
    return Markup("").join(marks)


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"
