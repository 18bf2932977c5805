from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from polyclinic.evaluation import NotMeasurable, features, pixel_features
from polyclinic.study import Compute

CPU = torch.device("cpu")


class FakeCohort:
    """Only what encoding asks of a cohort."""

    def __init__(self, images: int, channels: int = 1, size: int = 32):
        self.images = np.random.default_rng(0).integers(0, 256, (images, channels, size, size), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index):
        return torch.from_numpy(self.images[index])


@pytest.mark.parametrize("images", [1, 64, 131])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_block_means_in_order(images, channels):
    cohort = FakeCohort(images, channels)
    blocks = cohort.images.reshape(images, channels, 16, 2, 16, 2).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(pixel_features(cohort), blocks.reshape(images, -1), atol=1e-6)
    assert pixel_features(cohort, side=4).shape == (images, channels * 16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_features_are_the_encoders_own_in_float32_and_in_order(layout):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    cohort = FakeCohort(131)
    got = features(encoder, cohort, Compute(precision="bf16", layout=layout), CPU)
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(cohort.images).float() / 255)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    assert got.dtype == np.float32


def test_the_encoder_sees_0_to_1_without_gradients_and_keeps_its_mode():
    seen = SimpleNamespace(low=1.0, high=0.0, inference=False)

    class Spy(nn.Module):
        def forward(self, x):
            assert not self.training
            seen.low, seen.high = min(seen.low, float(x.min())), max(seen.high, float(x.max()))
            seen.inference = torch.is_inference_mode_enabled()
            return x.flatten(1)

    spy = Spy().train()
    features(spy, FakeCohort(3), Compute(), CPU)
    assert seen == SimpleNamespace(low=0.0, high=1.0, inference=True)
    assert spy.training


@pytest.mark.parametrize("threads", [1, 2])
def test_features_take_the_studys_threads_and_leave_those_of_before(threads):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x.flatten(1)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        features(Spy(), FakeCohort(2), Compute(threads=threads), CPU)
        assert (seen, torch.get_num_threads()) == ([threads], 3)
    finally:
        torch.set_num_threads(before)


def test_no_images_is_said():
    with pytest.raises(NotMeasurable, match="no images"):
        pixel_features(FakeCohort(0))
