"""MLVICX: the order of its linear steps against the literal one, what learns, what is exported."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic import study
from polyclinic.artifacts import load_encoder, save_encoder
from polyclinic.encoders import build_encoder
from polyclinic.encoders.context import ContextBottleneck
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.methods.mlvicx import Places, place_means
from polyclinic.methods.vicreg import vicreg
from polyclinic.seeding import forked
from polyclinic.stages import MLVICXStage, Views

IMAGES = study.Images(size=32)
ENCODERS = ["resnet18", "vit_tiny"]


def multi_level(name: str = "resnet18", context: bool = True, **settings: object) -> tuple[Method, nn.Module]:
    values = {"method": "mlvicx", "rounds": 1, "projection": 24, "common": 12, "views": Views(), **settings}
    method = make_method(MLVICXStage.model_validate(values))
    with forked(0):
        encoder = build_encoder(study.Encoder.model_validate({"name": name, "context": context}), IMAGES)
        return method, method.build(encoder)


def drawn(method: Method, n: int = 4) -> ViewBatch:
    images = torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return method.views(Batch(images, torch.arange(n)), torch.Generator().manual_seed(1))


def literal(places: Places, levels: list[Tensor]) -> Tensor:
    """Resize every level to 64 x 64, convolve, sum, average down to 4 x 4: as it is written in the paper."""
    maps = [
        convolve(F.interpolate(level, size=(64, 64), mode="bilinear", align_corners=False))
        for level, convolve in zip(levels, places.common, strict=True)
    ]
    return F.adaptive_avg_pool2d(torch.stack(maps).sum(dim=0), 4)


@pytest.mark.parametrize("sides", [(48, 24, 12, 6, 3), (16, 8, 4, 2, 1), (112, 56, 28, 14, 7), (64, 64, 5, 4, 100)])
def test_pooling_first_equals_the_literal_order(sides: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [8, 8, 16, 32, 64]
    levels = [torch.randn(2, c, s, s, generator=generator) for c, s in zip(widths, sides, strict=True)]
    with forked(0):
        places = Places(widths, common=12, width=8)
    torch.testing.assert_close(places.fused(levels), literal(places, levels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 3, 48, 64, 112])
def test_place_means_are_means(side: int) -> None:
    matrix = place_means(side)
    assert matrix.shape == (4, side)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(4), atol=1e-5, rtol=0)
    assert (matrix >= 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_loss_is_that_of_the_whole_and_of_the_places(name: str) -> None:
    method, module = multi_level(name, weight=0.5)
    views = drawn(method)
    with torch.no_grad():
        whole, places = module(torch.cat(views.views))
        expected = vicreg(*whole.chunk(2)) + 0.5 * vicreg(*places.chunk(2))
        found = method.loss(module, views)
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], expected)


def test_without_weight_it_is_vicreg_alone() -> None:
    method, module = multi_level(context=False, weight=0)
    assert {name.split(".")[0] for name in module.state_dict()} == {"encoder", "head"}
    assert not any(isinstance(part, ContextBottleneck) for part in module.modules())
    views = drawn(method)
    whole = module.get_submodule("head")(module.get_submodule("encoder")(torch.cat(views.views)))
    torch.testing.assert_close(method.loss(module, views)[0], vicreg(*whole.chunk(2)))


@pytest.mark.parametrize("name", ENCODERS)
def test_all_of_it_learns_and_all_of_it_is_shared(name: str) -> None:
    method, module = multi_level(name)
    method.loss(module, drawn(method)).sum().backward()
    idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A shift of all projections, or of all keys of an attention, changes nothing.
    assert all(n.endswith("bias") for n in idle), idle
    assert set(method.shared(module)) == set(module.state_dict())


@pytest.mark.parametrize("name", ENCODERS)
def test_its_gradient_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # features leave an encoder in float32
    method, module = multi_level(name)
    module.double()
    views = drawn(method, n=3)
    second = views.views[1].double()

    def loss(images: Tensor) -> Tensor:
        return method.loss(module, ViewBatch((images, second), views.patients, {}))

    assert torch.autograd.gradcheck(loss, (views.views[0].double().requires_grad_(),), fast_mode=True)


def test_a_batch_of_one_image_teaches_nothing() -> None:
    method, module = multi_level()
    assert method.loss(module, drawn(method, n=1)).shape == (0,)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_exported_encoder_keeps_its_bottlenecks(name: str, tmp_path) -> None:
    plain = study.resolve(
        {
            "study": {"name": "t"},
            "images": {"size": 32},
            "encoder": {"name": name},
            "stages": [{"kind": "pretrain", "method": "mlvicx", "rounds": 1}],
        }
    )
    assert plain.encoder.context
    with forked(3):
        encoder = build_encoder(plain.encoder, plain.images).eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, plain)
    images = torch.rand(2, 1, 32, 32)
    again = load_encoder(tmp_path)
    assert sum(isinstance(part, ContextBottleneck) for part in again.modules()) == len(encoder.widths)
    with torch.no_grad():
        before = encoder(images)
        assert torch.equal(again(images), before)
        for part in again.modules():
            if isinstance(part, ContextBottleneck):
                part.places.bias += 1
        assert not torch.allclose(again(images), before)
