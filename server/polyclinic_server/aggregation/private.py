"""Differential privacy of whole sites, made at the coordinator [McMahan et al., 1710.06963; here all sites take part].

    w <- w + (sum_k delta_k min(1, C / |delta_k|) + N(0, (noise C)^2 I)) / seats

The sum is divided by the number of enrolled sites, whoever has replied, so that the division tells nothing: adding or
removing a site's update moves the sum by at most C. In the fixed point of `fedavg` that holds to the last bit, since
values are rounded towards zero and the norm is taken a little larger than it is summed; and since sum and noise lie on
one grid, the low bits of a result do not tell them apart.

The noise comes from numpy's PCG64, seeded from the operating system for every round and never from the study. It is no
cryptographic generator: that nobody computes its state from noise that he knows is assumed, not shown.
"""

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import PolyclinicError, StudyError
from polyclinic.privacy.accounting import Event, epsilon
from polyclinic.study import SitePrivacy
from polyclinic.wire import Tensors
from polyclinic_server.aggregation.fedavg import CHUNK, STEP, FedAvg

ROUNDING = 1 + 2.0**-32
"""Above the relative error of a norm that is summed in float64, chunk by chunk, of any number of values."""


class EpsilonSpent(PolyclinicError):
    """Another round would pass the study's epsilon; what the rounds before have made stands."""


class PrivateMean(FedAvg):
    """The running sum of one round under `privacy.mode = "site"`, of whom `seats` sites may take part."""

    def __init__(self, tensors: Tensors, privacy: SitePrivacy, seats: int) -> None:
        super().__init__(tensors)
        self._privacy, self._seats = privacy, seats

    def add(self, update: Iterable[tuple[str, NDArray[np.float32]]], weight: int = 1) -> None:
        """Add an update, clipped as a whole; its names, shapes and values have passed the gate. All weigh 1."""
        parts = [(name, delta.reshape(-1)) for name, delta in update]
        norm = ROUNDING * math.sqrt(sum(_squares(flat) for _, flat in parts))
        factor = self._privacy.clip / max(norm, self._privacy.clip)
        for name, flat in parts:
            total = self._sums[name]
            for at in range(0, flat.size, CHUNK):
                wide = flat[at : at + CHUNK].astype(np.float64)
                wide *= factor / STEP
                total[at : at + CHUNK] += wide.astype(np.int64)  # towards zero: no longer than it was
        self.weight += weight

    def close(self, tensors: Tensors) -> Tensors:
        """The new global tensors: the old ones plus the sum with its noise, over the seats. The sums are given up."""
        generator = np.random.default_rng(secrets.randbits(128))
        deviation = self._privacy.noise * self._privacy.clip / STEP
        for total in self._sums.values():
            for at in range(0, total.size, CHUNK):
                part = total[at : at + CHUNK]
                part += np.rint(generator.normal(0.0, deviation, part.size)).astype(np.int64)
        self.weight = self._seats
        return super().close(tensors)


def _squares(flat: NDArray[np.float32]) -> float:
    """Sum of squares, in float64."""
    wide = (flat[at : at + CHUNK].astype(np.float64) for at in range(0, flat.size, CHUNK))
    return math.fsum(float(np.einsum("i,i->", chunk, chunk)) for chunk in wide)


@dataclass
class Budget:
    """What a study under `privacy.mode = "site"` has spent at every site: one Gaussian a release, all sites in each.

    Attributes:
        releases: sums that got noise of their own. A round is one: its tensors leave only after its checkpoint, from
            which whoever goes on after a crash sends the same ones. A round that has to be made again, since its
            checkpoint was damaged or not yet written, is another, whether the first had left or not.
    """

    privacy: SitePrivacy
    releases: int = 0

    @property
    def spent(self) -> float:
        """Epsilon of all releases at the study's delta."""
        return _epsilon(self.privacy, self.releases)

    def afford(self) -> None:
        """See that one more release keeps to the study's epsilon.

        Raises:
            StudyError: not even the first does.
            EpsilonSpent: the next does not.
        """
        after, wanted = _epsilon(self.privacy, self.releases + 1), self.privacy
        if after <= wanted.epsilon:
            return
        limits = f"at delta {wanted.delta:g}, and privacy.epsilon is {wanted.epsilon:g}"
        if self.releases == 0:
            raise StudyError(
                f"one round with privacy.noise {wanted.noise:g} spends an epsilon of {after:.3f} {limits}",
                "raise privacy.noise, or privacy.epsilon: polyclinic privacy plan says what goes together",
            )
        raise EpsilonSpent(
            f"{self.releases} rounds have spent an epsilon of {self.spent:.3f} at every site, and another would make "
            f"that {after:.3f} {limits}",
            "use what these rounds have made; for more of them, raise privacy.noise in a new study "
            "(polyclinic privacy plan), which spends anew",
        )


def _epsilon(privacy: SitePrivacy, releases: int) -> float:
    return epsilon([Event(privacy.noise, 1.0, releases)], privacy.delta)


def what_the_noise_means(privacy: SitePrivacy, seats: int, weights: int) -> str:
    """In plain words how much of a round's mean over so many sites is noise; "" where it is the smaller part.

    Noise on the mean of n updates has a standard deviation of noise * clip / n at each of d weights, hence a norm of
    about noise * clip * sqrt(d) / n; the mean itself has at most that of the clip.
    """
    ratio = privacy.noise * math.sqrt(weights) / seats
    if ratio <= 1:
        return ""
    return (
        f"privacy.mode 'site' with {seats} sites: the noise on their mean update has a standard deviation of "
        f"{privacy.noise * privacy.clip / seats:.3g} (noise x clip / sites) at each of {weights:,} weights, in all "
        f"{ratio:,.0f} times the longest mean that clipping lets through; of a round's step, little is training. "
        f"Noise and training would weigh the same with {math.ceil(ratio * seats):,} sites"
    )
