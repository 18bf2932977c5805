"""PNG and JPEG files: modes, orientation, sixteen bits, and files made to hurt."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from polyclinic.cohort.intake import Intake
from polyclinic.cohort.quarantine import Reason, Unusable
from polyclinic.cohort.worker import decode


def smooth(height: int, width: int, channels: int = 1) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 7, channels)).astype(np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return (
        np.squeeze(np.stack([np.asarray(p) for p in planes], axis=-1), axis=-1)
        if channels == 1
        else np.stack(planes, -1)
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(data: bytes, channels: int = 1, window: Any = "percentile", size: int = 32) -> NDArray[np.uint8]:
    (tensor,), _ = decode(data, Intake(size, channels, window), b"")
    assert tensor.shape == (channels, size, size) and tensor.dtype == np.uint8
    return tensor


def test_jpeg_decoded_small_is_nearly_jpeg_decoded_whole() -> None:
    image = Image.fromarray(smooth(700, 900, 3))
    data = encoded(image, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(read(data)[0].astype(int) - np.asarray(whole)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(mode: str, channels: int) -> None:
    image = Image.fromarray(smooth(60, 50, 3)).convert(mode)
    tensor = read(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), channels)
    expected = np.asarray(image.convert("RGB").convert("L").resize((32, 32), Image.Resampling.BILINEAR), int)
    if mode not in ("1", "P"):
        assert np.abs(tensor.mean(axis=0) - expected).mean() < 30
    assert tensor.std() > 10


def test_colour_stays_colour_and_becomes_luminance() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 100, 50)
    data = encoded(Image.fromarray(pixels))
    assert read(data, 3)[:, 5, 30].tolist() == [200, 100, 50]
    assert abs(int(read(data)[0, 5, 30]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) <= 1


def test_transparent_is_black() -> None:
    pixels = np.full((40, 40, 4), 255, np.uint8)
    pixels[:, :20, 3] = 0
    tensor = read(encoded(Image.fromarray(pixels)))[0]
    assert (tensor[:, :14] == 0).all() and (tensor[:, 18:] == 255).all()


def test_eight_bits_are_not_windowed() -> None:
    pixels = smooth(32, 32) // 4 + 90
    for window in ("percentile", "voi", (40.0, 400.0)):
        assert (read(encoded(Image.fromarray(pixels)), window=window)[0] == pixels).all()


def test_sixteen_bits_are_windowed() -> None:
    pixels = (smooth(32, 32).astype(np.uint16) * 10 + 1000).astype(np.uint16)
    data = encoded(Image.fromarray(pixels))
    low, high = np.percentile(pixels, (1, 99))
    expected = np.rint(np.clip((pixels - low) / (high - low), 0, 1) * 255)
    assert np.abs(read(data)[0] - expected).max() <= 1
    expected = np.rint(np.clip((pixels - 2000.0) / 1000, 0, 1) * 255)
    assert np.abs(read(data, window=(2500.0, 1000.0))[0] - expected).max() <= 1


def test_photographs_stand_upright() -> None:
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: the top is at the right
    tensor = read(encoded(Image.fromarray(pixels), exif=exif))[0]
    assert tensor[16, 30] == 255 and tensor[16, 2] == 0


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("side", [8_200, 9_500, 12_000, 60_000, 2**31 - 1])
def test_bombs_are_not_decoded(side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Unusable) as error:
        read(data)
    assert error.value.reason is Reason.TOO_LARGE


def test_constant_images_are_refused() -> None:
    for image in (Image.new("L", (40, 40), 7), Image.fromarray(np.full((40, 40), 700, np.uint16))):
        with pytest.raises(Unusable) as error:
            read(encoded(image))
        assert error.value.reason is Reason.CONSTANT


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_never_escapes(kind: str) -> None:
    """Whatever is done to the bytes, the outcome is an image or a reason."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(smooth(60, 50, 3)), kind, exif=exif)
    generator, reasons = np.random.default_rng(0), set()
    for _ in range(200):
        data = bytearray(whole[: generator.integers(1, len(whole))] if generator.random() < 0.3 else whole)
        for position in generator.integers(0, len(data), 4):
            data[position] = generator.integers(256)
        try:
            read(bytes(data))
        except Unusable as error:
            reasons.add(error.reason)
    assert Reason.DAMAGED in reasons and reasons <= {
        Reason.DAMAGED,
        Reason.NOT_AN_IMAGE,
        Reason.TOO_LARGE,
        Reason.CONSTANT,
    }
