"""SSSD: MAE where its weight is 0, and beside it the distance from the decoder's tokens."""

import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from polyclinic.encoders.vit import VisionTransformer
from polyclinic.methods.base import Batch, ViewBatch
from polyclinic.methods.mae import MAE
from polyclinic.methods.sssd import SSSD
from polyclinic.seeding import forked
from polyclinic.stages import MAE_VIEWS, MAEStage, SSSDStage

SETTINGS = {"rounds": 1, "decoder_depth": 1, "decoder_width": 32, "views": MAE_VIEWS}


def encoder() -> VisionTransformer:
    return VisionTransformer(32, 1, patch=8, dim=48, heads=3, depth=2)


def distilled(weight: float = 1.0) -> tuple[SSSD, nn.Module]:
    method = SSSD(SSSDStage.model_validate({"method": "sssd", "weight": weight, **SETTINGS}))
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


def loop(visible: Tensor, known: Tensor, predictor: nn.Linear) -> list[float]:
    """The distillation, one token and one number at a time."""

    def standard(token: list[float]) -> list[float]:
        mean = sum(token) / len(token)
        variance = sum((x - mean) ** 2 for x in token) / len(token)
        return [(x - mean) / (variance + 1e-5) ** 0.5 for x in token]

    weight, bias = predictor.weight.tolist(), predictor.bias.tolist()
    losses = []
    for n in range(len(visible)):
        errors = []
        for said, wanted in zip(visible[n].tolist(), known[n].tolist(), strict=True):
            x = standard(said)
            mapped = [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]
            errors += [(a - b) ** 2 for a, b in zip(mapped, standard(wanted), strict=True)]
        losses.append(sum(errors) / len(errors))
    return losses


def test_the_distillation_equals_a_loop() -> None:
    method, module = distilled(weight=0.7)
    views = drawn(method)
    with torch.no_grad():
        _, visible, known = module(views.views[0], views.extra["order"])
        found = (method.loss(module, views) - distilled(0.0)[0].loss(module, views)) / 0.7
    expected = loop(visible, known, module.get_submodule("predictor"))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


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
    decoder = module.get_submodule("decoder")
    frozen = decoder(module(views.views[0].double(), views.extra["order"])[1], views.extra["order"])
    still = tuple(part.detach() for part in frozen)
    decoder.forward = lambda visible, order: still  # type: ignore[method-assign]

    def losses(images: Tensor) -> Tensor:
        return method.loss(module, ViewBatch((images,), views.patients, views.extra))

    assert torch.autograd.gradcheck(losses, (views.views[0].double().requires_grad_(),), fast_mode=True)
