import numpy as np
import pytest
import torch

from polyclinic.evaluation import NotMeasurable, alignment, collapsed, health
from polyclinic.stages import Views
from polyclinic.study import Compute

from ...tiny import in_memory


def slow_rank(x):
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    return np.exp(-sum(p * np.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("shape", [(20, 50), (200, 8), (30, 30)])
def test_rank_agrees_with_singular_values(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    assert health(x)["effective_rank"] == pytest.approx(slow_rank(x), rel=1e-5)


def test_isotropic_features_are_healthy():
    values = health(np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32))
    assert values["effective_rank"] == pytest.approx(64, rel=0.02)
    assert values["feature_spread"] == pytest.approx(1, rel=0.02)
    assert not collapsed(values)


def test_equal_features_have_collapsed():
    values = health(np.full((50, 32), 3.0))
    assert values == {"effective_rank": 1.0, "feature_spread": pytest.approx(0, abs=1e-9), "uniformity": 0.0}
    assert collapsed(values)


def test_nearly_equal_features_have_collapsed_although_their_noise_has_full_rank():
    x = 1 + 1e-3 * np.random.default_rng(0).normal(size=(200, 32))
    assert health(x)["effective_rank"] > 20
    assert collapsed(health(x))


def test_features_along_one_line_have_collapsed_although_they_are_spread():
    x = np.outer(np.linspace(-1, 1, 100), np.ones(16))
    assert health(x)["feature_spread"] > 0.9
    assert collapsed(health(x))


def test_too_few_and_not_finite_are_not_measured():
    with pytest.raises(NotMeasurable, match="3 images"):
        health(np.ones((3, 4)))
    with pytest.raises(NotMeasurable, match="not finite"):
        health(np.full((30, 4), np.nan))


def test_uniformity_equals_a_loop_and_grows_as_features_spread():
    x = np.random.default_rng(1).normal(size=(20, 5))
    unit = [row / np.sqrt(sum(v * v for v in row)) for row in x]
    pairs = [np.exp(-2 * sum((a - b) ** 2)) for i, a in enumerate(unit) for b in unit[:i]]
    assert health(x)["uniformity"] == pytest.approx(-np.log(np.mean(pairs)))
    narrow = health(x * 0.1 + 1)["uniformity"]
    assert narrow < health(x)["uniformity"] < health(np.eye(20))["uniformity"] == pytest.approx(4)


def test_alignment_is_the_distance_of_two_views():
    cohort, compute, cpu = in_memory(80), Compute(threads=1), torch.device("cpu")

    def measure(encoder: torch.nn.Module, **views: object) -> float:
        still = {"crop": (1.0, 1.0), "flip": False, "rotation": 0.0, "jitter": 0.0}
        return alignment(encoder, cohort, Views.model_validate({**still, **views}), compute, cpu, seed=0)

    flat = torch.nn.Flatten()
    assert measure(flat) == pytest.approx(0, abs=1e-6)
    assert measure(flat, noise=0.05) < measure(flat, noise=0.3) < 2
    assert measure(flat, noise=0.3) == measure(flat, noise=0.3)

    class Random(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(images), 2000, generator=source)

    source = torch.Generator().manual_seed(0)
    assert measure(Random()) == pytest.approx(2, rel=0.02)
