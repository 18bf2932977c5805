"""Weights of other people's networks: the same answers where the networks are the same, a named refusal elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18 as torchvision_resnet18  # type: ignore[import-untyped]

from polyclinic.encoders import build_encoder
from polyclinic.encoders.normalise import Normalise
from polyclinic.encoders.weights import adopt
from polyclinic.errors import StudyError
from polyclinic.model import encoder_of, initial_tensors
from polyclinic.seeding import forked
from polyclinic.study import Encoder, Images, load_study

STUDY = """
[study]
name = "transfer"
[images]
size = 32
channels = {channels}
[encoder]
name = "{name}"
patch = 16
init = {{ file = "{file}", family = "{family}" }}
[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 1
"""


def ours(name: str, channels: int = 3, size: int = 32, patch: int = 16) -> Any:
    with forked(7):
        return build_encoder(Encoder(name=name, patch=patch), Images(size=size, channels=channels)).eval()  # type: ignore[arg-type]


def test_bit_answers_as_timms() -> None:
    with forked(0):
        theirs = timm.create_model("resnetv2_50x1_bit", num_classes=10, pretrained=False).eval()
    encoder = ours("bit_resnet50", size=64)
    adopt(encoder, theirs.state_dict(), "timm")
    images = torch.rand(2, 3, 64, 64)
    expected = theirs.forward_features((images - 0.5) / 0.5).mean(dim=(2, 3))
    assert torch.allclose(encoder(images), expected, atol=1e-5)


def test_a_vision_transformer_takes_timms_blocks() -> None:
    with forked(0):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, pretrained=False).eval()
    encoder = ours("vit_tiny")
    adopt(encoder, theirs.state_dict(), "timm")
    tokens = torch.rand(2, 4, 192)
    x = tokens
    for block in theirs.blocks:
        x = block(x)
    y = tokens
    for block in encoder.blocks:
        y = block(y)
    assert torch.equal(x, y)
    assert torch.equal(encoder.patch_embed.proj.weight, theirs.patch_embed.proj.weight)


def test_torchvisions_resnet_keeps_all_but_batch_statistics_and_classifier() -> None:
    weights = torchvision_resnet18().state_dict()
    encoder = ours("resnet18")
    adopt(encoder, weights, "torchvision")
    state = encoder.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in state)
    left = set(weights) - set(state)
    assert {name.rpartition(".")[2] for name in left} == {
        "running_mean", "running_var", "num_batches_tracked", "weight", "bias",
    }  # fmt: skip
    assert {name for name in left if name.endswith(("weight", "bias"))} == {"fc.weight", "fc.bias"}


def test_an_encoder_that_normalises_batches_takes_their_statistics_and_answers_as_torchvisions() -> None:
    with forked(0):
        theirs = torchvision_resnet18().train()
        theirs.fc = nn.Identity()
        theirs(torch.rand(8, 3, 32, 32))  # which makes statistics
        encoder = build_encoder(Encoder(norm="batch"), Images(size=32, channels=3)).eval()
    images, weights = torch.rand(2, 3, 32, 32), theirs.eval().state_dict()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for family in ("torchvision", "timm", "polyclinic"):
        encoder.load_state_dict(before)
        adopt(encoder, weights, family)
        torch.testing.assert_close(encoder(images), theirs(Normalise(3)(images)), atol=1e-5, rtol=1e-4)
    with pytest.raises(StudyError, match=r"have bn1\.running_mean"):
        adopt(ours("resnet18"), weights, "polyclinic")
    with pytest.raises(StudyError, match=r"lack bn1\.running_mean"):
        adopt(encoder, ours("resnet18").state_dict(), "torchvision")


@pytest.mark.parametrize(("name", "first"), [("resnet18", "conv1"), ("vit_tiny", "patch_embed.proj")])
def test_colour_weights_see_grey_as_three_equal_colours(name: str, first: str) -> None:
    colour, grey = ours(name), ours(name, channels=1)
    adopt(grey, colour.state_dict(), "polyclinic")
    image = torch.randn(2, 1, 32, 32)
    found, expected = (encoder.get_submodule(first) for encoder in (grey, colour))
    assert torch.allclose(found(image), expected(image.expand(-1, 3, -1, -1)), atol=1e-5)


def test_bit_sees_grey_as_three_equal_colours() -> None:
    colour, grey = ours("bit_resnet50"), ours("bit_resnet50", channels=1)
    adopt(grey, colour.state_dict(), "polyclinic")
    image = torch.rand(2, 1, 32, 32)
    assert torch.equal(grey(image), colour(image.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: {**w, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
            r"layer1\.0\.conv1\.weight is \(64, 64, 1",
        ),
        (lambda w: {n: v for n, v in w.items() if n != "layer2.0.bn1.bias"}, r"lack layer2\.0\.bn1\.bias"),
        (lambda w: {**w, "layer9.weight": torch.zeros(1)}, r"have layer9\.weight"),
        (lambda w: {**w, "bn1.weight": torch.full((64,), torch.nan)}, r"bn1\.weight is not made of finite numbers"),
        (lambda w: {**w, "bn1.weight": torch.ones(64, dtype=torch.complex64)}, r"bn1\.weight is not made of finite"),
        (lambda w: {f"module.{n}": v for n, v in w.items()}, r"and \d+ more"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, said: str) -> None:
    encoder = ours("resnet18")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(StudyError, match=said):
        adopt(encoder, change(ours("resnet18").state_dict()), "polyclinic")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def write(folder: Path, weights: dict[str, Tensor], **words: object) -> Path:
    save_file({n: v.contiguous() for n, v in weights.items()}, folder / "weights.safetensors")
    values = {"channels": 3, "name": "resnet18", "file": "weights.safetensors", "family": "polyclinic", **words}
    (folder / "study.toml").write_text(STUDY.format(**values))
    return folder / "study.toml"


def test_a_study_starts_from_a_file_and_its_hash_knows_the_content_but_not_the_path(tmp_path: Path) -> None:
    from polyclinic.artifacts import load_weights

    weights = ours("resnet18").state_dict()
    study = load_study(write(tmp_path, weights))
    assert study.encoder.init != "random"
    tensors = initial_tensors(study, 0, None, load_weights(study.encoder.init))
    assert all((tensors[f"encoder.{name}"] == value.numpy()).all() for name, value in weights.items())
    assert not (tensors["encoder.conv1.weight"] == encoder_of(study, None).conv1.weight.detach().numpy()).all()  # type: ignore[operator, union-attr]
    (tmp_path / "elsewhere").mkdir()
    moved = load_study(write(tmp_path / "elsewhere", weights))
    assert moved.hash == study.hash
    assert str(tmp_path) not in study.canonical()
    assert str(tmp_path) not in study.to_toml(simulation=False)
    other = load_study(write(tmp_path, {n: v + 1 for n, v in weights.items()}))
    assert other.hash != study.hash
    with pytest.raises(StudyError, match="not the file that the study names"):
        load_weights(study.encoder.init)


def test_missing_weights_are_an_error_where_they_are_first_read(tmp_path: Path) -> None:
    path = write(tmp_path, ours("resnet18").state_dict())
    resolved = load_study(path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(StudyError, match="cannot read the initial weights"):
        load_study(path)
    (tmp_path / "resolved.toml").write_text(resolved.to_toml())
    assert load_study(tmp_path / "resolved.toml") == resolved  # a run that has begun needs them no more


def test_a_file_is_not_opened_where_its_content_is_stated(tmp_path: Path) -> None:
    stated = STUDY.format(channels=3, name="resnet18", file="/dev/zero", family="timm")
    (tmp_path / "study.toml").write_text(stated)
    with pytest.raises(StudyError, match="cannot read the initial weights"):
        load_study(tmp_path / "study.toml")
    (tmp_path / "study.toml").write_text(stated.replace("family", f'sha256 = "{"0" * 64}", family'))
    assert load_study(tmp_path / "study.toml").encoder.init.sha256 == "0" * 64  # type: ignore[union-attr]
