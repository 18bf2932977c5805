"""What a study will do at a site, before it is approved: in plain words, and as figures for scripts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from polyclinic.cohort import Cohort
from polyclinic.study import Study
from polyclinic_client.hospital import Hospital, what_leaves
from polyclinic_client.policy import Policy
from polyclinic_client.rehearsal import Rehearsal, duration, rehearse


@dataclass(frozen=True)
class Preview:
    """A study at a site.

    Attributes:
        trains_on: the images of each stage; None where no training patient has the label that it needs.
        leaves: for each stage, the tensors that leave by name, each with its bytes.
    """

    study: Study
    policy: Policy
    cohort: Cohort
    trains_on: list[Cohort | None]
    leaves: list[dict[str, int]]
    rehearsal: Rehearsal

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
            "privacy": self.study.privacy.model_dump(),
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
        yield f"with it the number of patients, and the figures {', '.join(self.policy.figures())}"
        yield _privacy(study)
        when = f"between {' and '.join(self.policy.hours)}" if self.policy.hours else "at any hour"
        yield (
            f"begins work {when}; the approval stands until you withdraw it, or {self.policy.orders(study)} orders "
            "have been carried out"
        )


def preview(hospital: Hospital, study: Study, cohort: Cohort) -> Preview:
    """Look at a study, and try it.

    Raises:
        PolyclinicError: it is beyond the policy, or cannot be trained here.
    """
    leaves = what_leaves(study)
    hospital.permit(study, leaves, cohort)
    pace = rehearse(hospital, study, cohort)
    return Preview(study, hospital.settings.policy, cohort, hospital.trains_on(study, cohort), leaves, pace)


def _size(cohort: Cohort) -> str:
    return f"{len(cohort)} images of {cohort.n_patients} patients"


def _parts(tensors: dict[str, int]) -> str:
    """The tensors by the part of the network that they belong to."""
    counts = Counter(name.partition(".")[0] for name in tensors)
    return "the change of " + ", ".join(f"{count} tensors of {part}" for part, count in counts.items())


def _privacy(study: Study) -> str:
    if study.privacy.mode == "none":
        return "no differential privacy: the change of the weights may tell something about single images"
    promised = ", ".join(f"{name} {value}" for name, value in study.privacy.model_dump().items())
    return f"differential privacy: {promised}"
