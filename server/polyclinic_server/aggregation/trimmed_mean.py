"""Coordinate-wise trimmed mean [Yin et al., 1803.01498, definition 2], each value by itself:

    w <- w + mean of the delta_k without the c largest and the c smallest,    c = floor(fraction sites)

Up to c sites may send anything they like: what they add lies between values of honest sites. Memory grows with the
number of sites (`gathered`). The mean is Flower's function.
"""

import numpy as np
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from numpy.typing import NDArray

from polyclinic.rules import TrimmedMeanRule
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.gathered import Gathered


class TrimmedMean(Gathered):
    """The updates of one round, and their trimmed mean."""

    def __init__(self, tensors: Tensors, settings: TrimmedMeanRule, state: Tensors | None = None) -> None:
        super().__init__(tensors)
        self._settings = settings

    def combine(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """As in Gathered."""
        return np.asarray(trim_mean(changes, self._settings.fraction))
