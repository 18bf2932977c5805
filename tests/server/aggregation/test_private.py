"""The private fold: against a slow twin, its sensitivity exactly, its noise measured, and what it spends."""

import math
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from scipy import optimize, stats

from polyclinic.errors import StudyError
from polyclinic.privacy.accounting import ORDERS
from polyclinic.study import SitePrivacy
from polyclinic_server.aggregation.fedavg import CHUNK, STEP
from polyclinic_server.aggregation.private import Budget, EpsilonSpent, PrivateMean, what_the_noise_means

from ...tiny import same_bits

Update = dict[str, NDArray[np.float32]]

SHAPES = {"a.weight": (3, 4), "b": (), "c": (0, 5), "d": (7,)}
SILENT = 1e-12
"""Noise so small that none of it reaches the next step of the fixed point."""
ZEROS = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def privacy(noise: float = SILENT, clip: float = 1.0, epsilon: float = 8.0, delta: float = 1e-5) -> SitePrivacy:
    return SitePrivacy(mode="site", noise=noise, clip=clip, epsilon=epsilon, delta=delta)


def draw(rng: np.random.Generator, scale: float) -> Update:
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def fold(start: Update, updates: list[Update], seats: int, settings: SitePrivacy) -> Update:
    rule = PrivateMean(start, settings, seats)
    for update in updates:
        rule.add(update.items())
    return rule.close(start)


@pytest.mark.parametrize("seats", [3, 5])
@pytest.mark.parametrize("clip", [1e-2, 1.0, 50.0])
def test_the_sum_is_that_of_a_slow_twin(seats: int, clip: float) -> None:
    rng = np.random.default_rng(seats)
    start, updates = draw(rng, 1.0), [draw(rng, scale) for scale in (1e-3, 1.0, 30.0)]
    new = fold(start, updates, seats, privacy(clip=clip))
    factors = [
        min(1.0, clip / math.sqrt(math.fsum(float(v) ** 2 for t in u.values() for v in t.flat))) for u in updates
    ]
    assert len({factor < 1 for factor in factors}) == 2
    for name, value in start.items():
        for place in range(value.size):
            moved = math.fsum(f * float(u[name].flat[place]) for f, u in zip(factors, updates, strict=True))
            expected = float(value.flat[place]) + moved / seats
            bound = (len(updates) * STEP + 1e-9 * clip) / seats + np.spacing(np.float32(abs(expected)))
            assert abs(new[name].flat[place] - expected) <= bound


def anything(rng: np.random.Generator, size: int, clip: float) -> Iterator[NDArray[np.float32]]:
    """Updates by which a site might move a sum too far."""
    plain = rng.standard_normal(size).astype(np.float32)
    for scale in (0.0, 1e-45, 1e-30, 1e-8, clip / math.sqrt(size), clip, 1e4, 1e30):
        yield (scale * plain.astype(np.float64)).astype(np.float32)
    spike = np.zeros(size, np.float32)
    spike[-1] = 1e30
    yield spike
    yield np.full(size, np.finfo(np.float32).max)
    yield np.full(size, 0.6 * STEP, np.float32)  # rounded to the nearest, all would be 1 step, and the norm larger
    yield np.full(size, np.nextafter(np.float32(clip / math.sqrt(size)), np.float32(1)))


@pytest.mark.parametrize("clip", [400 * STEP, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("size", [1, 1000, CHUNK - 1, 2 * CHUNK + 3])
def test_whatever_one_site_sends_moves_the_sum_by_no_more_than_the_clip(size: int, clip: float) -> None:
    rng = np.random.default_rng(size)
    start = {"x": np.zeros(size, np.float32)}
    others = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]
    for update in anything(rng, size, clip):
        with_it, without = (PrivateMean(start, privacy(clip=clip), 3) for _ in range(2))
        for other in others:
            with_it.add([("x", other)])
            without.add([("x", other)])
        with_it.add([("x", update)])
        moved = sum(int(step) ** 2 for step in with_it._sums["x"] - without._sums["x"])
        assert moved * Fraction(STEP) ** 2 <= Fraction(clip) ** 2  # exactly, without any tolerance


def test_tensors_are_clipped_together() -> None:
    start = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    new = fold(start, [{"a": np.array([3], np.float32), "b": np.array([4], np.float32)}], 1, privacy())
    assert new["a"] == pytest.approx(0.6)
    assert new["b"] == pytest.approx(0.8)


def test_the_sum_is_divided_by_the_seats_however_few_have_replied() -> None:
    update = {name: np.full(shape, 2.0**-8, np.float32) for name, shape in SHAPES.items()}
    for replies in (1, 2):
        new = fold(ZEROS, [update] * replies, 8, privacy())
        assert all((value == replies * 2.0**-11).all() for value in new.values())


@pytest.mark.parametrize(("noise", "clip", "seats"), [(1.0, 1.0, 3), (0.5, 0.02, 1), (4.0, 10.0, 40)])
def test_the_noise_has_the_deviation_that_is_accounted_for(noise: float, clip: float, seats: int) -> None:
    start = {"x": np.zeros(3 * CHUNK, np.float32), "y": np.zeros((64, CHUNK), np.float32)}
    new = fold(start, [], seats, privacy(noise, clip))
    values = np.concatenate([value.reshape(-1) for value in new.values()]).astype(np.float64)
    squares = float(np.sum(values**2)) / (noise * clip / seats) ** 2
    low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], values.size)
    assert low < squares < high
    assert stats.kstest(values, stats.norm(scale=noise * clip / seats).cdf).pvalue > 1e-9
    repeated = values.reshape(-1, CHUNK) @ values.reshape(-1, CHUNK).T / (CHUNK * (noise * clip / seats) ** 2)
    assert np.abs(repeated - np.eye(len(repeated))).max() < 8 / math.sqrt(CHUNK)  # each chunk and tensor has its own


def test_two_rounds_have_different_noise() -> None:
    results = [fold(ZEROS, [], 3, privacy(noise=1.0)) for _ in range(2)]
    assert not same_bits(*results)


def test_an_update_is_never_copied_whole() -> None:
    start = {"x": np.zeros(1 << 20, np.float32)}
    update = {"x": np.ones(1 << 20, np.float32)}
    rule = PrivateMean(start, privacy(noise=1.0), 3)
    tracemalloc.start()
    rule.add(update.items())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < update["x"].nbytes / 4


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("rounds", [1, 2, 10, 300])
@pytest.mark.parametrize("delta", [1e-3, 1e-7])
def test_epsilon_is_that_of_composed_gaussians(noise: float, rounds: int, delta: float) -> None:
    ours = Budget(privacy(noise=noise, delta=delta), rounds).spent
    accountant = RdpAccountant(list(ORDERS))
    accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), rounds))
    assert ours == pytest.approx(accountant.get_epsilon(delta), rel=1e-5, abs=1e-6)
    assert ours >= exact(noise / math.sqrt(rounds), delta)


def exact(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism [Balle and Wang, arXiv 1805.06530, theorem 8]; many are one with less."""

    def missing(epsilon: float) -> float:
        half, shift = 1 / (2 * noise), epsilon * noise
        second = math.exp(epsilon + stats.norm.logcdf(-half - shift))
        return float(stats.norm.cdf(half - shift) - second - delta)

    return 0.0 if missing(0.0) <= 0 else float(optimize.brentq(missing, 0.0, 1e4))


def test_a_budget_is_left_before_it_is_passed() -> None:
    after = [Budget(privacy(noise=2.0), rounds).spent for rounds in range(4)]
    assert after[0] == 0.0
    assert sorted(after) == after
    budget = Budget(privacy(noise=2.0, epsilon=(after[2] + after[3]) / 2))
    budget.afford()
    budget.releases = 1
    budget.afford()
    budget.releases = 2
    with pytest.raises(EpsilonSpent, match=rf"2 rounds have spent an epsilon of {after[2]:.3f} at every site"):
        budget.afford()


def test_a_study_that_cannot_afford_one_round_is_refused_with_the_numbers() -> None:
    with pytest.raises(StudyError) as refused:
        Budget(privacy(noise=0.5, epsilon=1.0)).afford()
    after = Budget(privacy(noise=0.5), 1).spent
    assert f"one round with privacy.noise 0.5 spends an epsilon of {after:.3f}" in refused.value.problem
    assert "privacy.epsilon is 1" in refused.value.problem
    assert "polyclinic privacy plan" in refused.value.fix


def test_few_sites_are_told_what_the_noise_means() -> None:
    text = what_the_noise_means(privacy(noise=1.0, clip=0.5), 4, 1_000_000)
    assert "with 4 sites: the noise on their mean update has a standard deviation of 0.125" in text
    assert "at each of 1,000,000 weights, in all 250 times" in text
    assert "with 1,000 sites" in text
    assert what_the_noise_means(privacy(noise=1.0), 1000, 1_000_000) == ""


def test_what_few_sites_are_told_is_so() -> None:
    start = {"x": np.zeros(10_000, np.float32)}
    update = np.zeros(10_000, np.float32)
    update[0] = 100.0
    clipped = fold(start, [{"x": update}] * 4, 4, privacy())
    noise = fold(start, [], 4, privacy(noise=1.0))
    ratio = float(np.linalg.norm(noise["x"]) / np.linalg.norm(clipped["x"]))
    assert ratio == pytest.approx(25, rel=0.05)
    assert "in all 25 times" in what_the_noise_means(privacy(noise=1.0), 4, 10_000)
