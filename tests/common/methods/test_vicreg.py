"""VICReg against a loop and against lightly, and its gradient."""

import math

import pytest
import torch
from lightly.loss import VICRegLoss
from torch import Tensor

from polyclinic.methods.vicreg import vicreg


def projections(n: int, dim: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    pair = scale * torch.randn(2, n, dim, generator=torch.Generator().manual_seed(n * dim), dtype=torch.float64)
    return pair[0], pair[1]


def loop(first: Tensor, second: Tensor) -> float:
    """The definition, one number at a time."""
    a, b = first.tolist(), second.tolist()
    n, dim = len(a), len(a[0])
    loss = 25 * sum((a[i][k] - b[i][k]) ** 2 for i in range(n) for k in range(dim)) / (n * dim)
    for z in (a, b):
        mean = [sum(row[k] for row in z) / n for k in range(dim)]
        cov = [
            [sum((row[j] - mean[j]) * (row[k] - mean[k]) for row in z) / (n - 1) for k in range(dim)]
            for j in range(dim)
        ]
        loss += 25 * sum(max(0.0, 1 - math.sqrt(cov[k][k] + 1e-4)) for k in range(dim)) / dim / 2
        loss += sum(cov[j][k] ** 2 for j in range(dim) for k in range(dim) if j != k) / dim
    return loss


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("n", "dim"), [(2, 1), (2, 5), (3, 4), (9, 16)])
def test_equals_a_loop(n: int, dim: int, scale: float) -> None:
    first, second = projections(n, dim, scale)
    assert math.isclose(float(vicreg(first, second)), loop(first, second), rel_tol=1e-10)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize(("n", "dim"), [(2, 4), (7, 16), (64, 128), (16, 512)])
def test_equals_lightly(n: int, dim: int, scale: float) -> None:
    first, second = projections(n, dim, scale)
    torch.testing.assert_close(vicreg(first, second), VICRegLoss()(first, second), atol=1e-6, rtol=0)


def test_its_gradient_is_exact() -> None:
    first, second = projections(5, 4, 0.5)
    assert torch.autograd.gradcheck(vicreg, (first.requires_grad_(), second.requires_grad_()))


def test_it_is_computed_in_float32_under_autocast() -> None:
    first, second = (z.float() for z in projections(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found = vicreg(first, second)
    assert found.dtype == torch.float32
    assert torch.equal(found, vicreg(first, second))


def test_a_collapsed_batch_costs_the_variance_term() -> None:
    constant = torch.ones(6, 3)
    assert math.isclose(float(vicreg(constant, constant)), 25 * (1 - math.sqrt(1e-4)), rel_tol=1e-5)
