"""The rules by which updates become new global tensors: one file a rule, one line in RULES."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedadam import FedAdam
from polyclinic_server.aggregation.fedavg import FedAvg
from polyclinic_server.aggregation.fedavgm import FedAvgM
from polyclinic_server.aggregation.fedbn import FedBN
from polyclinic_server.aggregation.fedema import FedEMA
from polyclinic_server.aggregation.fedprox import FedProx
from polyclinic_server.aggregation.krum import Krum
from polyclinic_server.aggregation.ldawa import LDawa
from polyclinic_server.aggregation.median import Median
from polyclinic_server.aggregation.trimmed_mean import TrimmedMean


class Rule(Protocol):
    """One round of a rule, made of the global tensors, `[aggregation]` and the state that the round before has left.

    Attributes:
        holds_updates: whether all updates of the round are in memory until it closes.
        state: what the next round needs of this one, once it is closed; empty for most rules.
    """

    holds_updates: bool
    state: Tensors

    def add(self, update: Iterable[tuple[str, NDArray[np.float32]]], weight: int) -> None:
        """Take an update that has passed the gate."""
        ...

    def close(self, tensors: Tensors) -> Tensors:
        """The new global tensors; whoever has replied first, the same bits."""
        ...


RULES: dict[str, Callable[[Tensors, Any, Tensors], Rule]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedbn": FedBN,
    "fedema": FedEMA,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "ldawa": LDawa,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
}
