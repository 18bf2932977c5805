"""Coordinate-wise median [Yin et al., 1803.01498, definition 1]: w <- w + median_k delta_k, each value by itself.

While fewer than half of the sites send anything they like, every value stays between those of honest sites. Memory
grows with the number of sites (`gathered`). The median of numpy is the one that Flower's FedMedian takes too.
"""

import numpy as np
from numpy.typing import NDArray

from polyclinic_server.aggregation.gathered import Gathered


class Median(Gathered):
    """The updates of one round, and their median."""

    def combine(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """As in Gathered."""
        return np.asarray(np.median(changes, axis=0))
