"""Just enough SVG for the report: elements that escape what they hold, axes, frames."""

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 480
"""Units of every plot's width: near the pixels it gets, so that text keeps its size on a phone and on a screen."""
CHARACTER = 6.2
"""Mean width of a character of the labels, units."""


def element(tag: str, *children: str, **attributes: str | float) -> Markup:
    """An element; text is escaped, `class_` becomes class, `stroke_width` stroke-width, numbers keep one decimal."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _text(value))
        for name, value in attributes.items()
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{tag}{written}>{inside}</{tag}>").format(tag=tag, written=written, inside=inside)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def drawing(height: float, label: str, *children: str) -> Markup:
    """A picture of WIDTH x `height` units that scales with its place; `label` is what a screen reader says."""
    box = f"0 0 {WIDTH} {_text(height)}"
    return element("svg", *children, viewBox=box, role="img", aria_label=label)


def text(x: float, y: float, words: str, anchor: str = "start", class_: str = "tick") -> Markup:
    """Words at a place."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("path", d=f"M{_text(x1)} {_text(y1)}L{_text(x2)} {_text(y2)}", class_=class_)


def polyline(points: list[tuple[float, float]]) -> str:
    """Path data through points."""
    return "M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points)


def dots(points: list[tuple[float, float]]) -> str:
    """Path data of dots, which round line ends draw: a tenth of the bytes of as many circles."""
    return "".join(f"M{_text(x)} {_text(y)}h0" for x, y in points)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, units; beyond the ends it stands at the end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        share = (min(value, high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values: powers of ten, or some five steps of 1, 2 or 5."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**k for k in exponents]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def span(values: list[float], *, log: bool = False) -> tuple[float, float]:
    """Bounds with some room around values; a decade each way at least, with `log`."""
    low, high = min(values), max(values)
    if log:
        floor = 1e-6
        return 10.0 ** math.floor(math.log10(max(low, floor))), 10.0 ** math.ceil(math.log10(max(high, floor)) + 1e-9)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def tick_text(value: float) -> str:
    """
    >>> tick_text(0.30000000000000004), tick_text(20000.0), tick_text(0.0)
    ('0.3', '20,000', '0')
    """
    value = round(value, 10) + 0.0
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
