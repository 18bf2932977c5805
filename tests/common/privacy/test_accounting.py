"""Epsilon against Opacus's accountants, dp-accounting's, the integral that defines a divergence, and closed forms."""

import math
from itertools import product

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from polyclinic.errors import Refused
from polyclinic.privacy import accounting
from polyclinic.privacy.accounting import NOISES, ORDERS, Event, epsilon, noise_for, noise_for_all, rounds_that_fit

DELTA = 1e-5
WHOLE = tuple(order for order in ORDERS if order == int(order))
GRID = [
    Event(noise, rate, steps)
    for (noise, rate), steps in product(
        [(0.7, 0.01), (1.0, 0.001), (1.0, 0.064), (1.3, 0.25), (2.0, 0.1), (4.0, 0.9), (5.0, 1.0)], [1, 400]
    )
]
MIXED = [Event(1.0, 0.02, 300), Event(2.0, 0.1, 50), Event(8.0, 1.0, 4)]


def theirs(accountant: RdpAccountant | PLDAccountant, events: list[Event], delta: float = DELTA) -> float:
    """As dp-accounting has it; a step adds or removes one record."""
    for event in events:
        step = dp_accounting.PoissonSampledDpEvent(event.rate, dp_accounting.GaussianDpEvent(event.noise))
        accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


def by_integral(order: float, noise: float, rate: float) -> float:
    """Rényi divergence of one step, by the trapezoid rule on a grid of the noisy sum; for orders up to about 60."""
    x = np.linspace(-14 * noise, order + 14 * noise, 200_001)
    ratio = np.logaddexp(np.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    weight = norm.logpdf(x, scale=noise) + math.log(x[1] - x[0])
    if order * ratio.max() > 700:
        return float(logsumexp(order * ratio + weight)) / (order - 1)
    return float(np.log1p(np.sum(np.exp(weight) * np.expm1(order * ratio)))) / (order - 1)  # exact to small ones


def gaussian(noise: float, steps: int, delta: float = DELTA) -> float:
    """The exact epsilon of Gaussian noise on a sum that holds everybody (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise
    return float(brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 500))


@pytest.mark.parametrize("event", GRID, ids=str)
def test_epsilon_is_that_of_opacus_at_the_same_orders(event: Event) -> None:
    opacus = RDPAccountant()
    opacus.history = [(event.noise, event.rate, event.steps)]
    expected = opacus.get_epsilon(DELTA, alphas=list(ORDERS))
    assert expected <= epsilon([event], DELTA) <= expected * (1 + 1e-6)
    assert set(RDPAccountant.DEFAULT_ALPHAS) < set(ORDERS)  # so ours is never more than with those


@pytest.mark.parametrize("events", [*([event] for event in GRID), MIXED], ids=str)
def test_epsilon_is_that_of_dp_accounting_at_whole_orders(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    assert epsilon(events, DELTA) <= theirs(RdpAccountant(WHOLE), events) * (1 + 1e-6)
    monkeypatch.setattr(accounting, "ORDERS", WHOLE)  # at others theirs is a bound by absolute values
    monkeypatch.setattr(accounting, "_divergences", accounting._divergences.__wrapped__)
    assert epsilon(events, DELTA) == pytest.approx(theirs(RdpAccountant(WHOLE), events), rel=1e-6)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 100.0, 1000.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.1, 0.7, 0.99])
def test_a_divergence_is_never_below_its_integral(noise: float, rate: float) -> None:
    for order in (1.1, 1.9, 2, 3.3, 10.9, 16, 32):
        found = accounting._divergences(noise, rate)[ORDERS.index(order)]
        true = by_integral(order, noise, rate)
        assert true <= found <= true * (1 + 1e-8) + 1e-11, order


@pytest.mark.parametrize("event", [event for event in GRID if event.steps == 400], ids=str)
def test_the_numerical_composition_lies_between_the_truth_and_the_divergences(event: Event) -> None:
    numerical = epsilon([event], DELTA, "prv")
    assert numerical <= epsilon([event], DELTA)
    if numerical < accounting.READABLE:
        assert numerical >= theirs(PLDAccountant(), [event]) - 2e-3  # what its own grid of 1e-4 adds up to


def test_the_numerical_composition_of_a_mixture_is_that_of_two_other_implementations() -> None:
    opacus = PRVAccountant()
    opacus.history = [(event.noise, event.rate, event.steps) for event in MIXED[:2]]
    assert epsilon(MIXED[:2], DELTA, "prv") == pytest.approx(opacus.get_epsilon(DELTA), abs=1e-9)
    assert epsilon(MIXED, DELTA, "prv") == pytest.approx(theirs(PLDAccountant(), MIXED), abs=0.02)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 20), (30.0, 1), (3.0, 100)])
def test_without_sampling_the_exact_epsilon_is_known(noise: float, steps: int) -> None:
    exact = gaussian(noise, steps)
    assert exact <= epsilon([Event(noise, 1.0, steps)], DELTA, "prv") <= exact + 0.025
    assert exact <= epsilon([Event(noise, 1.0, steps)], DELTA) <= 1.13 * exact


def test_rounds_resumes_and_studies_compose_as_one_long_run() -> None:
    whole = epsilon([Event(1.1, 0.05, 600), Event(2.0, 0.1, 100)], DELTA)
    rounds = [Event(1.1, 0.05, 20)] * 12 + [Event(2.0, 0.1, 25)] * 2
    resumed = [Event(1.1, 0.05, 20)] * 18 + [Event(2.0, 0.1, 50)]
    assert epsilon([*rounds, *resumed], DELTA) == whole
    assert epsilon(reversed([*rounds, *resumed]), DELTA) == pytest.approx(whole, rel=1e-12)
    assert epsilon(rounds, DELTA) < whole < epsilon(rounds, DELTA) + epsilon(resumed, DELTA)


def test_nothing_done_is_nothing_spent() -> None:
    assert epsilon([], DELTA) == epsilon([Event(1.0, 0.1, 0)], DELTA, "prv") == 0.0


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(
    "event",
    [
        Event(0.01, 1.0, 1_000_000),
        Event(0.01, 1e-6, 1),
        Event(0.05, 0.5, 10),
        Event(1.0, 0.5, 1_000_000),
        Event(1000.0, 1e-6, 1),
        Event(1000.0, 1.0, 1_000_000),
        Event(1000.0, 1e-6, 1_000_000),
        Event(1.0, 1 - 1e-12, 3),
    ],
    ids=str,
)
def test_the_corners_have_an_answer_and_no_warning(event: Event, accountant: str) -> None:
    found = epsilon([event], 1e-9, accountant)  # type: ignore[arg-type]
    assert 0 < found < math.inf
    assert found <= epsilon([Event(event.noise, event.rate, event.steps + 1)], 1e-9)


@pytest.mark.parametrize(
    ("cap", "rate", "steps", "before"),
    [(8.0, 0.064, 160, []), (1.0, 0.01, 3_000, []), (3.0, 1.0, 20, []), (8.0, 0.1, 100, MIXED), (0.1, 0.01, 10, [])],
)
def test_the_least_noise_keeps_to_the_cap_and_the_next_lower_does_not(
    cap: float, rate: float, steps: int, before: list[Event]
) -> None:
    found = noise_for(cap, DELTA, rate, steps, before)
    lower = NOISES[NOISES.index(found) - 1]
    assert float(f"{found:.3g}") == found and 0.98 < lower / found < 1
    assert (
        epsilon([*before, Event(found, rate, steps)], DELTA)
        <= cap
        < epsilon([*before, Event(lower, rate, steps)], DELTA)
    )


def test_one_noise_for_different_stages() -> None:
    stages = [Event(7.0, 0.064, 160), Event(3.0, 0.9, 10)]
    found = noise_for_all(4.0, DELTA, stages)
    assert found > max(noise_for(4.0, DELTA, stage.rate, stage.steps) for stage in stages)
    assert epsilon([Event(found, stage.rate, stage.steps) for stage in stages], DELTA) <= 4.0


def test_where_no_noise_helps_that_is_said() -> None:
    with pytest.raises(Refused, match=r"no noise up to 1000 keeps to epsilon 1 at delta 1e-05, with 3\.\d+ spent"):
        noise_for(1.0, DELTA, 0.1, 10, MIXED)


@pytest.mark.parametrize("before", [[], MIXED[:1]])
@pytest.mark.parametrize("event", [Event(1.0, 0.064, 16), Event(6.0, 1.0, 1)], ids=str)
def test_the_rounds_that_fit_do_and_one_more_does_not(event: Event, before: list[Event]) -> None:
    fit = rounds_that_fit(8.0, DELTA, event, before)
    assert fit > 1
    assert epsilon([*before, *[event] * fit], DELTA) <= 8.0 < epsilon([*before, *[event] * (fit + 1)], DELTA)


def test_no_round_fits_where_the_cap_is_passed_or_the_first_would_pass_it() -> None:
    assert rounds_that_fit(0.5, DELTA, Event(1000.0, 1e-6, 1), MIXED) == 0
    assert rounds_that_fit(0.5, DELTA, Event(1.0, 0.5, 10)) == 0
    assert rounds_that_fit(8.0, DELTA, Event(1.0, 0.5, 0)) == accounting.MOST_ROUNDS


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(0.0, 0.1, 1), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, math.nan, 1), (1, 0.1, -1)],
)
def test_steps_of_which_no_epsilon_holds_are_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(Refused, match="no epsilon holds"):
        Event(noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(Refused, match="delta is"):
        epsilon(MIXED, delta)
