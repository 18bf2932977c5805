"""Every encoder of the table: shapes, normalisation, names, precision, per-sample gradients."""

import copy
from typing import get_args

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from polyclinic import study
from polyclinic.encoders import ENCODERS, build_encoder
from polyclinic.encoders.normalise import Normalise
from polyclinic.errors import StudyError
from polyclinic.seeding import forked

SMALL = ["resnet18", "vit_tiny"]
DIMS = {"resnet18": 512, "resnet50": 2048, "bit_resnet50": 2048, "vit_tiny": 192, "vit_small": 384, "vit_base": 768}


def build(name: str, channels: int = 1, size: int = 32, seed: int = 0) -> nn.Module:
    with forked(seed):
        return build_encoder(
            study.Encoder.model_validate({"name": name}),
            study.Images.model_validate({"size": size, "channels": channels}),
        )


def test_the_table_is_the_studys_vocabulary() -> None:
    assert set(ENCODERS) == set(get_args(study.EncoderName)) == set(DIMS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "bit_resnet50", "vit_tiny", "vit_small"])
def test_features_have_the_promised_shape(name: str, channels: int) -> None:
    encoder = build(name, channels)
    features = encoder(torch.rand(2, channels, 32, 32))
    assert features.shape == (2, DIMS[name]) == (2, encoder.dim)
    assert features.dtype == torch.float32
    assert features.std() > 0.05


def test_vit_base_on_the_meta_device_has_its_size() -> None:
    with torch.device("meta"):
        encoder = build("vit_base")
    assert encoder.dim == 768
    assert 85e6 < sum(p.numel() for p in encoder.parameters()) < 86e6


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_repeats_the_initial_weights(name: str) -> None:
    first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", SMALL)
def test_state_holds_trainable_tensors_only(name: str) -> None:
    encoder = build(name)
    assert set(encoder.state_dict()) == {key for key, _ in encoder.named_parameters()}


def test_resnet_keeps_torchvisions_names_and_shapes_but_for_norms() -> None:
    import torchvision

    theirs = torchvision.models.resnet18(weights=None).state_dict()
    ours = build("resnet18", channels=3).state_dict()
    for key, tensor in ours.items():
        assert theirs[key].shape == tensor.shape
    left_out = {key.rsplit(".", 1)[1] for key in set(theirs) - set(ours) if not key.startswith("fc.")}
    assert left_out == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_computes_what_torchvisions_computes_with_the_same_norm(depth: int) -> None:
    import torchvision

    ours = build(f"resnet{depth}", channels=3)
    builder = getattr(torchvision.models, f"resnet{depth}")
    theirs = builder(weights=None, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(Normalise(3)(images)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_fixed_and_never_leaves(channels: int) -> None:
    module = Normalise(channels)
    assert module.state_dict() == {} and list(module.parameters()) == []
    images = torch.rand(4, channels, 8, 8)
    torch.testing.assert_close(module(images) * module.std + module.mean, images)


@pytest.mark.parametrize("name", SMALL)
def test_images_do_not_influence_each_other(name: str) -> None:
    """No batch statistics: an image's features are the same alone and in company."""
    encoder = build(name).train()
    images = torch.rand(4, 1, 32, 32)
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_gives_nearly_the_same_features(name: str) -> None:
    encoder = build(name)
    images = torch.rand(4, 1, 32, 32)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", SMALL)
def test_opacus_takes_per_sample_gradients(name: str) -> None:
    """Opacus's gradient of each sample equals a loop over samples."""
    model = nn.Sequential(build(name), nn.Linear(DIMS[name], 2))
    assert ModuleValidator.validate(model) == []
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = [gradients(model, images[i : i + 1]) for i in range(2)]
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    wrapped(images).square().sum().backward()
    for key, parameter in wrapped.named_parameters():
        ours = torch.stack([g[key.removeprefix("_module.")] for g in expected])
        torch.testing.assert_close(parameter.grad_sample, ours, atol=1e-3, rtol=1e-3)


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    unknown = study.Encoder.model_construct(name="alexnet", patch=8)
    with pytest.raises(StudyError, match=r"alexnet[\s\S]*resnet18, resnet50, bit_resnet50, vit_tiny"):
        build_encoder(unknown, study.Images())
