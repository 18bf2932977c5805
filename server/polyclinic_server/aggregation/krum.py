"""Krum [Blanchard et al., NeurIPS 2017, 1703.02757], n updates, f of them from sites that may send anything:

    w <- w + delta_i,    i = argmin_i sum of |delta_i - delta_j|^2 over the n - f - 2 updates j nearest to i

Of a tie, the update with the smaller SHA-256, whoever has sent it. Memory grows with the number of sites (as in
`gathered`). Flower's Krum finds the distances as |a|^2 + |b|^2 - 2 a.b in float32, which for updates that are nearly
alike leaves few digits or none, and as a product of matrices, whose bits depend on the number of threads; here they are
sums of squared differences in float64.
"""

import numpy as np
from numpy.typing import NDArray

from polyclinic.rules import KrumRule
from polyclinic.wire import Tensors, digest
from polyclinic_server.aggregation.fedavg import CHUNK
from polyclinic_server.aggregation.gathered import Gathered


class Krum(Gathered):
    """The updates of one round, of which one is taken."""

    def __init__(self, tensors: Tensors, settings: KrumRule, state: Tensors | None = None) -> None:
        super().__init__(tensors)
        self._settings = settings

    def close(self, tensors: Tensors) -> Tensors:
        """The new global tensors: the old ones plus the update that is nearest to the others."""
        scores = self._scores()
        best = [update for update, score in zip(self._updates, scores, strict=True) if score == min(scores)]
        self._updates = [min(best, key=digest)]
        return super().close(tensors)

    def _scores(self) -> list[float]:
        """Of each update, the sum of its squared distances to those nearest to it, summed in ascending order."""
        apart = squared_distances(self._updates)
        nearest = max(len(apart) - self._settings.f - 2, 0)
        others = [np.sort(np.delete(row, number)) for number, row in enumerate(apart)]
        return [float(row[:nearest].sum()) for row in others]

    def combine(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The one that is left."""
        return np.asarray(changes[0])


def squared_distances(updates: list[Tensors]) -> NDArray[np.float64]:
    """(sites, sites), between whole updates."""
    apart = np.zeros((len(updates), len(updates)))
    for name in sorted(updates[0]):
        flat = [update[name].reshape(-1) for update in updates]
        for at in range(0, flat[0].size, CHUNK):
            part = np.stack([change[at : at + CHUNK] for change in flat]).astype(np.float64)  # (sites, values)
            for number, row in enumerate(part):
                differences = part[number + 1 :] - row  # (sites after it, values)
                apart[number, number + 1 :] += np.einsum("kv,kv->k", differences, differences)
    return apart + apart.T
