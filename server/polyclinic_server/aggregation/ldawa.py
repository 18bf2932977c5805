"""L-DAWA, layer-wise divergence-aware weights [Rehman et al., 2307.07393], for each layer l by itself:

    w_l <- sum_k a_k w_kl,    a_k ~ n_k cos(w_l, w_kl),    sum_k a_k = 1,    w_kl = w_l + delta_kl

A layer is a tensor (ours). A cosine below 0 counts as 0, and a layer that all sites have turned round stays as it is
(ours). Where w_l or w_kl is zero, as a bias is at first, there is no angle and n_k alone decides (ours).

Since the a_k add up to one, w_l moves by sum_k a_k delta_kl: a running sum, in the fixed point of `fedavg`, of values
times cosine and weight. Hence any order of arrival gives the same bits, and one update at a time is in memory.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import Aggregation
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedavg import CHUNK, STEP, FedAvg


class LDawa(FedAvg):
    """The running sum of a round, with a weight for each layer."""

    def __init__(self, tensors: Tensors, settings: Aggregation | None = None, state: Tensors | None = None) -> None:
        super().__init__(tensors, settings, state)
        self._tensors = tensors
        self._steps = dict.fromkeys(tensors, 0)  # sum over sites of n_k cos, the cosine in steps: exact

    def add(self, update: Iterable[tuple[str, NDArray[np.float32]]], weight: int) -> None:
        """As in FedAvg, each layer scaled by its cosine."""
        cosines: dict[str, np.float32] = {}

        def scaled() -> Iterable[tuple[str, NDArray[np.float32]]]:
            for name, delta in update:
                cosines[name] = np.float32(cosine(self._tensors[name], delta))
                yield name, delta * cosines[name]

        super().add(scaled(), weight)
        for name, factor in cosines.items():
            self._steps[name] += weight * round(float(factor) / STEP)

    def step(self, name: str, at: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean, over the layer's own weight instead of the round's."""
        steps = self._steps[name]
        return mean * (self.weight / (steps * STEP) if steps else 0.0)


def cosine(value: NDArray[np.float32], delta: NDArray[np.float32]) -> float:
    """Of the angle between a tensor before and after an update, at least 0; 1 where either is zero.

    >>> cosine(np.array([1, 0], np.float32), np.array([0, 1], np.float32)) ** 2
    0.5000000000000001
    """
    product, before, after = 0.0, 0.0, 0.0
    one, other = value.reshape(-1), delta.reshape(-1)
    for at in range(0, one.size, CHUNK):  # not np.dot: BLAS would start its threads here
        old = one[at : at + CHUNK].astype(np.float64)
        new = old + other[at : at + CHUNK]
        product += float(np.einsum("i,i->", old, new))
        before += float(np.einsum("i,i->", old, old))
        after += float(np.einsum("i,i->", new, new))
    if before == 0 or after == 0:
        return 1.0
    return min(max(product / math.sqrt(before * after), 0.0), 1.0)
