"""FedAdam [Reddi et al., 2003.00295, algorithm 2], d the weighted mean of a round's updates:

    m <- beta1 m + (1 - beta1) d
    v <- beta2 v + (1 - beta2) d^2
    w <- w + learning_rate m / (sqrt(v) + tau);    m = 0 and v = tau^2 where a stage begins.

As in the paper, and unlike Adam's, the moments are not corrected for their start. Flower's strategy of this name
corrects them, and has v begin at 0: another rule.
"""

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import FedAdamRule
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedavg import FedAvg


class FedAdam(FedAvg):
    """The running sum of a round, and the moments as `state["first.<tensor>"]` and `state["second.<tensor>"]`."""

    def __init__(self, tensors: Tensors, settings: FedAdamRule, state: Tensors | None = None) -> None:
        super().__init__(tensors)
        self._settings = settings
        starts = {"first": 0.0, "second": settings.tau**2}
        self.state = state or {
            f"{moment}.{name}": np.full(value.size, start, np.float32)
            for moment, start in starts.items()
            for name, value in tensors.items()
        }

    def step(self, name: str, at: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """learning_rate m / (sqrt(v) + tau), after the moments have moved on."""
        rule = self._settings
        first, second = (self.state[f"{moment}.{name}"][at : at + mean.size] for moment in ("first", "second"))
        first[:] = rule.beta1 * first.astype(np.float64) + (1 - rule.beta1) * mean
        second[:] = rule.beta2 * second.astype(np.float64) + (1 - rule.beta2) * mean**2
        return rule.learning_rate * first.astype(np.float64) / (np.sqrt(second.astype(np.float64)) + rule.tau)
