"""What a study will do at a site, before it is approved: in plain words, and as figures for scripts."""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.privacy.ledger import Cap, check_delta
from polyclinic.stages import UNPAIRED
from polyclinic.study import PatientPrivacy, SitePrivacy, Study
from polyclinic_client.hospital import Hospital, what_leaves
from polyclinic_client.policy import Policy
from polyclinic_client.rehearsal import Rehearsal, duration, rehearse


@dataclass(frozen=True)
class Spending:
    """What a study would spend of the patients' privacy here.

    Attributes:
        epsilon: all rounds of the study, at the study's delta.
        rounds: of the study that train here; of a stage without labels here there are none.
        fits: of these, those that neither the study's limit nor the site's own forbids.
        before: what was spent here by all studies, at the site's delta.
        after: that, and what fits of this study.
        delta: the site's.
        caps: the study's limit, and the site's own if it has one.
    """

    epsilon: float
    rounds: int
    fits: int
    before: float
    after: float
    delta: float
    caps: list[Cap]


@dataclass(frozen=True)
class Preview:
    """A study at a site.

    Attributes:
        trains_on: the images of each stage; None where no training patient has the label that it needs.
        leaves: for each stage, the tensors that leave by name, each with its bytes.
        spending: None where the study promises patients no privacy.
    """

    study: Study
    policy: Policy
    cohort: Cohort
    trains_on: list[Cohort | None]
    leaves: list[dict[str, int]]
    rehearsal: Rehearsal
    spending: Spending | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        pace = self.rehearsal
        return {
            "study": self.study.name,
            "hash": self.study.hash,
            "images": len(self.cohort),
            "patients": self.cohort.n_patients,
            "stages": [
                {
                    **asdict(stage),
                    "images": len(training) if training else 0,
                    "patients": training.n_patients if training else 0,
                    "bytes_a_round": sum(tensors.values()),
                    "tensors": sorted(tensors),
                }
                for stage, training, tensors in zip(pace.stages, self.trains_on, self.leaves, strict=True)
            ],
            "estimate": {"seconds": pace.total_s, "memory_mb": pace.memory_mb, "device": pace.device},
            "metrics": self.policy.figures(),
            "privacy": self.study.privacy.model_dump()
            | ({"spending": asdict(self.spending)} if self.spending is not None else {}),
            "max_orders": self.policy.orders(self.study),
            "hours": self.policy.hours,
        }

    def words(self) -> Iterator[str]:
        """For who is to decide."""
        study, pace = self.study, self.rehearsal
        yield f"{study.name} ({study.hash})"
        for stage, training in zip(study.stages, self.trains_on, strict=True):
            rounds = f"{stage.rounds} rounds of {stage.method}"
            passes = f", {stage.local_epochs} passes each" * (stage.local_epochs > 1)
            what = f"{_size(training)}{passes}" if training else "nothing: no patient to train on has its labels here"
            yield f"trains {rounds} on {what}"
            if stage.method == "micle" and training and training.unpaired:
                yield UNPAIRED
        yield f"of the {_size(self.cohort)} here, some patients are for measuring only and are never trained on"
        paces = ", ".join(f"{duration(stage.round_s)} a round of {stage.method}" for stage in pace.stages)
        yield (
            f"takes about {paces}, {duration(pace.total_s)} in all, and {pace.memory_mb / 1e3:.1f} GB of memory: an "
            f"estimate from a few batches just now on the {'processor' if pace.device == 'cpu' else 'GPU'}"
        )
        if late := pace.later_than(study):
            yield late
        for stage, tensors in zip(study.stages, self.leaves, strict=True):
            yield f"each round of {stage.method} lets out {sum(tensors.values()) / 1e6:.1f} MB: {_parts(tensors)}"
        if study.privacy.mode == "none":
            yield f"with it the number of patients, and the figures {', '.join(self.policy.figures())}"
        yield from _privacy(study, self.spending)
        when = f"between {' and '.join(self.policy.hours)}" if self.policy.hours else "at any hour"
        yield (
            f"begins work {when}; the approval stands until you withdraw it, or {self.policy.orders(study)} orders "
            "have been carried out"
        )


def preview(hospital: Hospital, study: Study, cohort: Cohort) -> Preview:
    """Look at a study, and try it.

    Raises:
        PolyclinicError: it is beyond the policy or the privacy that is left, or cannot be trained here.
    """
    leaves = what_leaves(study)
    hospital.permit(study, leaves, cohort)
    trains_on = hospital.trains_on(study, cohort)
    spending = _spending(hospital, study, trains_on)
    pace = rehearse(hospital, study, cohort)
    return Preview(study, hospital.settings.policy, cohort, trains_on, leaves, pace, spending)


def _spending(hospital: Hospital, study: Study, trains_on: Sequence[Cohort | None]) -> Spending | None:
    """What the study would spend.

    Raises:
        Refused: not even its first round is within the limits.
        CohortError: a stage has too few patients here.
    """
    if not isinstance(study.privacy, PatientPrivacy):
        return None
    from polyclinic.privacy.accounting import epsilon
    from polyclinic.privacy.dpsgd import event_of_round

    own, ledger = hospital.settings.policy, hospital.spending
    caps = [Cap.of(study), *own.caps]
    rounds = []
    for stage, training in zip(study.stages, trains_on, strict=True):
        if training is not None:
            for cap in caps:
                check_delta(cap.delta, training.n_patients)
            rounds += [event_of_round(study.privacy, training.n_patients, stage)] * stage.rounds
    before = {cap: ledger.events(cap.study) for cap in caps}

    def fit(made: int) -> bool:
        return all(epsilon([*before[cap], *rounds[:made]], cap.delta) <= cap.epsilon for cap in caps)

    fits = bisect.bisect_left(range(len(rounds)), True, key=lambda made: not fit(made + 1))
    if rounds and not fits:
        raise Refused(
            "no round of the study is within what may be spent of the patients' privacy here",
            "see polyclinic site ledger, and polyclinic privacy plan for a study with more noise",
        )
    spent = ledger.events()
    return Spending(
        epsilon=epsilon(rounds, study.privacy.delta),
        rounds=len(rounds),
        fits=fits,
        before=epsilon(spent, own.delta),
        after=epsilon([*spent, *rounds[:fits]], own.delta),
        delta=own.delta,
        caps=caps,
    )


def _size(cohort: Cohort) -> str:
    return f"{len(cohort)} images of {cohort.n_patients} patients"


def _parts(tensors: dict[str, int]) -> str:
    """The tensors by the part of the network that they belong to."""
    counts = Counter(name.partition(".")[0] for name in tensors)
    return "the change of " + ", ".join(f"{count} tensors of {part}" for part, count in counts.items())


def _privacy(study: Study, spending: Spending | None) -> Iterator[str]:
    if study.privacy.mode == "none":
        yield "no differential privacy: the change of the weights may tell something about single images"
    if isinstance(study.privacy, SitePrivacy):
        yield (
            "differential privacy of whole sites, made by the coordinator, who sees this site's update as it is; no "
            "number of patients and no figure leaves"
        )
    if spending is not None:
        ours, *own = spending.caps
        yield (
            f"differential privacy of patients, made here: an epsilon of {spending.epsilon:.2f} at delta {ours.delta:g}"
            f" for the whole study, whose own limit is {ours.epsilon:g}; no number of patients and no figure leaves"
        )
        if spending.fits < spending.rounds:
            yield f"only {spending.fits} of its {spending.rounds} rounds are within the limits: the site then sits out"
        limit = f" of {own[0].epsilon:g}" if own else ", without a limit of the site's own,"
        yield (
            f"at this site's own delta, {spending.delta:g}, all studies together have spent "
            f"{spending.before:.2f}{limit} here, and will have spent {spending.after:.2f} after it"
        )
