"""PNG and JPEG files. Eight bits are taken as they are: someone has windowed them; sixteen go through the window."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from polyclinic.cohort import limits, pixels
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.quarantine import Reason, Unusable

MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def read(data: bytes, intake: Intake) -> tuple[list[NDArray[np.uint8]], Facts]:
    """The file's one image as a (channels, size, size) tensor.

    Raises:
        Unusable: too many pixels, or without contrast.
        Exception: anything Pillow raises on a damaged file.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))  # reads the header only
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable(Reason.TOO_LARGE) from error
    facts = Facts(kind="raster", photometric=image.mode, height=image.height, width=image.width)
    if image.width * image.height > limits.MAX_PIXELS:
        raise Unusable(Reason.TOO_LARGE, facts)
    tensor = _tensor(image, intake)
    if tensor.min() == tensor.max():
        raise Unusable(Reason.CONSTANT, facts)
    return [tensor], facts


def _tensor(image: Image.Image, intake: Intake) -> NDArray[np.uint8]:
    if image.mode.startswith(("I", "F")):
        return _deep(np.asarray(image), intake)
    mode = "L" if intake.channels == 1 else "RGB"
    # A JPEG decodes to a half, a quarter or an eighth at once, in whole pixels: `box` is where the image ends in those.
    drafted = image.draft(mode, (2 * intake.size, 2 * intake.size))
    box = drafted[1] if drafted else None
    if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)  # on black
    square = pixels.resize(image.convert(mode), intake.size, box)
    small = np.asarray(ImageOps.exif_transpose(square))  # photographs say which side is up
    return small[None] if small.ndim == 2 else np.ascontiguousarray(small.transpose(2, 0, 1))


def _deep(image: NDArray[np.uint16], intake: Intake) -> NDArray[np.uint8]:
    """A sixteen-bit grey PNG: no units and no window of its own, so percentiles unless the study names a window."""
    values, counts, where = pixels.distinct(image)
    units = values.astype(np.float32)
    low, high = pixels.percentiles(units, counts)
    if isinstance(intake.window, tuple):
        centre, width = intake.window
        low, high = centre - width / 2, centre + width / 2
    return pixels.to_tensor(pixels.stretch(units, low, high)[where], intake.size, intake.channels)
