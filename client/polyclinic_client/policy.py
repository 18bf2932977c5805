"""`[policy]` of site.toml: what no approval goes beyond.

It is read anew and checked three times: when a study is approved, when an order comes, and when an answer leaves.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, time
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from polyclinic.errors import CohortError, Refused
from polyclinic.privacy.ledger import Cap
from polyclinic.study import Study
from polyclinic.wire import METRICS

TEMPLATE = """\
[policy]                      # a study outside these limits is refused, approved or not
methods = ["simclr", "micle", "mlvicx", "mae", "sssd", "supervised"]   # what may be trained
max_rounds = 1000             # of one study, all stages together
min_patients = 2              # with fewer patients than this the site takes no part
max_orders = 0                # that one approved study may send in all; 0: three a round of it, and 20 more
hours = []                    # when work may begin, by this machine's clock, such as ["19:00-07:00"]; []: always
max_megabytes = 1000.0        # of one update
tensors = ["*"]               # names, or patterns of names, of what may leave: ["encoder.*"] keeps the heads here
metrics = ["*"]               # figures that may leave, such as ["loss", "probe_*"]; others are withheld, loss never
epsilon = 0.0                 # what all studies together may spend of a patient's privacy; 0: they need promise none
delta = 1e-6                  # at which that epsilon is meant; below 1 / patients
threads = 0                   # of the processor; 0: as many as the study asks for; read when the node starts, as are
memory_gb = 0.0               # what each of its processes may take, on Linux; 0: as much as there is
gpu = true                    # false: none is used
"""
"""Of site.toml."""


def _is_spell(value: str) -> str:
    clock = r"([01]\d|2[0-3]):[0-5]\d"
    if not re.fullmatch(f"{clock}-{clock}", value) or value[:5] == value[6:]:
        raise ValueError("give two times of the day, such as '19:00-07:00'")
    return value


def _knows(pattern: str) -> str:
    if not any(fnmatchcase(name, pattern) for name in METRICS):
        raise ValueError(f"no figure is called {pattern[:64]!r}: the figures are {', '.join(sorted(METRICS))}")
    return pattern


def _with_loss(patterns: list[str]) -> list[str]:
    if not _allowed("loss", patterns):
        raise ValueError("the loss is withheld, and without it no update is taken: add 'loss'")
    return patterns


class Policy(BaseModel):
    """The limits; TEMPLATE says what each means. Zero is no limit, except where the template says what it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    methods: list[str] = Field(default=["simclr", "micle", "mlvicx", "mae", "sssd", "supervised"])
    max_rounds: int = Field(default=1000, ge=1)
    min_patients: int = Field(default=2, ge=2)
    max_orders: int = Field(default=0, ge=0)
    hours: list[Annotated[str, AfterValidator(_is_spell)]] = Field(default=[])
    max_megabytes: float = Field(default=1000.0, gt=0)
    tensors: list[str] = Field(default=["*"])
    metrics: Annotated[list[Annotated[str, AfterValidator(_knows)]], AfterValidator(_with_loss)] = Field(default=["*"])
    epsilon: float = Field(default=0.0, ge=0)
    delta: float = Field(default=1e-6, gt=0, lt=1)
    threads: int = Field(default=0, ge=0)
    memory_gb: float = Field(default=0.0, ge=0)
    gpu: bool = True

    def check(self, study: Study) -> None:
        """Refuse a study that is outside.

        Raises:
            Refused: it is; the text says which limit.
        """
        if other := [stage.method for stage in study.stages if stage.method not in self.methods]:
            raise _beyond(f"does not allow {other[0]}")
        if study.rounds > self.max_rounds:
            raise _beyond(f"allows {self.max_rounds} rounds; the study has {study.rounds}")
        if self.threads and study.compute.threads > self.threads:
            raise _beyond(f"allows {self.threads} threads; the study computes with {study.compute.threads}")
        if self.epsilon and study.privacy.mode != "patient":
            raise _beyond(f"asks for differential privacy of patients (epsilon {self.epsilon:g}); the study has none")

    @property
    def caps(self) -> tuple[Cap, ...]:
        """What the site's privacy ledger may come to."""
        return (Cap(self.epsilon, self.delta),) if self.epsilon else ()

    def check_cohort(self, patients: int) -> None:
        """Refuse to train on too few.

        Raises:
            CohortError: they are.
        """
        if patients < self.min_patients:
            raise CohortError("the site has too few patients for its own policy", "leave the site out")

    def check_update(self, tensors: Mapping[str, int]) -> None:
        """Refuse to let an update leave; `tensors` are its names, each with its bytes.

        Raises:
            Refused: a tensor may not leave, or they are too large together.
        """
        if kept := [name for name in tensors if not _allowed(name, self.tensors)]:
            raise _beyond(f"keeps {len(kept)} of the update's {len(tensors)} tensors here, {kept[0]} among them")
        if (size := sum(tensors.values()) / 1e6) > self.max_megabytes:
            raise _beyond(f"allows updates of {self.max_megabytes:g} MB; one of the study has {size:.1f} MB")

    def check_hours(self, now: time | None = None) -> None:
        """Refuse to begin outside the site's hours; what has begun is finished.

        Raises:
            Refused: it is now (by default this machine's time of day) outside; the text says when it is not.
        """
        clock = (now or datetime.now().time()).strftime("%H:%M")
        if self.hours and not any(_within(clock, *spell.split("-")) for spell in self.hours):
            text = f"the site works {' and '.join(self.hours)} by its own clock, where it is {clock}"
            raise Refused(text, "nothing: the coordinator asks again in the next round")

    def orders(self, study: Study) -> int:
        """How many orders of a study may be carried out; some are asked for again when a connection was lost."""
        return self.max_orders or 3 * study.rounds + 20

    def figures(self) -> list[str]:
        """The metrics that may leave."""
        return sorted(name for name in METRICS if _allowed(name, self.metrics))

    def withhold(self, content: object) -> None:
        """Take the metrics that may not leave out of a message's content."""
        records: Mapping[str, Any] = getattr(content, "metric_records", {})
        for record in records.values():
            for name in record.keys() - set(self.figures()):
                del record[name]

    def words(self) -> Iterator[str]:
        """The limits as sentences."""
        limits = f"at most {self.max_rounds} rounds, at least {self.min_patients} patients"
        yield f"trains {', '.join(self.methods)}: {limits}"
        yield f"carries out at most {self.max_orders or '3 a round and 20 more'} orders of a study"
        yield f"begins work {' and '.join(self.hours) or 'at any hour'}"
        yield f"lets out updates of at most {self.max_megabytes:g} MB, of the tensors {', '.join(self.tensors)}"
        yield f"lets out the figures {', '.join(self.figures())}"
        cap = f"epsilon of at most {self.epsilon:g} at delta {self.delta:g}, all studies together"
        yield f"differential privacy of patients: {cap if self.epsilon else 'not asked for'}"
        memory = f"{self.memory_gb:g} GB a process" if self.memory_gb else "memory without a limit"
        threads = f"at most {self.threads} threads" if self.threads else "the study's number of threads"
        yield f"uses {threads}, {memory}, {'a GPU where there is one' if self.gpu else 'no GPU'}"


def _beyond(what: str) -> Refused:
    return Refused(f"the site's policy {what}", "ask the site to widen [policy] in its site.toml, or change the study")


def _allowed(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _within(clock: str, start: str, end: str) -> bool:
    """Is a time of day from `start` on and before `end`, perhaps over midnight?"""
    return start <= clock < end if start < end else clock >= start or clock < end
