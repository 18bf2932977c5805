"""One patient's anatomy, as numbers that every image of the patient shares.

Lengths in mm: x to the patient's left, y down, z to the front, origin in the middle of the chest. The two views
(frontal.py, lateral.py) project it; attenuation is in mm of water, as air that lungs hold is water that is missing.
"""

from dataclasses import dataclass

import numpy as np

from polyclinic_simulations.phantom.difficulty import DOMES, HAZE, ROLL, SHIFT, ZOOM
from polyclinic_simulations.phantom.shapes import Map, Texture

AIR = 0.72
"""Fraction of the lung that is air: what a ray is spared, of each mm of lung."""
BONE = 1.0
"""Water that one mm of bone adds to the mm that it takes the place of."""


@dataclass(frozen=True)
class Anatomy:
    """One patient's chest."""

    width: float
    """Half the inner width of the rib cage at its widest."""
    depth: float
    """Half the inner depth, back to front."""
    height: float
    """From the lungs' apex to the right dome of the diaphragm."""
    fat: float
    """Soft tissue outside the ribs."""
    domes: tuple[float, float]
    """Height of the right and left dome above (-) or below (+) the mean level."""
    arch: float
    """How much lower the diaphragm lies at the chest wall than at its dome."""
    heart: tuple[float, float]
    """Half axes of the heart, across and along."""
    heart_x: float
    heart_tilt: float
    """Radians."""
    mediastinum: float
    """Half its width."""
    aorta: float
    """Radius of the aortic arch."""
    hila: float
    """Radius of the hila."""
    vessels: float
    """Strength of the lung markings."""
    scoliosis: tuple[float, float]
    """Amplitude and phase of the sideways curve of the spine."""
    vertebra: float
    """Height of a vertebra with its disc."""
    rib_spacing: float
    rib_radius: float
    rib_slope: float
    """How far the ribs fall on their way around the chest, in spacings."""
    rib_phase: float
    """In spacings: which rib crosses the middle of the chest."""
    mineral: float
    """Density of the bones relative to the mean patient's."""
    clavicle: float
    """How far the outer end of the collar bones rises above the inner."""
    breasts: float
    """Radius of the breasts; 0 for none."""
    breast_y: float
    stomach: float
    """Radius of the air bubble under the left dome."""
    grain: Texture
    """Uneven soft tissue."""
    markings: Texture
    """Where the vessels of the lungs run."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Anatomy":
        """Another patient."""
        size = rng.normal(1, 0.07)
        heart = rng.uniform(38, 60) * size
        return cls(
            width=size * rng.uniform(112, 138),
            depth=size * rng.uniform(72, 100),
            height=size * rng.uniform(180, 235),
            fat=rng.gamma(4, 4.5) + 5,
            domes=(rng.normal(-4, DOMES), rng.normal(6, DOMES)),
            arch=rng.uniform(28, 62),
            heart=(heart, heart * rng.uniform(1.1, 1.45)),
            heart_x=rng.uniform(10, 30),
            heart_tilt=rng.uniform(-0.9, -0.35),
            mediastinum=rng.uniform(24, 38),
            aorta=rng.uniform(11, 21),
            hila=rng.uniform(10, 17),
            vessels=rng.uniform(0.8, 1.2),
            scoliosis=(rng.normal(0, 6), rng.uniform(0, 2 * np.pi)),
            vertebra=rng.uniform(23, 29) * size,
            rib_spacing=rng.uniform(25, 33) * size,
            rib_radius=rng.uniform(5.0, 7.2),
            rib_slope=rng.uniform(0.8, 1.6),
            rib_phase=rng.uniform(0, 1),
            mineral=rng.uniform(0.7, 1.3),
            clavicle=rng.uniform(8, 42),
            breasts=rng.uniform(50, 66) if rng.random() < 0.45 else 0.0,
            breast_y=rng.uniform(25, 75),
            stomach=rng.uniform(0, 30),
            grain=Texture.draw(rng),
            markings=Texture.draw(rng, 48),
        )

    @property
    def apex(self) -> float:
        """y of the top of the lungs."""
        return -0.58 * self.height

    def level(self, y: Map) -> Map:
        """0 at the apex of the lungs, 1 at the diaphragm."""
        return (y - self.apex) / self.height

    def clear(self, side: int, h: Map, y: Map) -> Map:
        """Fraction of its air that a lung has left where smooth clouds lie over it."""
        left: Map = 1 - HAZE * (0.5 + 0.5 * np.tanh(self.grain(h / 45 + 17 * side, y / 45 + 5)))
        return left

    def outline(self, level: Map, power: float) -> Map:
        """How far the rib cage reaches at each level, as a fraction of its width or depth."""
        top = 1 - np.clip(level, 0, 1)
        reach: Map = np.sqrt(np.maximum(1 - top**power, 1e-4)) * (1 - 0.06 * np.maximum(level - 0.8, 0))
        return reach


@dataclass(frozen=True)
class Pose:
    """How the patient stood for one image."""

    view: str
    """PA or LATERAL."""
    turn: float
    """Rotation about the vertical axis, as mm sideways for each mm of depth."""
    roll: float
    """Rotation in the image, radians."""
    shift: tuple[float, float]
    zoom: float
    breath: float
    """How far the diaphragm moved from its mean height."""
    facing: int
    """Of a lateral view: 1 faces the right of the image, -1 the left."""

    @classmethod
    def draw(cls, rng: np.random.Generator, view: str) -> "Pose":
        """Another image of a patient."""
        return cls(
            view=view,
            turn=rng.normal(0, 0.10),
            roll=rng.normal(0, ROLL),
            shift=(rng.normal(0, SHIFT[0]), rng.normal(0, SHIFT[1])),
            zoom=rng.uniform(*ZOOM),
            breath=rng.normal(0, 11),
            facing=int(rng.choice([-1, 1])),
        )

    def grid(self, rows: int, columns: int, field: float) -> tuple[Map, Map]:
        """Where each pixel of an image `field` mm wide looks: mm across and down the patient, (rows, columns) each."""
        step = field / columns
        across = ((np.arange(columns, dtype=np.float32) - columns / 2) * step)[None, :]
        down = ((np.arange(rows, dtype=np.float32) - rows / 2) * step)[:, None]
        cos, sin = float(np.cos(self.roll)) / self.zoom, float(np.sin(self.roll)) / self.zoom
        return cos * across + sin * down - self.shift[0], cos * down - sin * across - self.shift[1]


@dataclass
class Lung:
    """One lung as one view sees it; findings take air from it."""

    side: int
    """-1 the patient's right, 1 the left."""
    path: Map
    """mm of lung along the ray."""
    across: Map
    """-1 to 1 between its borders: inner to outer (PA), back to front (LATERAL)."""
    floor: Map
    """y of the diaphragm."""
    ends: tuple[float, float]
    """y of its apex and of the depth of its costophrenic angle."""
    borders: tuple[Map, Map]
    """mm across of -1 and 1."""
