"""Distinct values, percentiles and the resize against numpy's plain forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.cohort.pixels import distinct, percentiles, stretch, to_tensor


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_distinct_values_give_the_image_back(dtype: type) -> None:
    info = np.iinfo(dtype)
    image = np.random.default_rng(0).integers(info.min, info.max, (30, 20), dtype=dtype)
    values, counts, where = distinct(image)
    assert (values[where] == image).all()
    assert counts.sum() == image.size
    assert all((image == value).sum() == count for value, count in zip(values[:50], counts[:50], strict=True))


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=300), st.floats(-3, 3))
def test_percentiles_are_numpys(stored: list[int], slope: float) -> None:
    values, counts, where = distinct(np.array([stored], np.int16))
    units = values.astype(np.float32) * np.float32(slope)
    expected = np.percentile(units[where].astype(np.float64), (1, 99))
    if expected[0] == expected[1]:
        expected = [units[where].min(), units[where].max()]
    np.testing.assert_allclose(percentiles(units, counts), expected, rtol=1e-6, atol=1e-6)


def test_stretch_clips_at_both_ends() -> None:
    out = stretch(np.array([-5, 0, 5, 10, 20], np.float32), 0.0, 10.0)
    np.testing.assert_allclose(out, [0, 0, 0.5, 1, 1])
    assert stretch(np.array([3.0], np.float32), 3.0, 3.0) == 0


@pytest.mark.parametrize("factor", [2, 5, 16])
def test_reduction_averages_all_pixels(factor: int) -> None:
    """A one-pixel grating comes out even grey: nearest-neighbour sampling would give stripes."""
    grating = np.tile(np.array([[0, 1], [1, 0]], np.float32), (16 * factor, 16 * factor))
    tensor = to_tensor(grating, 16, 1)
    assert tensor.shape == (1, 16, 16) and tensor.dtype == np.uint8
    assert np.abs(tensor.astype(int) - 127.5).max() < 8


def test_whole_image_is_kept_and_aspect_is_not() -> None:
    wide = np.zeros((20, 80), np.float32)
    wide[:, -20:] = 1
    tensor = to_tensor(wide, 16, 1)[0]
    assert (tensor[:, 13:] == 255).all() and (tensor[:, :11] == 0).all()


def test_channels() -> None:
    red = np.zeros((8, 8, 3), np.float32)
    red[..., 0] = 1
    assert (to_tensor(red, 16, 1) == round(0.299 * 255)).all()
    assert [int(plane.max()) for plane in to_tensor(red, 16, 3)] == [255, 0, 0]
    grey = to_tensor(np.eye(16, dtype=np.float32), 16, 3)
    assert (grey[0] == grey[1]).all() and (grey[1] == grey[2]).all()
