"""The supervised loss against a loop, class weights, frozen and layer-wise rates."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polyclinic import study
from polyclinic.encoders import build_encoder
from polyclinic.methods.base import Batch
from polyclinic.methods.supervised import Supervised
from polyclinic.seeding import forked
from polyclinic.stages import Finetune
from polyclinic.training import layers_behind, make_optimizer

NAN = math.nan


def method_of(classes: int, **settings: object) -> Supervised:
    return Supervised(
        Finetune.model_validate({"kind": "finetune", "method": "supervised", "rounds": 4} | settings), classes
    )


def slow(logits: Tensor, targets: Tensor, multi_label: bool, balanced: bool) -> list[float]:
    """The losses of the module's docstring, number by number."""
    n, classes = targets.shape
    losses = []
    for i in range(n):
        terms = []
        for k in range(classes):
            y, z = targets[i, k].item(), logits[i, k].item()
            same = sum(targets[j, k].item() == y for j in range(n))
            weight = (n / ((2 if multi_label else classes) * same)) if balanced else 1.0
            if multi_label:
                terms.append(-weight * math.log(1 / (1 + math.exp(-z if y else z))) / classes)
            elif y:
                terms.append(-weight * (z - math.log(sum(math.exp(v.item()) for v in logits[i]))))
        losses.append(sum(terms))
    return losses


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("weights", ["balanced", "none"])
@pytest.mark.parametrize(("n", "classes"), [(2, 2), (7, 3), (30, 5)])
def test_losses_equal_a_loop(multi_label: bool, weights: str, n: int, classes: int) -> None:
    rng = np.random.default_rng(n)
    logits = torch.from_numpy(rng.normal(0, 3, (n, classes)))
    targets = torch.zeros(n, classes, dtype=torch.float64)
    if multi_label:
        targets = torch.from_numpy((rng.random((n, classes)) < 0.4).astype(np.float64))
    else:
        targets[torch.arange(n), torch.from_numpy(rng.integers(0, classes, n))] = 1
    method = method_of(classes, multi_label=multi_label, class_weights=weights)
    method.balance(targets)
    expected = slow(logits, targets, multi_label, weights == "balanced")
    assert method.losses(logits, targets).tolist() == pytest.approx(expected, rel=1e-12)


def test_balanced_weights_have_mean_one_and_an_absent_class_none() -> None:
    targets = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [NAN, NAN, NAN]])
    method = method_of(3)
    method.balance(targets)
    weights = (targets[:4] * method.weights[1]).sum(dim=1)
    assert weights[:3].sum() == pytest.approx(weights[3].item())
    assert method.weights[1, 2] == 0
    assert torch.isfinite(method.losses(torch.zeros(4, 3), targets[:4])).all()


def test_images_without_a_label_are_not_looked_at() -> None:
    method = method_of(2)
    targets = torch.tensor([[1.0, 0], [NAN, NAN], [0, 1]])
    batch = Batch(torch.rand(3, 1, 16, 16), torch.arange(3), targets)
    views = method.views(batch, torch.Generator().manual_seed(0))
    assert len(views.views[0]) == 2
    assert views.patients.tolist() == [0, 2]
    nobody = Batch(batch.images, batch.patients, torch.full((3, 2), NAN))
    assert method.loss(torch.nn.Identity(), method.views(nobody, torch.Generator())).shape == (0,)


def test_gradients_of_every_layer_are_those_of_finite_differences() -> None:
    images = study.Images(size=16)
    with forked(0):
        module = method_of(2).build(build_encoder(study.Encoder(name="vit_tiny", patch=8), images)).double()
    method = method_of(2)
    targets = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    images_of_two = torch.rand(2, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        # Features are float32 by contract; the check needs the double that is below.
        tokens = module.get_submodule("encoder").tokens(images_of_two)  # type: ignore[operator]
        return method.losses(module.get_submodule("head")(tokens.mean(dim=1)), targets).mean()

    torch.autograd.backward(loss())
    for name in ("encoder.patch_embed.proj.weight", "encoder.blocks.5.mlp.fc1.weight", "head.weight"):
        parameter = module.get_parameter(name)
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        assert ((above - below) / 2e-5).item() == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 5), ("bit_resnet50", 5), ("vit_tiny", 13)])
def test_the_stem_learns_slowest_and_the_head_at_full_rate(name: str, layers: int) -> None:
    method = method_of(2, layer_decay=0.5)
    with forked(0):
        encoder = build_encoder(study.Encoder(name=name, patch=8), study.Images(size=32))  # type: ignore[arg-type]
        module = method.build(encoder)
    behind = layers_behind(module)
    assert set(behind.values()) == set(range(layers + 1))
    assert {n for n, k in behind.items() if k == 0} == {"head.weight", "head.bias"}
    stems = {n.split(".")[1] for n, k in behind.items() if k == layers}
    assert stems <= {"conv1", "bn1", "stem", "patch_embed"}
    optimizer = make_optimizer(module, method.stage)
    scales = {p: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert all(scales[p] == 0.5 ** behind[n] for n, p in module.named_parameters())
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in module.parameters() if p.ndim > 1}
