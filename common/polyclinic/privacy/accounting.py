"""What noise is worth: epsilon of steps that add Gaussian noise to a sum over randomly drawn patients, or sites.

A step draws each patient by itself with probability `rate`, bounds what each adds to the sum by C and adds noise of
standard deviation `noise` * C. Its Rényi divergences (RDP, [1]) add up over steps, rounds, stages and studies, and the
sum is converted at one delta ([2]). The numerical composition ([3]) is nearer to the truth and slower: for reports.
Both are upper bounds.

References: [1] Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", arXiv
1908.10530. [2] Balle et al., arXiv 1905.09982, theorem 21. [3] Gopi, Lee, Wutschitz, arXiv 2106.02848.
"""

import math
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import Refused

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Of the Rényi divergences; above 1029 the binomials in them are beyond what a float holds."""
ROUNDING = (1e-10, 2e-12)
"""Relative and absolute: more than the error with which the divergences are computed (measured)."""
READABLE = 100.0
"""Epsilon above which the numerical composition is left: its grid would not fit, and no promise is left to refine."""
BELOW_ONE = math.nextafter(1.0, 0.0)
"""The rate that stands for 1 in the numerical composition, which divides by 1 - rate."""
NOISES = (*(float(f"{digits}e{power}") for power in range(-4, 1) for digits in range(100, 1000)), 1000.0)
"""All numbers of three digits from 0.01 to 1,000, which is the largest noise that a study may ask for."""
MOST_ROUNDS = 1_000_000
"""The most that a study can have."""


@dataclass(frozen=True)
class Event:
    """Equal steps.

    Attributes:
        noise: its standard deviation, as a multiple of the bound on what one patient adds to the sum; above 0.
        rate: the probability with which a patient is drawn for a step; above 0, at most 1.
        steps: how many.
    """

    noise: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.noise < math.inf and 0 < self.rate <= 1 and self.steps >= 0):
            raise Refused(
                f"no epsilon holds for noise {self.noise}, rate {self.rate} and {self.steps} steps",
                "give a noise above 0, a rate above 0 and at most 1, and no negative number of steps",
            )


def grouped(events: Iterable[Event]) -> list[Event]:
    """The same steps, one event for each pair of noise and rate: composition knows no order."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.noise, event.rate] += event.steps
    return [Event(noise, rate, number) for (noise, rate), number in steps.items() if number]


def epsilon(events: Iterable[Event], delta: float, accountant: Literal["rdp", "prv"] = "rdp") -> float:
    """An upper bound on the epsilon of all `events` together, at `delta`.

    Args:
        events: all that was done to the same patients, or sites.
        delta: between 0 and 1.
        accountant: "rdp", or "prv" for the numerical composition: never more, and nearer to the truth.
    """
    if not 0 < delta < 1:
        raise Refused(f"delta is {delta}", "give one above 0 and below 1, and far below 1 / patients")
    together = grouped(events)
    if not together:
        return 0.0
    divergences = np.sum([event.steps * _divergences(event.noise, event.rate) for event in together], axis=0)
    orders = np.array(ORDERS)
    bound = divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    found = max(0.0, float(bound.min()))
    return found if accountant == "rdp" else min(found, _numerical(together, delta, found))


@lru_cache(maxsize=1024)
def _divergences(noise: float, rate: float) -> NDArray[np.float64]:
    """(orders,) Rényi divergences of one step, infinite where they cannot be computed."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with np.errstate(over="ignore"):
        found = np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=list(ORDERS)), np.float64)
    relative, absolute = ROUNDING
    return np.nan_to_num(found.clip(0) * (1 + relative) + absolute, nan=math.inf, posinf=math.inf)


def _numerical(events: Sequence[Event], delta: float, otherwise: float) -> float:
    """By the numerical composition; `otherwise` where its grid is too small or too coarse for these events."""
    from opacus.accountants import PRVAccountant

    if otherwise > READABLE:
        return otherwise
    accountant = PRVAccountant()
    accountant.history = [(event.noise, min(event.rate, BELOW_ONE), event.steps) for event in events]
    missed = sum(event.steps for event in events) * (1 - BELOW_ONE)  # delta of the steps that BELOW_ONE leaves out
    try:
        with warnings.catch_warnings(), np.errstate(divide="raise", over="raise", invalid="raise"):
            warnings.simplefilter("error")
            found = float(accountant.get_epsilon(delta - missed))
    except (ArithmeticError, ValueError, RuntimeError, Warning):
        return otherwise
    return max(0.0, found) if math.isfinite(found) else otherwise


def noise_for(cap: float, delta: float, rate: float, steps: int, before: Sequence[Event] = ()) -> float:
    """The least noise with which `steps` at `rate`, after `before`, spend an epsilon of at most `cap` at `delta`.

    It has three digits, the last rounded up.

    Raises:
        Refused: no noise does.
    """
    return noise_for_all(cap, delta, [Event(1.0, rate, steps)], before)


def noise_for_all(cap: float, delta: float, events: Sequence[Event], before: Sequence[Event] = ()) -> float:
    """As `noise_for`, one noise for all of `events` in place of their own."""

    def keeps(noise: float) -> bool:
        return epsilon([*before, *(replace(event, noise=noise) for event in events)], delta) <= cap

    place = bisect_left(NOISES, True, key=keeps)
    if place == len(NOISES):
        spent = epsilon(before, delta)
        raise Refused(
            f"no noise up to {NOISES[-1]:g} keeps to epsilon {cap:g} at delta {delta:g}, with {spent:.3g} spent",
            "allow a higher epsilon or delta, or plan fewer rounds",
        )
    return NOISES[place]


def rounds_that_fit(cap: float, delta: float, event_per_round: Event, before: Sequence[Event] = ()) -> int:
    """How many rounds of `event_per_round` each, after `before`, spend an epsilon of at most `cap` at `delta`.

    A million at most.
    """

    def spent(rounds: int) -> float:
        return epsilon([*before, replace(event_per_round, steps=rounds * event_per_round.steps)], delta)

    if spent(0) > cap:
        return 0
    return bisect_right(range(1, MOST_ROUNDS + 1), cap, key=spent)
