"""What the rules that compare updates value by value have in common: they wait until all are there.

Their memory grows with the number of sites, 4 bytes for every weight of every update. What they compute must not depend
on the order in which updates have arrived.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import Aggregation
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedavg import CHUNK


class Gathered(ABC):
    """The updates of one round. `add` them, then `close` into the new global tensors; all weigh the same.

    Attributes:
        holds_updates, state: as of FedAvg; there is nothing to remember.
    """

    holds_updates = True

    def __init__(self, tensors: Tensors, settings: Aggregation | None = None, state: Tensors | None = None) -> None:
        self.state: Tensors = {}
        self._updates: list[Tensors] = []

    def add(self, update: Iterable[tuple[str, NDArray[np.float32]]], weight: int) -> None:
        """Keep an update; its names, shapes and values have passed the gate."""
        self._updates.append(dict(update))

    def close(self, tensors: Tensors) -> Tensors:
        """The new global tensors: the old ones plus `combine` of each place. The updates are given up."""
        new: Tensors = {}
        for name, value in tensors.items():
            flat, changes = value.reshape(-1), [update.pop(name).reshape(-1) for update in self._updates]
            result = np.empty(flat.size, np.float32)
            for at in range(0, flat.size, CHUNK):
                part = np.stack([change[at : at + CHUNK] for change in changes]).astype(np.float64)
                part.sort(axis=0)  # so that no sum over it depends on who was first
                result[at : at + CHUNK] = flat[at : at + CHUNK] + self.combine(part)
            new[name] = result.reshape(value.shape)
        return new

    @abstractmethod
    def combine(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(sites, values) -> (values,): what is added, from the changes of each value in ascending order."""
