"""Federated averaging [McMahan et al., 1602.05629]: w <- w + sum_k (n_k / n) delta_k.

The sum is kept in 64-bit fixed point, 2^-28 a step. Integer addition is associative, so the result has the same bits
in whatever order updates arrive, and one update at a time is in memory. Each delta is rounded by at most 2^-29
(1.9e-9, below the spacing of float32 for weights above 0.03).
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import Aggregation
from polyclinic.wire import Tensors

STEP = 2.0**-28
LARGEST_VALUE = 2.0**7
"""Bound on one value of an update: with weights below 2^28 in sum, no total can overflow."""
LARGEST_WEIGHT = 2**28
CHUNK = 1 << 14
"""Values handled at a time: temporaries stay in cache and out of the memory bill."""


def weight_of(patients: int, weighting: str) -> int:
    """A site's integer weight: its patients, 1, or (tempered) the square root of its patients in 1/1024."""
    return {"patients": patients, "equal": 1, "tempered": round(1024 * math.sqrt(patients))}[weighting]


class FedAvg:
    """The running sum of one round. `add` updates, then `close` into the new global tensors.

    Attributes:
        holds_updates: whether all updates of the round are in memory until it closes.
        state: what the rule remembers from round to round, float32 and flat; empty where a stage begins.
    """

    holds_updates = False

    def __init__(self, tensors: Tensors, settings: Aggregation | None = None, state: Tensors | None = None) -> None:
        self._sums = {name: np.zeros(value.size, np.int64) for name, value in tensors.items()}
        self.weight = 0
        self.state = state or {}

    def add(self, update: Iterable[tuple[str, NDArray[np.float32]]], weight: int) -> None:
        """Add an update, tensor by tensor; its names, shapes and values have passed the gate.

        Raises:
            OverflowError: the weights would add up to LARGEST_WEIGHT; nothing has been added.
        """
        if self.weight + weight >= LARGEST_WEIGHT:
            raise OverflowError(f"the weights of a round must add up to less than {LARGEST_WEIGHT}")
        self.weight += weight
        for name, delta in update:
            flat, total = delta.reshape(-1), self._sums[name]
            for at in range(0, flat.size, CHUNK):
                total[at : at + CHUNK] += _steps(flat[at : at + CHUNK], weight)

    def close(self, tensors: Tensors) -> Tensors:
        """The new global tensors: the old ones plus `step`. The sums are given up."""
        new: Tensors = {}
        for name, value in tensors.items():
            flat, total = value.reshape(-1), self._sums.pop(name)
            result = np.empty(flat.size, np.float32)
            for at in range(0, flat.size, CHUNK):
                mean = total[at : at + CHUNK] * np.float64(STEP / self.weight)
                result[at : at + CHUNK] = flat[at : at + CHUNK] + self.step(name, at, mean)
            new[name] = result.reshape(value.shape)
        return new

    def step(self, name: str, at: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is added to a tensor's values from `at` on, whose updates have the weighted mean `mean`: that."""
        return mean


def _steps(values: NDArray[np.float32], weight: int) -> NDArray[np.int64]:
    """Values in steps, times the weight."""
    scaled = values.astype(np.float64)
    scaled /= STEP
    steps = np.rint(scaled, out=scaled).astype(np.int64)
    steps *= weight
    return steps
