"""Grey levels to tensors: distinct values, percentiles, luminance and the resize, the same for every kind of file."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R BT.601."""
PERCENTILES = (1.0, 99.0)


def distinct(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp], NDArray[np.intp]]:
    """(values, counts, where): `values[where]` is the image, and value k stands in it counts[k] times, perhaps never.

    An image has millions of pixels and some thousand values: what is done value by value is done once for each.
    """
    low, high = int(image.min()), int(image.max())
    if not np.issubdtype(image.dtype, np.integer) or high - low > 0xFFFF:
        values, where, counts = np.unique(image, return_inverse=True, return_counts=True)
        return values, counts, where.reshape(image.shape)
    where = image.astype(np.intp) - low
    return np.arange(low, high + 1), np.bincount(where.ravel(), minlength=high - low + 1), where


def percentiles(values: Floats, counts: NDArray[np.intp]) -> tuple[float, float]:
    """The 1st and 99th percentile of `values`, each standing counts[k] times, as numpy.percentile gives them.

    Least and largest value where those two are equal.

    >>> percentiles(np.array([3.0, 0.0, 9.0], np.float32), np.array([100, 100, 1]))
    (0.0, 3.0)
    """
    present = np.flatnonzero(counts)
    order = present[np.argsort(values[present], kind="stable")]
    ranked, above = values[order].astype(np.float64), np.cumsum(counts[order])
    low, high = np.interp(np.array(PERCENTILES) / 100 * (above[-1] - 1), *_corners(ranked, above))
    return (float(low), float(high)) if low < high else (float(ranked[0]), float(ranked[-1]))


def _corners(ranked: NDArray[np.float64], above: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(ranks, values) between which the sorted pixels run straight: the first and last rank of each value."""
    first = np.concatenate([[0], above[:-1]])
    return np.stack([first, above - 1], axis=1).ravel().astype(np.float64), np.repeat(ranked, 2)


def stretch(values: Floats, low: float, high: float) -> Floats:
    """`low` to 0 and `high` to 1, linear between, clipped beyond; all 0 where low and high are equal."""
    if low == high:
        return np.zeros_like(values)
    scaled = (values - np.float32(low)) * np.float32(1.0 / (high - low))
    return np.clip(scaled, 0.0, 1.0, out=scaled)


def resize(image: Image.Image, size: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """The whole image, or what of it lies in `box`, on a square of `size` pixels, antialiased.

    A triangle filter as wide as the reduction averages every source pixel in; enlarging, it is linear interpolation.
    The aspect is not kept: nothing is cropped away, and no border is added that would tell sites apart.
    """
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def to_tensor(image: Floats, size: int, channels: int) -> NDArray[np.uint8]:
    """(height, width) grey or (height, width, 3) colour in [0, 1] -> (channels, size, size).

    One channel from colour is its luminance; three from grey are equal.
    """
    if image.ndim == 3 and channels == 1:
        image = image @ LUMINANCE  # (height, width, 3) -> (height, width)
    planes = [image] if image.ndim == 2 else [image[..., c] for c in range(3)]
    small = [np.asarray(resize(Image.fromarray(np.ascontiguousarray(p)), size)) for p in planes]
    levels = np.rint(np.clip(np.stack(small), 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels if len(levels) == channels else np.repeat(levels, channels, axis=0)
