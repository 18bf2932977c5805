"""A site's X-ray machine: what it makes of the same rays, and how it stores them. It knows nothing of the findings."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from polyclinic.seeding import numpy_generator, seed_for
from polyclinic_simulations.phantom.shapes import Map

WATER = 0.019
"""Attenuation of water at 100 kV, per mm."""
SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless, ImplicitVRLittleEndian)
BITS = (12, 8, 16, 10)
LARGE = 15.0
"""Structures that compression takes for large, standard deviation in pixels."""
LETTERS = {
    -1: ("1110", "1001", "1001", "1110", "1010", "1001", "1001"),
    1: ("1000", "1000", "1000", "1000", "1000", "1000", "1111"),
}
"""The lead letters R and L."""


@dataclass(frozen=True)
class Scanner:
    """One machine: all of a site's images come from it."""

    rows: int
    columns: int
    gain: float
    """Slope of the sigmoid response curve; the smaller, the straighter."""
    gamma: float
    blur: float
    """Of the detector, standard deviation in pixels."""
    boost: float
    """Unsharp masking after it, fraction."""
    noise: float
    """Standard deviation at the mean exposure, as a fraction of the signal."""
    compression: float
    """Of large structures, fraction: the vendor's tissue equalisation, which keeps details and evens out the rest."""
    bits: int
    inverted: bool
    """MONOCHROME1: low values are white."""
    border: float
    """Widest collimated border, fraction of the image."""
    marker: bool
    modality: str
    syntax: UID

    @classmethod
    def of(cls, site: str, number: int, seed: int) -> "Scanner":
        """The machine of a site. Consecutive numbers never share a bit depth, polarity or transfer syntax."""
        turn = number + seed_for(seed, "phantom scanners") % len(SYNTAXES)
        rng = numpy_generator(seed_for(seed, "phantom scanner", site=site))
        return cls(
            rows=int(rng.integers(184, 224)),
            columns=int(rng.integers(176, 204)),
            gain=rng.uniform(0.5, 4.5),
            gamma=rng.uniform(0.6, 1.7),
            blur=rng.uniform(0.5, 1.1),
            boost=rng.uniform(0.0, 1.2),
            noise=rng.uniform(0.01, 0.05),
            compression=float(rng.choice([0.0, 0.35, 0.6, 0.8])),
            bits=BITS[turn % len(BITS)],
            inverted=turn % 2 == 1,
            border=rng.uniform(0.0, 0.09),
            marker=bool(rng.random() < 0.75),
            modality=("DX", "CR")[turn // 2 % 2],
            syntax=SYNTAXES[turn % len(SYNTAXES)],
        )

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Of stored values."""
        return np.uint8 if self.bits == 8 else np.uint16

    @property
    def sop_class(self) -> UID:
        """Of the images' storage (PS3.4 B.5)."""
        return DigitalXRayImageStorageForPresentation if self.modality == "DX" else ComputedRadiographyImageStorage

    def expose(self, water: Map, side: int, rng: np.random.Generator) -> NDArray[np.unsignedinteger]:
        """Stored values (rows, columns) of an image whose rays met `water` mm; `side` is the marker's: -1 R, 1 L."""
        signal = self._detect(water * np.float32(WATER * rng.uniform(0.9, 1.1)), rng)
        grey = self._respond(signal, rng)
        if self.marker:
            self._mark(grey, side, rng)
        self._collimate(grey, rng)
        top = 2**self.bits - 1
        stored: NDArray[np.unsignedinteger] = np.round(np.clip(grey, 0, 1) * top).astype(self.dtype)
        return top - stored if self.inverted else stored

    def _detect(self, signal: Map, rng: np.random.Generator) -> Map:
        """Quantum noise, which grows as rays grow fewer, then the sharpness of detector and post-processing."""
        level = np.exp(np.minimum(signal, 6) / 2 - 1.5)
        signal = signal + np.float32(self.noise * rng.uniform(0.7, 1.4)) * level * rng.standard_normal(
            signal.shape, dtype=np.float32
        )
        down, across = np.fft.fftfreq(signal.shape[0])[:, None], np.fft.rfftfreq(signal.shape[1])[None, :]
        squared = (2 * np.pi) ** 2 * (down**2 + across**2)
        transfer = np.exp(-squared * self.blur**2 / 2) * (1 + self.boost * (1 - np.exp(-squared * 4.5)))
        transfer *= 1 - self.compression * np.exp(-squared * LARGE**2 / 2)
        filtered: Map = np.fft.irfft2(np.fft.rfft2(signal) * transfer.astype(np.float32), s=signal.shape)
        return filtered

    def _respond(self, signal: Map, rng: np.random.Generator) -> Map:
        """Grey levels 0 (black) to 1 by the response curve."""
        low, high = np.percentile(signal[::4, ::4], [3, 99]).tolist()
        straight: Map = np.clip((signal - low) / (high - low + 0.2), 0, 1) ** (self.gamma * rng.uniform(0.85, 1.18))
        middle = rng.uniform(0.42, 0.58)
        black, white = (float(np.tanh(self.gain / 2 * (end - middle))) for end in (0, 1))
        curved: Map = (np.tanh(self.gain / 2 * (straight - middle)) - black) / (white - black)
        return curved

    def _mark(self, grey: Map, side: int, rng: np.random.Generator) -> None:
        """Lay a lead letter on the film, in an upper corner."""
        letter = np.kron([[int(dot) for dot in line] for line in LETTERS[side]], np.ones((2, 2), int)) > 0
        rows, columns = letter.shape
        top = int(rng.integers(6, 40))
        left = int(rng.integers(8, 30))
        left = left if side < 0 else grey.shape[1] - left - columns
        patch = grey[top : top + rows, left : left + columns]
        patch[letter] = 0.97

    def _collimate(self, grey: Map, rng: np.random.Generator) -> None:
        """Black out the borders that the collimator's blades cover."""
        rows, columns = grey.shape
        up, down, left, right = (rng.uniform(0, self.border, 4) * [rows, rows, columns, columns]).astype(int).tolist()
        grey[:up], grey[rows - down :] = 0, 0
        grey[:, :left], grey[:, columns - right :] = 0, 0
