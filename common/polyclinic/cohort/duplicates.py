"""Images that are nearly the same, by perceptual hash: a patient who appears twice can stand in training and test."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort.cohort import Cohort
from polyclinic.cohort.pixels import LUMINANCE

SIDE = 12
"""The hash has 12 x 12 - 1 bits: the lowest frequencies without the mean."""
NEAR = 8
"""Bits of 143. Re-saved, rescaled and re-exposed copies differ by fewer; different chest films of one view by more."""
BLOCK = 512
"""Images compared with as many others at once."""


def perceptual_hashes(cohort: Cohort) -> NDArray[np.bool_]:
    """(images, 143): whether each low-frequency DCT coefficient is above their median (pHash)."""
    size = cohort.images.shape[-1]
    basis = _cosines(size)
    hashes = np.empty((len(cohort), SIDE * SIDE - 1), np.bool_)
    for start in range(0, len(cohort), BLOCK):
        batch = cohort.images[cohort.rows[start : start + BLOCK]].astype(np.float32)
        grey = batch[:, 0] if batch.shape[1] == 1 else np.einsum("nchw,c->nhw", batch, LUMINANCE)
        low = (basis @ grey @ basis.T).reshape(len(batch), -1)[:, 1:]  # (n, 12, 12) -> (n, 143)
        hashes[start : start + BLOCK] = low > np.median(low, axis=1, keepdims=True)
    return hashes


def _cosines(size: int) -> NDArray[np.float32]:
    """(SIDE, size): the lowest rows of the DCT-II."""
    return np.cos(np.pi * np.arange(SIDE)[:, None] * (2 * np.arange(size) + 1) / (2 * size)).astype(np.float32)


def near_duplicates(cohort: Cohort) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Numbers (first, second) of the images whose hashes differ by at most NEAR bits, first < second.

    They come block by block, at most BLOCK * BLOCK pairs at once, for copies make pairs by the square. All pairs are
    compared, as matrix products of signs: 10,000 images take about a second.
    """
    signs = np.where(perceptual_hashes(cohort), np.float32(1), np.float32(-1))
    agree = signs.shape[1] - 2 * NEAR  # the product of two sign vectors is bits minus twice the distance
    for row in range(0, len(signs), BLOCK):
        for column in range(row, len(signs), BLOCK):
            near = signs[row : row + BLOCK] @ signs[column : column + BLOCK].T >= agree
            first, second = np.nonzero(np.triu(near, row - column + 1))
            yield first + row, second + column
