"""SSSD: MAE where its weight is 0, and beside it the distance from the decoder's tokens."""

import copy
from typing import cast

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from polyclinic.encoders.vit import VisionTransformer
from polyclinic.methods import sssd
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.mae import MAE, Decoder
from polyclinic.methods.sssd import SSSD, second_look
from polyclinic.seeding import forked
from polyclinic.stages import MAE_VIEWS, MAEStage, SSSDStage

SETTINGS = {"rounds": 1, "decoder_depth": 1, "decoder_width": 32, "views": MAE_VIEWS}


def encoder() -> VisionTransformer:
    return VisionTransformer(32, 1, patch=8, dim=48, heads=3, depth=2)


def distilled(weight: float = 1.0, mask: float = 0.75) -> tuple[SSSD, nn.Module]:
    method = SSSD(SSSDStage.model_validate({"method": "sssd", "weight": weight, "mask": mask, **SETTINGS}))
    with forked(0):
        return method, method.build(encoder())


def plain() -> tuple[MAE, nn.Module]:
    method = MAE(MAEStage.model_validate({"method": "mae", **SETTINGS}))
    with forked(0):
        return method, method.build(encoder())


def drawn(method: MAE, n: int = 3) -> ViewBatch:
    images = torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return method.views(Batch(images, torch.arange(n)), torch.Generator().manual_seed(0))


def test_without_weight_every_step_is_maes_bit_for_bit() -> None:
    trained = []
    for method, module in (distilled(0.0), plain()):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            method.loss(module, drawn(method)).mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        trained.append(module.state_dict())
    ours, theirs = trained
    assert set(ours) - set(theirs) == {"predictor.weight", "predictor.bias"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def loop(visible: Tensor, taught: Tensor, predictor: nn.Linear) -> list[float]:
    """The distillation, one token and one number at a time."""

    def standard(token: list[float]) -> list[float]:
        mean = sum(token) / len(token)
        variance = sum((x - mean) ** 2 for x in token) / len(token)
        return [(x - mean) / (variance + 1e-5) ** 0.5 for x in token]

    weight, bias = predictor.weight.tolist(), predictor.bias.tolist()
    losses = []
    for n in range(len(visible)):
        errors = []
        for said, wanted in zip(visible[n].tolist(), taught[n].tolist(), strict=True):
            x = standard(said)
            mapped = [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]
            errors += [(a - b) ** 2 for a, b in zip(mapped, standard(wanted), strict=True)]
        losses.append(sum(errors) / len(errors))
    return losses


def second_looks(module: nn.Module, images: Tensor, order: Tensor, k: int) -> Tensor:
    """(n, k, width) of patches order[:, :k], one image and one block at a time."""
    encoder, decoder = cast(VisionTransformer, module.get_submodule("encoder")), module.get_submodule("decoder")
    found = []
    for image, patches in zip(images, order, strict=True):
        first, second = patches[:k], patches[k : 2 * k]
        tokens = cast(nn.Embedding, decoder.get_submodule("mask_token")).weight.repeat(len(patches), 1)
        tokens[second] = decoder.get_submodule("embed")(encoder.tokens(image[None], second[None])[0])
        tokens = (tokens + cast(Tensor, decoder.positions))[None]
        for block in decoder.get_submodule("blocks").children():
            tokens = block(tokens)
        found.append(tokens[0, first])
    return torch.stack(found)


@pytest.mark.parametrize("mask", [0.25, 0.5, 0.75])
def test_the_distillation_equals_a_loop(mask: float) -> None:
    method, module = distilled(weight=0.7, mask=mask)
    views = drawn(method)
    images, order = views.views[0], views.extra["order"]
    with torch.no_grad():
        _, visible = module(images, order)
        found = (method.loss(module, views) - distilled(0.0, mask)[0].loss(module, views)) / 0.7
        taught = second_looks(module, images, order, visible.shape[1])
    assert visible.shape[1] == 16 * (1 - mask)
    expected = loop(visible, taught, module.get_submodule("predictor"))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_what_a_patch_is_taught_does_not_depend_on_its_pixels() -> None:
    _, module = distilled()
    images, order = torch.rand(2, 1, 32, 32), torch.arange(16).expand(2, 16)
    encoder, decoder = cast(VisionTransformer, module.get_submodule("encoder")), module.get_submodule("decoder")
    taught = second_look(encoder, cast(Decoder, decoder), images, order, 4)
    other = images.clone()
    other[:, :, :8] = 0.0  # the first row of patches
    assert torch.equal(second_look(encoder, cast(Decoder, decoder), other, order, 4), taught)
    other[:, :, 8:16] = 0.0  # the second, which is seen
    assert not torch.equal(second_look(encoder, cast(Decoder, decoder), other, order, 4), taught)


def test_under_bf16_every_weight_has_a_gradient() -> None:
    """Autocast keeps the weights that it has cast: those of the look without gradients must not serve the other."""
    method, module = distilled()
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.loss(module, drawn(method))
    losses.sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_the_decoder_is_not_taught_by_the_encoder() -> None:
    """Without the reconstruction, only encoder and predictor have a gradient: the decoder's side is stopped."""
    method, module = distilled(weight=1.0)
    views = drawn(method)
    (method.loss(module, views) - distilled(0.0)[0].loss(module, views)).sum().backward()
    for name, parameter in module.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-6)
        if name.startswith("decoder."):
            assert not moved, name
        elif name.startswith("predictor."):
            assert moved, name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_opacus_takes_per_sample_gradients() -> None:
    method, module = distilled()
    assert method.separable and ModuleValidator.validate(module) == []
    views = drawn(method)
    order = views.extra["order"]
    wrapped = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
    method.loss(wrapped, views).sum().backward()
    for i in range(3):
        module.zero_grad()
        alone = ViewBatch((views.views[0][i : i + 1],), views.patients[i : i + 1], {"order": order[i : i + 1]})
        method.loss(module, alone).sum().backward()
        for (name, one), many in zip(module.named_parameters(), wrapped.parameters(), strict=True):
            assert one.grad is not None, name
            torch.testing.assert_close(many.grad_sample[i], one.grad, atol=1e-6, rtol=1e-4)


def test_its_gradient_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the student's side: what is stopped is no part of the derivative, so the teacher is held still."""
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)
    method, module = distilled()
    module.double()
    views = drawn(method, n=2)
    encoder, decoder = cast(VisionTransformer, module.get_submodule("encoder")), module.get_submodule("decoder")
    still = second_look(encoder, cast(Decoder, decoder), views.views[0].double(), views.extra["order"], 4)
    monkeypatch.setattr(sssd, "second_look", lambda *_: still)

    def losses(images: Tensor) -> Tensor:
        return method.loss(module, ViewBatch((images,), views.patients, views.extra))

    assert torch.autograd.gradcheck(losses, (views.views[0].double().requires_grad_(),), fast_mode=True)
