"""Plots by round, and maps: functions from numbers to SVG. The colours of Okabe and Ito suit colour-blind eyes."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from polyclinic.report.run import Points
from polyclinic.report.svg import (
    CHARACTER,
    WIDTH,
    Axis,
    dots,
    drawing,
    element,
    line,
    polyline,
    span,
    text,
    tick_text,
)
from polyclinic.report.words import plural

COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2", "#F0E442")
LABEL_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#F0E442")
"""The same in another order: the first labels do not look like the first sites."""
OTHER = "#8C8C8C"
RIGHT = WIDTH - 10
"""Where the frames end, units."""
BOTTOM = 214
HEIGHT = 250
FEW_ROUNDS = 40
"""Up to which every round of a curve is marked by a dot."""

Place = tuple[float, float]
Stages = Sequence[tuple[int, str]]
"""(last round before, name) of every stage."""


@dataclass(frozen=True)
class Figure:
    """A plot with what stands around it; legend: (name, colour)."""

    title: str
    note: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


def palette(names: Iterable[str], colours: Sequence[str] = COLOURS) -> dict[str, str]:
    """A colour for every name, in order; all the same where there are more than can be told apart."""
    ordered = sorted(set(names))
    return dict(zip(ordered, colours, strict=False)) if len(ordered) <= len(colours) else dict.fromkeys(ordered, OTHER)


def curves(
    values: Mapping[str, Points],
    colours: Mapping[str, str],
    label: str,
    *,
    log: bool = False,
    threshold: float | None = None,
    stages: Stages = (),
) -> Markup:
    """One line a site over rounds, the consortium (site "") on top; of many sites, the range and its middle half.

    Below `threshold` the plot is shaded. `stages` are marked where there are several.
    """
    everything = [v for points in values.values() for _, v in points] + ([threshold * 0.7] if threshold else [])
    rounds = [r for points in values.values() for r, _ in points]
    y = Axis(*span(everything, log=log), BOTTOM, 12 if len(stages) < 2 else 26, log)
    left = 12 + CHARACTER * max(len(tick_text(v)) for v in y.ticks())
    alone = 0.5 if min(rounds) == max(rounds) else 0.0
    x = Axis(min(rounds) - alone, max(rounds) + alone, left + 8, RIGHT - 8)
    sites = {site: points for site, points in values.items() if site}
    parts = [_frame(x, y, left), _shade(y, left, threshold), _boundaries(x, y, stages)]
    if len(set(colours.values())) < len(sites):
        parts.append(_ranges(x, y, list(sites.values())))
    else:
        parts += [_curve(x, y, points, site, "site", colours.get(site, OTHER)) for site, points in sites.items()]
    if "" in values:
        parts.append(_curve(x, y, values[""], "consortium", "consortium", ""))
    return drawing(HEIGHT, label, *parts)


def _curve(x: Axis, y: Axis, points: Points, name: str, kind: str, colour: str) -> Markup:
    places = [(x.at(r), y.at(v)) for r, v in points]
    marks = [element("title", name), element("path", d=polyline(places), class_="line")]
    if len(places) <= FEW_ROUNDS:
        marks.append(element("path", d=dots(places), class_="dots"))
    return element("g", *marks, class_=f"curve {kind}", style=f"--c:{colour}" if colour else "")


def _ranges(x: Axis, y: Axis, sites: list[Points]) -> Markup:
    """Range over sites by round, and between the quartiles."""
    by_round: dict[int, list[float]] = {}
    for round, value in (point for points in sites for point in points):
        by_round.setdefault(round, []).append(value)
    rounds = sorted(by_round)
    bands = []
    for low, high, kind in ((0, 100, "range"), (25, 75, "range half")):
        lower, upper = ([float(np.percentile(by_round[r], q)) for r in rounds] for q in (low, high))
        edge = [(x.at(r), y.at(v)) for r, v in zip(rounds, lower, strict=True)]
        edge += [(x.at(r), y.at(v)) for r, v in zip(reversed(rounds), reversed(upper), strict=True)]
        bands.append(element("path", d=polyline(edge) + "Z", class_=kind))
    return Markup("").join(bands)


def _frame(x: Axis, y: Axis, left: float) -> Markup:
    """Horizontal grid with its values, rounds along the bottom."""
    marks = [line(left, y.at(v), RIGHT, y.at(v), "grid") for v in y.ticks()]
    marks += [text(left - 6, y.at(v) + 4, tick_text(v), "end") for v in y.ticks()]
    first = math.ceil(x.low)
    whole = [first, *(v for v in x.ticks() if v == round(v) and x.at(v) > x.at(first) + 24)]
    marks += [text(x.at(v), y.start + 17, tick_text(v), "middle") for v in whole]
    marks += [line(left, y.start, RIGHT, y.start, "base"), text(RIGHT, y.start + 33, "round", "end", "axis")]
    return Markup("").join(marks)


def _shade(y: Axis, left: float, threshold: float | None) -> Markup:
    if threshold is None:
        return Markup("")
    top = y.at(threshold)
    rect = element("rect", x=left, y=top, width=RIGHT - left, height=y.start - top, class_="danger")
    return rect + text(RIGHT - 6, top - 5, f"collapsed below {tick_text(threshold)}", "end", "danger")


def _boundaries(x: Axis, y: Axis, stages: Stages) -> Markup:
    """A line between stages, each with its name."""
    if len(stages) < 2:
        return Markup("")
    marks = []
    for before, name in stages:
        if before >= x.high:
            break
        at = x.at(before + 0.5) if before else x.start
        marks += [line(at, y.end - 16, at, y.start, "stage")] if before else []
        marks.append(text(at + 4, y.end - 6, name, "start", "stage"))
    return Markup("").join(marks)


def bars(parts: Sequence[tuple[str, Points, str]], label: str) -> Markup:
    """One bar a round, stacked of (name, points, colour)."""
    totals: dict[int, float] = defaultdict(float)
    for round, value in (point for _, points, _ in parts for point in points):
        totals[round] += value
    y = Axis(0, max(totals.values()) * 1.06 or 1, BOTTOM, 12)
    left = 12 + CHARACTER * max(len(tick_text(v)) for v in y.ticks())
    x = Axis(min(totals) - 0.5, max(totals) + 0.5, left, RIGHT)
    foot: dict[int, float] = defaultdict(float)
    drawn = []
    for name, points, colour in parts:
        for round, value in points:
            drawn.append(_bar(x, y, round, foot[round], value, name, colour))
            foot[round] += value
    return drawing(HEIGHT, label, _frame(x, y, left), *drawn)


def _bar(x: Axis, y: Axis, round: int, foot: float, value: float, name: str, colour: str) -> Markup:
    width = min(0.78 * (x.at(round + 0.5) - x.at(round - 0.5)), 60)
    low, high = y.at(foot), y.at(foot + value)
    title = element("title", f"round {round}, {name}: {tick_text(value)}")
    return element("rect", title, x=x.at(round) - width / 2, y=high, width=width, height=low - high, fill=colour)


def scatter(places: Sequence[Place], groups: Sequence[str], colours: Mapping[str, str], label: str) -> Markup:
    """Points of an embedding map, coloured by group; the map has no axes, since its directions mean nothing."""
    xs, ys = zip(*places, strict=True)
    x, y = Axis(*span(list(xs)), 8, WIDTH - 8), Axis(*span(list(ys)), 372, 8)
    frame = element("rect", x=1, y=1, width=WIDTH - 2, height=378, rx=8, class_="map")
    clouds = []
    for group, colour in colours.items():
        members = [(x.at(a), y.at(b)) for (a, b), g in zip(places, groups, strict=True) if g == group]
        cloud = element("path", d=dots(members), class_="cloud", style=f"--c:{colour}")
        clouds.append(element("g", element("title", f"{group}: {plural(len(members), 'image')}"), cloud))
    return drawing(380, label, frame, *clouds)


def grouped(
    names: Sequence[str], own: Mapping[str, str], colours: Sequence[str] = COLOURS
) -> tuple[list[str], dict[str, str]]:
    """Groups to tell apart in a map: the largest keep a colour, the rest are `other`; "" is `unlabelled`."""
    named = [name or "unlabelled" for name in names]
    kept = [name for name, _ in Counter(n for n in named if n != "unlabelled").most_common(len(COLOURS))]
    known = {name: own.get(name, OTHER) for name in kept}
    if OTHER in known.values():
        known = dict(zip(sorted(kept), colours, strict=False))
    groups = [name if name in known or name == "unlabelled" else "other" for name in named]
    rest: dict[str, str] = {name: OTHER for name in ("other", "unlabelled") if name in groups}
    return groups, {**rest, **known}
