"""Grey levels to tensors: windows, luminance and the resize, the same for every kind of file."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R BT.601."""
PERCENTILES = (1.0, 99.0)


def stretch(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """`low` to 0 and `high` to 1, linear between, clipped beyond."""
    scaled = (values - np.float32(low)) * np.float32(1.0 / (high - low))
    return np.clip(scaled, 0.0, 1.0, out=scaled)


def resize(image: Image.Image, size: int) -> Image.Image:
    """The whole image on a square of `size` pixels, antialiased.

    A triangle filter as wide as the reduction averages every source pixel in; enlarging, it is linear interpolation.
    The aspect is not kept: nothing is cropped away, and no border is added that would tell sites apart.
    """
    return image.resize((size, size), Image.Resampling.BILINEAR)


def to_tensor(image: NDArray[np.float32], size: int, channels: int) -> NDArray[np.uint8]:
    """(height, width) grey or (height, width, 3) colour in [0, 1] -> (channels, size, size).

    One channel from colour is its luminance; three from grey are equal.
    """
    if image.ndim == 3 and channels == 1:
        image = image @ LUMINANCE  # (height, width, 3) -> (height, width)
    planes = [image] if image.ndim == 2 else [image[..., c] for c in range(3)]
    small = [np.asarray(resize(Image.fromarray(np.ascontiguousarray(p)), size)) for p in planes]
    levels = np.rint(np.clip(np.stack(small), 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels if len(levels) == channels else np.repeat(levels, channels, axis=0)
