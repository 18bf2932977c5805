"""Residual networks that normalise batches: torchvision's answers, and its own where a batch has no statistics."""

from pathlib import Path

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from polyclinic.artifacts import load_encoder, save_encoder
from polyclinic.encoders import build_encoder
from polyclinic.encoders.normalise import Normalise
from polyclinic.encoders.resnet import Basic, BatchNorm, ResidualNetwork
from polyclinic.seeding import forked
from polyclinic.study import Encoder, Images, resolve


@pytest.fixture
def encoder() -> ResidualNetwork:
    with forked(0):
        return ResidualNetwork(Basic, [1, 1, 1, 1], 1, context=False, norm="batch")


def statistics(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items() if "running" in name}


def test_a_batch_is_normalised_as_by_torchvisions() -> None:
    with forked(0):
        ours = build_encoder(Encoder(name="resnet50", norm="batch"), Images(size=32, channels=3))
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    batch = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalised = Normalise(3)(batch)
    with torch.no_grad():
        torch.testing.assert_close(ours.train()(batch), theirs.train()(normalised), atol=1e-4, rtol=1e-3)
        for name, value in statistics(theirs).items():
            torch.testing.assert_close(statistics(ours)[name], value, atol=1e-5, rtol=1e-3)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.eval()(batch), theirs.eval()(normalised), atol=1e-4, rtol=1e-3)


def test_frozen_or_of_one_image_a_batch_is_normalised_by_what_was_learnt_before(encoder: ResidualNetwork) -> None:
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))  # the last map is 1 x 1
    encoder.train()(images)
    before = statistics(encoder)
    expected = encoder.eval()(images)
    torch.testing.assert_close(encoder.train()(images[:1]), expected[:1], atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.requires_grad_(False)(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in statistics(encoder).items())
    encoder.requires_grad_(True)(images)
    assert not any(torch.equal(value, before[name]) for name, value in statistics(encoder).items())


def test_one_image_teaches_the_weights(encoder: ResidualNetwork) -> None:
    encoder.train()(torch.rand(1, 1, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_variance_that_averaging_has_left_below_zero_is_zero() -> None:
    layer = BatchNorm(2).eval()
    assert layer.running_var is not None
    layer.running_var.copy_(torch.tensor([-3e-5, 0.0]))
    first, second = layer(torch.ones(1, 2, 1, 1)).flatten().tolist()
    assert first == second == pytest.approx(layer.eps**-0.5)


def test_statistics_are_saved_with_the_encoder(tmp_path: Path) -> None:
    stage = {"kind": "pretrain", "method": "simclr", "rounds": 1}
    plain = {"study": {"name": "s"}, "images": {"size": 24}, "encoder": {"norm": "batch"}, "stages": [stage]}
    study = resolve(plain)
    with forked(0):
        encoder = build_encoder(study.encoder, study.images)
    images = torch.rand(4, 1, 24, 24)
    encoder.train()(images)
    save_encoder(tmp_path / "encoder.safetensors", encoder, study)
    loaded = load_encoder(tmp_path)
    assert torch.equal(loaded(images), encoder.eval()(images))
    assert all(torch.equal(value, statistics(encoder)[name]) for name, value in statistics(loaded).items())
