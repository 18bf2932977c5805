"""Federated averaging with server momentum [Hsu et al., 1909.06335], d the weighted mean of a round's updates:

v <- momentum v + d,    w <- w + learning_rate v;    v = 0 where a stage begins.

Flower's strategy of this name takes the same step, with all replies and v in memory; here the replies are folded as
they come, and v stands in the checkpoint, so that a killed run goes on with it.
"""

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import FedAvgMRule
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedavg import FedAvg


class FedAvgM(FedAvg):
    """The running sum of a round, and the velocity v as `state["velocity.<tensor>"]`."""

    def __init__(self, tensors: Tensors, settings: FedAvgMRule, state: Tensors | None = None) -> None:
        super().__init__(tensors)
        self._settings = settings
        self.state = state or {f"velocity.{name}": np.zeros(v.size, np.float32) for name, v in tensors.items()}

    def step(self, name: str, at: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """learning_rate v, after v has moved on."""
        velocity = self.state[f"velocity.{name}"][at : at + mean.size]
        velocity[:] = self._settings.momentum * velocity.astype(np.float64) + mean
        return self._settings.learning_rate * velocity.astype(np.float64)
