"""The privacy ledger: what a site has spent of its patients' privacy, in all studies, for ever.

A round is reserved before it trains, and committed once it has: with what was really done. A reservation that was never
committed (the machine died) counts in full, so the ledger never reads below the truth.

All charges at a site compose, whatever their cohort: that two cohorts share no patient cannot be known from their
salted hashes, so they are taken to share all.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from polyclinic.chain import Chain, Entry, LedgerBroken
from polyclinic.cohort.identity import keyed
from polyclinic.errors import Refused
from polyclinic.privacy.accounting import Event, epsilon, grouped, rounds_that_fit
from polyclinic.study import PatientPrivacy, Study

VERSION = 1
"""Of the entries."""


class BudgetSpent(Refused):
    """A round would take the site's patients beyond a cap; nothing has been trained."""


@dataclass(frozen=True)
class Charge:
    """What a round of a study is about to do to a site's patients.

    Attributes:
        study: hash of the study, and `name` its name.
        stage, round: as the order gives them.
        model: SHA-256 of the tensors that the round starts from.
        cohort: `cohort_id` of the patients.
        patients: how many, taken as public.
        noise, rate, steps: as of an Event.
    """

    study: str
    name: str
    stage: int
    round: int
    model: str
    cohort: str
    patients: int
    noise: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Cap:
    """The most that may be spent: by the study of that hash, or, where `study` is "", by all together."""

    epsilon: float
    delta: float
    study: str = ""

    @classmethod
    def of(cls, study: Study) -> Self:
        """The one that a study with privacy sets for its own rounds."""
        assert isinstance(study.privacy, PatientPrivacy)
        return cls(study.privacy.epsilon, study.privacy.delta, study.hash)


@dataclass(frozen=True)
class Spending:
    """Of one study.

    Attributes:
        rounds: that were charged; one that was charged twice counts as two.
        steps: in them.
        last: when the last of them was reserved or committed, by the site's clock.
        noise: the least in any.
        events: all steps, to convert into an epsilon.
    """

    study: str
    name: str
    rounds: int
    steps: int
    last: str
    noise: float
    events: list[Event]


class PrivacyLedger:
    """The chain `privacy` in `folder`, which is made when the first charge is."""

    def __init__(self, folder: Path) -> None:
        self._chain = Chain(folder, "privacy")

    def reserve(self, charge: Charge, caps: Sequence[Cap]) -> int:
        """Charge a round before it trains, durably; returns the entry to commit.

        Raises:
            BudgetSpent: with everything ever charged it would pass one of `caps`.
            Refused: a delta is 1 / patients or more, a number is none of a charge, or a newer Polyclinic has written
                here.
            StorageError, LedgerBroken: it cannot be entered: nothing may train.
        """
        event = Event(charge.noise, charge.rate, charge.steps)
        for cap in caps:
            check_delta(cap.delta, charge.patients)

        def decide(entries: list[Entry]) -> Mapping[str, Any]:
            charges = _charges(entries)
            for cap in caps:
                _keep_to(cap, charge, event, _events(charges, cap.study))
            return {"version": VERSION, "kind": "reserve", **asdict(charge)}

        return self._chain.append(decide)

    def commit(self, entry: int, steps: int) -> None:
        """Enter how many of the steps that were reserved as `entry` were done: these count instead.

        Raises:
            LedgerBroken: more than were reserved, or none were under that number, or it was committed before.
        """

        def decide(entries: list[Entry]) -> Mapping[str, Any]:
            charged = _charges(entries).get(entry)
            if charged is None or charged.committed or not 0 <= steps <= charged.charge.steps:
                raise LedgerBroken(
                    f"{steps} steps cannot be committed as entry {entry} of the privacy ledger",
                    "all that was reserved counts as spent; report this as a defect",
                )
            return {"version": VERSION, "kind": "commit", "reserved": entry, "steps": steps}

        self._chain.append(decide)

    def epsilon(self, delta: float, study: str = "") -> float:
        """Spent so far, by one study or by all, at `delta`; raises LedgerBroken, and Refused as `reserve`."""
        return epsilon(self.events(study), delta)

    def events(self, study: str = "") -> list[Event]:
        """All steps so far, of one study or of all; raises as `epsilon`."""
        return grouped(_events(self._read(), study))

    def by_study(self) -> list[Spending]:
        """A row a study, in the order of their first charges; raises as `epsilon`."""
        studies: dict[str, list[_Charged]] = defaultdict(list)
        for charged in self._read().values():
            studies[charged.charge.study].append(charged)
        return [_spending(study, rows) for study, rows in studies.items()]

    def _read(self) -> dict[int, "_Charged"]:
        return _charges(self._chain.verified())

    def head(self) -> str:
        """Where the ledger ends, for the coordinator to keep and `holds` to be asked about: entries and SHA-256."""
        entries, sha256 = self._chain.head()
        return f"{entries}:{sha256}"

    def holds(self, head: str) -> bool:
        """Does the ledger lead on from that head? It does not where a backup was restored: what is spent is unknown."""
        entries, _, sha256 = head.partition(":")
        return entries.isdecimal() and self._chain.holds(int(entries), sha256)

    def verify(self) -> int:
        """The number of entries; raises LedgerBroken."""
        return self._chain.verify()


@dataclass
class _Charged:
    charge: Charge
    steps: int
    """That count: as reserved, until committed."""
    last: str
    committed: bool = False


def _charges(entries: Iterable[Entry]) -> dict[int, _Charged]:
    """Every reservation by its number, with what counts of it."""
    found: dict[int, _Charged] = {}
    for entry in entries:
        if entry["version"] > VERSION:
            raise Refused(
                f"entry {entry['entry']} of the privacy ledger was written by a newer Polyclinic",
                "install that version again: this one does not know what was spent",
            )
        if entry["kind"] == "reserve":
            charge = Charge(**{field.name: entry[field.name] for field in fields(Charge)})
            found[entry["entry"]] = _Charged(charge, charge.steps, entry["time"])
        else:
            charged = found[entry["reserved"]]
            charged.steps, charged.last, charged.committed = entry["steps"], entry["time"], True
    return found


def _events(charges: Mapping[int, _Charged], study: str) -> list[Event]:
    return [
        Event(charged.charge.noise, charged.charge.rate, charged.steps)
        for charged in charges.values()
        if study in ("", charged.charge.study)
    ]


def _spending(study: str, rows: Sequence[_Charged]) -> Spending:
    events = [Event(row.charge.noise, row.charge.rate, row.steps) for row in rows]
    return Spending(
        study,
        rows[-1].charge.name,
        len(rows),
        sum(row.steps for row in rows),
        rows[-1].last,
        min(row.charge.noise for row in rows),
        grouped(events),
    )


def _keep_to(cap: Cap, charge: Charge, event: Event, before: Sequence[Event]) -> None:
    """Raise BudgetSpent where `event` of `charge`, after `before`, would pass `cap`."""
    if cap.study not in ("", charge.study):
        return
    before = grouped(before)
    if (after := epsilon([*before, event], cap.delta)) <= cap.epsilon:
        return
    spent = epsilon(before, cap.delta)
    steps = rounds_that_fit(cap.epsilon, cap.delta, Event(event.noise, event.rate, 1), before)
    whose = "the study" if cap.study else "the site"
    raise BudgetSpent(  # the figures stay here: only the problem leaves a site, and they would tell of its patients
        f"round {charge.round} of study {charge.name!r} would pass what {whose} may spend of patients' privacy here",
        f"nothing was trained: it would come to epsilon {after:.3f} at delta {cap.delta:g} of {cap.epsilon:g}, "
        f"{spent:.3f} is spent, and {steps} of its {event.steps} steps are left; plan more noise or fewer rounds "
        f"(polyclinic privacy plan), or raise the epsilon of {whose}",
    )


def check_delta(delta: float, patients: int) -> None:
    """Refuse a delta at which publishing one patient outright would keep the promise."""
    if patients < 1 or delta * patients >= 1:
        raise Refused(
            f"delta is {delta:g}, which is 1 / patients or more, where no epsilon promises anything",
            f"with {patients} patients give one far below that, such as {0.1 / max(1, patients):.0e}",
        )


def cohort_id(salt: bytes, patients: Iterable[str]) -> str:
    """HMAC-SHA256 of the set of patients' keys, 32 hexadecimal digits: the same patients, the same id, and no more."""
    return keyed(salt, "cohort", "\n".join(sorted(set(patients))))
