"""What the phantom is drawn with: how far a ray runs through simple solids, and textures that belong to a patient.

All maps are float32 of shape (rows, columns), all lengths mm.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating[Any]]


def chord(position: Map) -> Map:
    """Path through a unit circle at `position` radii from its centre, as a fraction of the diameter."""
    path: Map = np.sqrt(np.maximum(1 - position * position, 0))
    return path


def ellipse(x: Map, y: Map, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Map:
    """Path through an ellipsoid seen along z, as a fraction of its depth; `angle` in radians turns x towards y."""
    dx, dy = x - centre[0], y - centre[1]
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    across = (cos * dx + sin * dy) / radii[0]
    along = (cos * dy - sin * dx) / radii[1]
    path: Map = np.sqrt(np.maximum(1 - across * across - along * along, 0))
    return path


def bone(distance: Map, radius: float) -> Map:
    """Path through a long bone at `distance` from its axis: a dense shell, a lighter marrow."""
    return 2 * radius * (chord(distance / radius) - np.float32(0.55) * chord(distance / (0.72 * radius)))


def edge(distance: Map, width: float = 2.0) -> Map:
    """0 to 1 across a border: one half at distance 0, soft over `width`."""
    step: Map = 0.5 + 0.5 * np.tanh(distance / width)
    return step


def segment(x: Map, y: Map, start: tuple[float, float], end: tuple[float, float]) -> tuple[Map, Map]:
    """Distance to the segment from `start` to `end`, and how far along it the nearest point lies (0 to 1)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy), along


@dataclass(frozen=True)
class Texture:
    """A random field that repeats after `cells` grains: the same places give the same values in every image."""

    table: Map

    @classmethod
    def draw(cls, rng: np.random.Generator, cells: int = 32) -> "Texture":
        """Grains of mean 0 and standard deviation 1."""
        return cls(rng.standard_normal((cells, cells), dtype=np.float32))

    def __call__(self, u: Map, v: Map) -> Map:
        """The field at (`u`, `v`), in grains: smooth between the entries of the table."""
        cells = len(self.table)
        floor_u, floor_v = np.floor(u), np.floor(v)
        fu, fv = u - floor_u, v - floor_v
        fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
        row, column = floor_v.astype(np.int32) % cells, floor_u.astype(np.int32) % cells
        flat = self.table.ravel()
        here = row * cells
        below = (row + 1) % cells * cells
        right = (column + 1) % cells
        upper = flat[here + column] * (1 - fu) + flat[here + right] * fu
        lower = flat[below + column] * (1 - fu) + flat[below + right] * fu
        value: Map = upper * (1 - fv) + lower * fv
        return value
