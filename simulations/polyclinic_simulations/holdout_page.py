"""holdout.html: how many labels a hospital needs that took no part, from each start."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from polyclinic.report.plots import BOTTOM, COLOURS, HEIGHT, RIGHT
from polyclinic.report.svg import CHARACTER, Axis, dots, drawing, element, line, polyline, text, tick_text
from polyclinic_simulations.display import labels_needed

MEANING = {
    "pretrained": "pretrained at the other sites",
    "joined": "pretrained with the site's own unlabelled images, too",
    "supervised": "not pretrained",
}
LINES = dict(zip(MEANING, COLOURS, strict=False))


def render_holdout(study: str, rows: pd.DataFrame, needed: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of holdout.csv (`rows`) and of what the summary says of each site."""
    sites = [
        {"name": name, "facts": facts, "plot": plot(rows, name), "starts": _table(facts)}
        for name, facts in needed.items()
    ]
    environment = Environment(
        loader=PackageLoader("polyclinic_simulations", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    legend = [(meaning, LINES[start]) for start, meaning in MEANING.items()]
    return environment.get_template("holdout.html.j2").render(study=study, sites=sites, legend=legend)


def _table(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line a start: AUC at the other sites, and here without a label; the labels that it needs."""
    lines = []
    for start, meaning in MEANING.items():
        if "in_distribution" not in facts:
            break
        figures = {scope: facts[scope][start] for scope in ("in_distribution", "zero_shot")}
        shown = {scope: "not measurable" if v is None else f"{v:.3f}" for scope, v in figures.items()}
        lines.append({"start": meaning, **shown, "needed": labels_needed(facts, start)})
    return lines


def plot(rows: pd.DataFrame, site: str) -> Markup:
    """AUC on a site's test patients against the fraction of its labels, with 95 % over patients, a curve a start."""
    own = rows[(rows["held_out"] == site) & (rows["scope"] == "held-out")] if len(rows) else rows
    if own.empty:
        return Markup("")
    fractions = sorted(own["label_fraction"].unique())
    y = Axis(max(0.0, own["auc_low"].min() - 0.02), min(1.0, own["auc_high"].max() + 0.02), BOTTOM, 12)
    left = 12 + CHARACTER * max(len(tick_text(v)) for v in y.ticks())
    x = Axis(-0.5, len(fractions) - 0.5, left, RIGHT)
    marks = [line(left, y.at(v), RIGHT, y.at(v), "grid") for v in y.ticks()]
    marks += [text(left - 6, y.at(v) + 4, tick_text(v), "end") for v in y.ticks()]
    marks += [text(x.at(k), BOTTOM + 17, f"{fraction:.0%}", "middle") for k, fraction in enumerate(fractions)]
    marks.append(text(RIGHT, BOTTOM + 33, "of the site's labels", "end"))
    for place, (start, colour) in enumerate(LINES.items()):
        found = own[own["start"] == start].sort_values("label_fraction")
        at = [x.at(fractions.index(f)) + 5 * (place - 1) for f in found["label_fraction"]]
        whiskers = [
            line(a, y.at(low), a, y.at(high), "whisker")
            for a, low, high in zip(at, found["auc_low"], found["auc_high"], strict=True)
        ]
        places = [(a, y.at(value)) for a, value in zip(at, found["auc"], strict=True)]
        drawn = [element("path", d=polyline(places), class_="line"), element("path", d=dots(places), class_="dots")]
        marks.append(element("g", element("title", MEANING[start]), *whiskers, *drawn, style=f"--c:{colour}"))
    return drawing(HEIGHT, "AUC by fraction of the labels", *marks)
