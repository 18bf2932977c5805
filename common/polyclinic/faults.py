"""`[simulation.clock]` and `[[simulation.fault]]`: how unreliable sites are, and by which time."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from polyclinic.settings import Name, Settings

Hour = Annotated[float, Field(ge=0, le=24)]
RoundNumber = Annotated[int, Field(ge=1, le=1_000_000)]
ANY_ROUND = (1, 1_000_000)


class SimulatedClock(Settings):
    """`[simulation.clock]`: time that passes as fast as the sites can be trained here, by what theirs would take.

    `aggregation.round_deadline_s` is of this time, as are the seconds of a round. Only training, the way of the tensors
    and waiting take any.
    """

    images_per_s: float = Field(default=0.0, ge=0, le=1e6)
    """Images that a site trains on in a second, at least a thousandth. 0: time is this machine's, and nobody is slow or
    late."""
    bytes_per_s: float = Field(default=1e6, ge=1, le=1e12)
    """Of a site's connection, either way."""
    nights: tuple[Hour, Hour] = (0.0, 24.0)
    """Hours of the day from and to which sites train, such as [20, 6]; what they do not finish rests until then."""
    start_hour: float = Field(default=0.0, ge=0, lt=24)
    """Of the day at which the run begins."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.nights[0] == 24 or self.nights[0] == self.nights[1]:
            raise ValueError(
                f"simulation.clock.nights is {list(self.nights)}: give two different hours, [0, 24] for the whole day"
            )
        if 0 < self.images_per_s < 1e-3:
            raise ValueError(f"simulation.clock.images_per_s is {self.images_per_s:g}: give 0.001 or more, or 0")
        fields = type(self).model_fields.items()
        if not self.images_per_s and any(getattr(self, name) != field.default for name, field in fields):
            raise ValueError("simulation.clock does not say how fast sites train: add images_per_s, such as 100")
        return self


class Fault(Settings):
    """`[[simulation.fault]]`: what goes wrong at sites, in the order given; the other rows train without.

    A site whose labels are flipped is no fault but a shift: `label_noise` of severity 1. All rows that train on it
    learn from them; all are measured by the labels as they were.
    """

    sites: list[Name] = Field(default_factory=list)
    """Whose; empty: all."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """That it happens to a site in a round; drawn anew for each from the study's seed."""
    rounds: tuple[RoundNumber, RoundNumber] = ANY_ROUND
    """The first and the last in which it may, counted across stages."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.rounds[0] > self.rounds[1]:
            raise ValueError(f"rounds is {list(self.rounds)}: give [first, last] with first <= last")
        return self


class Dropout(Fault):
    """The site does not answer. Needs the clock."""

    kind: Literal["dropout"]


class Lateness(Fault):
    """The answer waits at the site before it leaves, for a time that is distributed exponentially. Needs the clock."""

    kind: Literal["lateness"]
    seconds: float = Field(gt=0, le=1e8)
    """Mean."""


class Slow(Fault):
    """The site trains more slowly. Needs the clock."""

    kind: Literal["slow"]
    factor: float = Field(ge=1, le=1e6)
    """Times as long as by `images_per_s`."""


class Corrupt(Fault):
    """Bytes of the update are damaged on the way: a stretch reads as NaN, or all are random."""

    kind: Literal["corrupt"]


class SignFlip(Fault):
    """The site sends the opposite of its update."""

    kind: Literal["sign_flip"]


class Scaling(Fault):
    """The site sends a multiple of its update."""

    kind: Literal["scaling"]
    factor: float = Field(gt=0, le=1e6)
    """How many times its update."""


class UpdateNoise(Fault):
    """The site adds a vector of random direction to its update."""

    kind: Literal["noise"]
    factor: float = Field(gt=0, le=1e6)
    """Norm of the vector, as a multiple of the update's."""


class Collusion(Fault):
    """All sites to which it happens in a round send one vector that hides in their spread (arXiv 1902.06156).

    It is mean - z std, weight by weight, over the updates that they have honestly trained.
    """

    kind: Literal["collusion"]
    factor: float = Field(ge=0, le=1_000)
    """z. The larger, the more harm, and the easier to tell from honest updates."""


AnyFault = Annotated[
    Dropout | Lateness | Slow | Corrupt | SignFlip | Scaling | UpdateNoise | Collusion, Field(discriminator="kind")
]
TIMED = (Dropout, Lateness, Slow)
"""Faults that are nothing but time."""
