"""What is wrong with a patient: air that the lungs have lost, in one of three shapes.

Each label's class knows where it lies in the patient, so that all of the patient's images, both views, show the same.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from polyclinic_simulations.phantom.anatomy import Lung
from polyclinic_simulations.phantom.difficulty import (
    BILATERAL,
    FLUID_HEIGHT,
    MENISCUS,
    NODULE_DENSITY,
    NODULE_DIAMETER,
    NODULES,
    PATCH_DENSITY,
    PATCH_GRAIN,
    PATCH_REACH,
    SHARES,
)
from polyclinic_simulations.phantom.shapes import Map, Texture, chord, edge

Point = tuple[float, float, float]
"""Within a lung: across from inner (-1) to outer border (1), down from apex (0) to base (1), back (-1) to front (1)."""


class Finding(Protocol):
    """Takes air from a lung."""

    def fill(self, lung: Lung, view: str, h: Map, y: Map) -> Map:
        """`lung.path` less what the finding fills, mm; `h` is x or z, mm across the patient."""
        ...


def place(lung: Lung, point: Point, view: str) -> tuple[Map, float]:
    """mm across (at each row) and down of a point of the lung as `view` projects it."""
    across = point[0] if view == "PA" else point[2]
    low, high = lung.borders
    return low + (across + 1) / 2 * (high - low), lung.ends[0] + point[1] * (lung.ends[1] - lung.ends[0])


@dataclass(frozen=True)
class Nodules:
    """Round lesions with a sharp border."""

    balls: tuple[tuple[int, Point, float], ...]
    """Side, place and diameter in mm."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Nodules":
        """Several, in both lungs."""
        count = rng.integers(NODULES[0], NODULES[1], endpoint=True)
        return cls(
            tuple(
                (
                    int(rng.choice([-1, 1])),
                    (rng.uniform(-0.45, 0.6), rng.uniform(0.2, 0.8), rng.uniform(-0.7, 0.7)),
                    rng.uniform(*NODULE_DIAMETER),
                )
                for _ in range(count)
            )
        )

    def fill(self, lung: Lung, view: str, h: Map, y: Map) -> Map:
        """See Finding."""
        path = lung.path
        for side, point, diameter in self.balls:
            if side == lung.side:
                centre, down = place(lung, point, view)
                distance = np.hypot(h - centre, y - down) * (2 / diameter)
                path = path - NODULE_DENSITY * diameter * chord(distance)
        return np.maximum(path, 0)


@dataclass(frozen=True)
class Consolidation:
    """Fluffy patches over much of a lobe in each lung, with the bronchi left as dark branches."""

    centres: dict[int, Point]
    """By side; a lung without a centre is clear."""
    reach: tuple[float, float]
    patches: Texture

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Consolidation":
        """In one lung or both."""
        centres = {
            side: (rng.uniform(-0.3, 0.3), rng.uniform(0.3, 0.75), rng.uniform(-0.5, 0.5)) for side in _sides(rng)
        }
        return cls(centres, (rng.uniform(*PATCH_REACH), rng.uniform(*PATCH_REACH)), Texture.draw(rng))

    def fill(self, lung: Lung, view: str, h: Map, y: Map) -> Map:
        """See Finding."""
        if lung.side not in self.centres:
            return lung.path
        middle, down = place(lung, self.centres[lung.side], view)
        dx, dy = (h - middle) / self.reach[0], (y - down) / self.reach[1]
        u, v = h / PATCH_GRAIN + (40 if view == "PA" else 0), y / PATCH_GRAIN
        fluff = self.patches(u, v) + 0.6 * self.patches(2.1 * u, 2.1 * v)
        inside = edge(0.85 - np.hypot(dx, dy) + 0.15 * fluff, 0.3)
        dense = edge(fluff + 0.5, 0.9)
        angle = np.arctan2(dy, dx + 1.4 * np.sign(middle)) + 0.15 * self.patches(u / 2, v / 2 + 9)
        bronchi = np.exp(-((np.sin(angle * 7) / 0.2) ** 2))
        path: Map = lung.path * (1 - PATCH_DENSITY * inside * dense * (1 - 0.6 * bronchi))
        return path


@dataclass(frozen=True)
class Effusion:
    """Fluid at the base: a concave line that climbs the chest wall and hides the diaphragm."""

    heights: dict[int, float]
    """By side: of the fluid in the middle of the lung, as a fraction of the lung's height."""
    climb: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Effusion":
        """In one lung or both."""
        return cls({side: rng.uniform(*FLUID_HEIGHT) for side in _sides(rng)}, MENISCUS * rng.uniform(0.7, 1.3))

    def fill(self, lung: Lung, view: str, h: Map, y: Map) -> Map:
        """See Finding."""
        if lung.side not in self.heights:
            return lung.path
        top, bottom = lung.ends
        wall = np.clip(lung.across + 0.35 if view == "PA" else np.abs(lung.across + 0.1), 0, 1.3)
        surface = bottom - (bottom - top) * (self.heights[lung.side] + self.climb * wall**2.5)
        return lung.path * edge(surface - y, 5)


def _sides(rng: np.random.Generator) -> list[int]:
    """The lungs that a finding is in."""
    return [-1, 1] if rng.random() < BILATERAL else [int(rng.choice([-1, 1]))]


FINDINGS: dict[str, type[Nodules] | type[Consolidation] | type[Effusion]] = {
    "nodule": Nodules,
    "consolidation": Consolidation,
    "effusion": Effusion,
}


def draw_finding(label: str, rng: np.random.Generator) -> Finding | None:
    """The finding that `label` names; None when the patient is normal."""
    return FINDINGS[label].draw(rng) if label in FINDINGS else None


def draw_labels(patients: int, rng: np.random.Generator) -> list[str]:
    """A label for each patient in random order, in the numbers that SHARES asks for."""
    bounds = np.round(np.cumsum(list(SHARES.values())) * patients).astype(int)
    labels = np.repeat(list(SHARES), np.diff(bounds, prepend=0))
    return [str(label) for label in rng.permutation(labels)]
