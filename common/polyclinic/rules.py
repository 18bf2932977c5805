"""`[aggregation]`: the settings of each rule by which updates become new global tensors.

A new rule adds its class here, its file under the server's `aggregation/` and one line in `RULES`.
"""

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field

from polyclinic.settings import Settings


class Aggregation(Settings):
    """`[aggregation]`: how the coordinator combines the updates, and what its gate lets through. Rules add keys."""

    rule: str = "fedavg"
    weighting: Literal["patients", "equal", "tempered"] = "patients"
    """`tempered`: by the square root of the number of patients."""
    min_sites: int = Field(default=2, ge=1, le=100_000)
    """Accepted updates below which a round fails; with some rules it fails below more."""
    round_deadline_s: float = Field(default=3600.0, gt=0, le=1e8)
    """Seconds after which a round closes without the sites that have not replied."""
    norm_limit: float = Field(default=10.0, gt=1)
    """An update whose norm is above this many times the median of those accepted so far in the stage is refused, or of
    the latest ones where that is less; of a stage's first round, one above the norm of the model itself."""
    max_patients: int = Field(default=65_536, ge=1, le=65_536)
    """A site counts for no more patients than this; one that claims more is refused."""

    @property
    def least(self) -> int:
        """Updates that the rule needs where there is more than one site, whatever `min_sites` says."""
        return 1


class FedAvgRule(Aggregation):
    """`[aggregation]`: rule = "fedavg", the mean of the updates."""

    rule: Literal["fedavg"] = "fedavg"


class FedProxRule(Aggregation):
    """`[aggregation]`: rule = "fedprox", the mean of updates that are held near the tensors they started from."""

    rule: Literal["fedprox"]
    mu: float = Field(default=0.01, gt=0, le=1_000)
    """Of the term mu/2 |w - w_g|^2 in every site's loss. The paper tries 0.001 to 1."""


class FedBNRule(Aggregation):
    """`[aggregation]`: rule = "fedbn", the mean of updates of sites that keep their own normalisation layers."""

    rule: Literal["fedbn"]


class FedEMARule(Aggregation):
    """`[aggregation]`: rule = "fedema", the mean of updates of sites that start between the global encoder and
    their own."""

    rule: Literal["fedema"]
    tau: float = Field(default=0.7, gt=0, le=1)
    """Share of its own encoder with which a site starts its second round; later shares go with the divergence."""


class FedAvgMRule(Aggregation):
    """`[aggregation]`: rule = "fedavgm", the mean update with momentum at the coordinator."""

    rule: Literal["fedavgm"]
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of a step, what goes on into the next: in the long run steps grow by 1 / (1 - momentum)."""
    learning_rate: float = Field(default=1.0, gt=0, le=100)
    """Of the coordinator's steps. 1 - momentum makes them as long as fedavg's."""


class FedAdamRule(Aggregation):
    """`[aggregation]`: rule = "fedadam", Adam at the coordinator with the mean update for a gradient."""

    rule: Literal["fedadam"]
    learning_rate: float = Field(default=0.01, gt=0, le=100)
    """Of the coordinator's steps: about the most that one moves a weight by."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Memory of the mean update."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Memory of its square."""
    tau: float = Field(default=1e-3, gt=0, le=1)
    """Size of a mean update below which a weight moves in proportion to it."""


class LDawaRule(Aggregation):
    """`[aggregation]`: rule = "ldawa", every layer's mean weighted by how well a site's agrees with the global one."""

    rule: Literal["ldawa"]


class Robust(Aggregation):
    """Settings of the rules that stand some sites which send anything. They hold all updates of a round in memory."""

    weighting: Literal["equal"] = "equal"
    """All updates count alike: a weight is one more thing that such a site could lie about."""


class MedianRule(Robust):
    """`[aggregation]`: rule = "median", of every weight by itself. A round needs 3 updates."""

    rule: Literal["median"]

    @property
    def least(self) -> int:
        """Of two, the median is the mean."""
        return 3


class TrimmedMeanRule(Robust):
    """`[aggregation]`: rule = "trimmed_mean", of every weight by itself, without the largest and smallest updates."""

    rule: Literal["trimmed_mean"]
    fraction: float = Field(default=0.2, ge=0.01, lt=0.5)
    """Of the updates that is left out at each end, rounded down; a round needs so many that it leaves out one."""

    def cut(self, updates: int) -> int:
        """Updates that are left out at each end, of so many."""
        return int(self.fraction * updates)

    @property
    def least(self) -> int:
        """With fewer, nothing is left out and the rule stands nobody."""
        return next(n for n in itertools.count(math.floor(1 / self.fraction)) if self.cut(n))


class KrumRule(Robust):
    """`[aggregation]`: rule = "krum", the one update that lies nearest to the others."""

    rule: Literal["krum"]
    f: int = Field(default=1, ge=0, le=10_000)
    """Sites that may send anything; a round needs 2 f + 3 updates."""

    @property
    def least(self) -> int:
        """As the paper asks."""
        return 2 * self.f + 3


AnyAggregation = Annotated[
    FedAvgRule
    | FedProxRule
    | FedBNRule
    | FedEMARule
    | FedAvgMRule
    | FedAdamRule
    | LDawaRule
    | MedianRule
    | TrimmedMeanRule
    | KrumRule,
    Field(discriminator="rule"),
]
