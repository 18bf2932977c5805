"""A study's dry run at a site: a few batches of each stage on the site's own images, timed, and thrown away.

It runs in a process of its own, under the caps of the node, so that what does not fit there does not fit here. Nothing
is written to the study's state and nothing leaves.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

from polyclinic.cohort import Cohort, open_cohort
from polyclinic.errors import CohortError, PolyclinicError
from polyclinic.study import PatientPrivacy, Study, parse_canonical
from polyclinic_client import caps
from polyclinic_client.hospital import Hospital
from polyclinic_client.site import Site

if TYPE_CHECKING:
    from torch import nn

    from polyclinic.methods.supervised import Supervised

BATCHES = 5
"""Timed of each stage, after one that is not: the first finds and asks for memory."""
LONGEST_S = 3600.0


class Enough(Exception):
    """Ends a training that has been watched for long enough."""


@dataclass(frozen=True)
class Pace:
    """Of one stage.

    Attributes:
        images_s: images trained on a second; 0 where no patient to train on has the labels that it needs.
        round_s: seconds of a round: process start, measuring the tensors that came, training.
    """

    method: str
    rounds: int
    images_s: float
    round_s: float


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run has measured: the pace of each stage, and the most memory (MB) that it took."""

    stages: list[Pace]
    memory_mb: float
    device: str

    def later_than(self, study: Study) -> str:
        """What to know where a round takes longer than the coordinator waits; nothing where it does not."""
        slowest_s, deadline_s = max(stage.round_s for stage in self.stages), study.aggregation.round_deadline_s
        if slowest_s < deadline_s:
            return ""
        return f"a round takes about {duration(slowest_s)} and the coordinator waits {duration(deadline_s)} for it"

    @property
    def total_s(self) -> float:
        """Seconds of all rounds."""
        return sum(stage.rounds * stage.round_s for stage in self.stages)


def rehearse(hospital: Hospital, study: Study, cohort: Cohort) -> Rehearsal:
    """Run a study's first batches as the node would.

    Raises:
        PolyclinicError: it cannot train here; with the reason.
    """
    order = {"home": str(hospital.path), "study": study.canonical(), "cohort": str(cohort.folder), "began": time.time()}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "polyclinic_client.rehearsal"],
            input=json.dumps(order),
            env={**os.environ, **caps.environment(hospital.settings.policy)},
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise PolyclinicError("the dry run has not ended in an hour", "ask for a smaller study") from error
    except ValueError as error:
        what = f"the dry run was ended by signal {-done.returncode}" if done.returncode < 0 else "the dry run failed"
        raise PolyclinicError(
            f"{what}: {_last_line(done.stderr)}",
            "free memory, or raise memory_gb in site.toml where it is set; or ask for a smaller study",
        ) from error
    if "problem" in found:
        raise PolyclinicError(found["problem"], found["fix"])
    return Rehearsal([Pace(**stage) for stage in found["stages"]], found["memory_mb"], found["device"])


def duration(seconds: float) -> str:
    """In the unit that fits.

    >>> duration(0.4), duration(90), duration(5400)
    ('0.4 s', '1.5 min', '1.5 h')
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]


def main() -> None:
    """In the process of its own: an order on standard input, what was found on standard output."""
    order = json.load(sys.stdin)
    hospital = Hospital(Path(order["home"]))
    caps.limit_memory(hospital.settings.policy)
    study = parse_canonical(order["study"], "the study")
    site = Site(hospital.name, open_cohort(Path(order["cohort"])), hospital.path / "state")
    try:
        print(json.dumps(asdict(measure(study, site, order["began"]))))
    except PolyclinicError as error:
        print(json.dumps({"problem": error.problem, "fix": error.fix}))


def measure(study: Study, site: Site, began: float) -> Rehearsal:
    """Time each stage in this process, which was asked for at `began` (seconds since 1970).

    Raises:
        CohortError: no stage can be trained here.
    """
    from polyclinic.training import pick_device, use_threads

    device = pick_device()
    with use_threads(study.compute):
        start_s = time.time() - began
        stages = [_pace(study, number, site, start_s) for number in range(len(study.stages))]
    if not any(stage.images_s for stage in stages):
        raise CohortError(
            "no training patient has a label, and every stage needs one", "leave the site out, or name its words"
        )
    return Rehearsal(stages, caps.peak_mb(), device.type)


def _pace(study: Study, number: int, site: Site, start_s: float) -> Pace:
    import torch

    from polyclinic.evaluation import targets_of
    from polyclinic.model import build_stage
    from polyclinic.stages import Finetune
    from polyclinic.training import PLAIN, Recipe, pick_device, train

    recipe: Recipe = PLAIN
    if isinstance(study.privacy, PatientPrivacy):
        from polyclinic.privacy.dpsgd import PatientRecipe

        recipe = PatientRecipe(study.privacy)  # nothing is spent: what is trained here is thrown away
    stage, device, targets = study.stages[number], pick_device(), None
    method, module = build_stage(study, number)
    training, _ = site.split(study)
    if isinstance(stage, Finetune):
        try:
            training, _ = site.labelled(study, stage)
        except CohortError:
            return Pace(stage.method, stage.rounds, 0.0, 0.0)
        targets = torch.from_numpy(targets_of(training.labels, study.evaluation.labels, stage.multi_label))
        cast("Supervised", method).balance(targets)
        stage = stage.model_copy(update={"probe_rounds": 0})  # the rounds that train the encoder are the slow ones
    marks, steps = [perf_counter()], 1

    def watch(done: int, total: int) -> None:
        nonlocal steps
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(perf_counter())
        steps = total
        if done > BATCHES:
            raise Enough

    with suppress(Enough):
        train(
            module,
            method,
            training,
            stage,
            study.compute,
            stage_round=0,
            seed=0,
            targets=targets,
            progress=watch,
            recipe=recipe,
        )
    timed = marks[1:] if len(marks) > 2 else marks
    step_s = (timed[-1] - timed[0]) / (len(timed) - 1)
    images = 2 * training.n_patients if method.pairs else len(training)
    images = training.n_patients if recipe is not PLAIN else images
    every = study.evaluation.every
    measuring_s = _encoding_s(module, study, site.cohort) / every if every else 0.0
    images_s = stage.local_epochs * images / (steps * step_s)
    return Pace(stage.method, stage.rounds, images_s, start_s + measuring_s + steps * step_s)


def _encoding_s(module: "nn.Module", study: Study, cohort: Cohort) -> float:
    """Seconds to encode all images of a cohort, as probes need it: from one batch."""
    import numpy as np

    from polyclinic.evaluation.encoding import BATCH, encoded
    from polyclinic.training import pick_device

    batch = cohort.pixels(np.arange(min(BATCH, len(cohort)))).float() / 255
    encoder, device = module.get_submodule("encoder"), pick_device()
    encoded(encoder, [batch], study.compute, device)
    began = perf_counter()
    encoded(encoder, [batch], study.compute, device)
    return (perf_counter() - began) * len(cohort) / len(batch)


if __name__ == "__main__":
    main()
