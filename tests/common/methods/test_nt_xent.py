"""NT-Xent against a loop, against lightly, and the rule about a patient's other images."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from polyclinic.methods.nt_xent import nt_xent


def projections(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


def loop(first: Tensor, second: Tensor, patients: Tensor, temperature: float) -> list[float]:
    """The definition, one view and one comparison at a time."""
    n, losses = len(first), []
    z = [row.tolist() for row in torch.cat([first, second])]

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(z[i], z[j], strict=True))
        return dot / (math.hypot(*z[i]) * math.hypot(*z[j])) / temperature

    for image in range(n):
        views = []
        for i, p in ((image, image + n), (image + n, image)):
            others = [k for k in range(2 * n) if patients[k % n] != patients[image]]
            denominator = math.exp(similarity(i, p)) + sum(math.exp(similarity(i, k)) for k in others)
            views.append(-math.log(math.exp(similarity(i, p)) / denominator))
        losses.append(sum(views) / 2)
    return losses


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("patients", [[0, 1], [0, 1, 2, 3, 4], [0, 0, 1], [5, 2, 5, 5, 9, 2, 7], list(range(12))])
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_equals_a_loop(patients: list[int], dim: int, temperature: float) -> None:
    first, second = projections(len(patients), dim)
    numbers = torch.tensor(patients)
    expected = torch.tensor(loop(first, second, numbers, temperature), dtype=torch.float64)
    torch.testing.assert_close(nt_xent(first, second, numbers, temperature), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize(("n", "dim"), [(2, 4), (7, 16), (64, 128)])
def test_equals_lightly_for_distinct_patients(n: int, dim: int, temperature: float) -> None:
    first, second = projections(n, dim)
    theirs = NTXentLoss(temperature=temperature)(first, second)
    ours = nt_xent(first, second, torch.arange(n), temperature).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_patients_other_images_are_neither_negatives_nor_positives() -> None:
    """Moving another image of the same patient changes nothing; moving another patient's does."""
    first, second = projections(4, 8)
    patients = torch.tensor([0, 0, 1, 2])
    before = nt_xent(first, second, patients, 0.1)[0]
    for row, same in ((1, True), (2, False)):
        moved = first.clone()
        moved[row] = -moved[row] + 1
        assert torch.isclose(nt_xent(moved, second, patients, 0.1)[0], before, atol=1e-12) == same


def test_gradients_are_those_of_finite_differences() -> None:
    first, second = (z.requires_grad_() for z in projections(4, 3))
    patients = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, patients, 0.5), (first, second))


def test_agreeing_views_far_from_all_others_cost_nothing() -> None:
    z = torch.eye(4)
    torch.testing.assert_close(nt_xent(z, z, torch.arange(4), 0.01), torch.zeros(4), atol=1e-6, rtol=0)


def test_views_all_alike_cost_the_logarithm_of_their_number() -> None:
    z = torch.ones(5, 3)
    torch.testing.assert_close(nt_xent(z, z, torch.arange(5), 0.1), torch.full((5,), math.log(9)))


def test_autocast_does_not_round_the_similarities() -> None:
    first, second = (z.float() for z in projections(32, 64))
    plain = nt_xent(first, second, torch.arange(32), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(first, second, torch.arange(32), 0.1), plain)
        assert nt_xent(first.bfloat16(), second.bfloat16(), torch.arange(32), 0.1).dtype == torch.float32
