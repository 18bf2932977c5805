"""Membership audits: a bound that epsilon cannot be below, from how well an attacker tells who took part.

A canary is a patient who may take part. The attacker knows all but the noise and who is drawn, and gives what a run has
released a score. (epsilon, delta)-privacy bounds what any test on such scores can do (Kairouz, Oh and Viswanath, The
composition theorem for differential privacy, ICML 2015): for its rates of true and false positives

    TPR <= exp(epsilon) FPR + delta,    so    epsilon >= log((TPR - delta) / FPR),

and the same for tests that look for absence. Half of the scores choose the test, the others measure it once, by exact
binomial bounds (Clopper and Pearson, Biometrika 1934), as in Jagielski, Ullman and Oprea, Auditing differentially
private machine learning, NeurIPS 2020.

A run has many canaries where it can, as in Steinke, Nasr and Jagielski, Privacy auditing with one (1) training run,
NeurIPS 2023; but here they are independent: each is white in pixels of its own, so that the gradients of a linear
classifier share nothing but its bias, and no score depends on who else takes part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor, nn

from polyclinic import training
from polyclinic.cohort import Cohort
from polyclinic.methods.base import Method
from polyclinic.methods.supervised import Supervised
from polyclinic.privacy.accounting import Event, epsilon
from polyclinic.privacy.dpsgd import sampling_rate, steps_of_round
from polyclinic.seeding import forked
from polyclinic.stages import Finetune, Stage, Views
from polyclinic.study import Compute, PatientPrivacy

CONFIDENCE = 0.999
"""That a lower bound is below the true epsilon: an honest mechanism is blamed in one audit of a thousand at most."""
DELTA = 0.01
"""At which epsilons are compared. A private mechanism keeps its promise at every delta; at a small one, only very many
runs could show that another does not."""
PATIENTS = 16
SIDE = 16
"""Of an image, pixels."""
PLAIN_SGD = {
    "rounds": 1,
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_rounds": 0.0,
    "views": Views(crop=(1.0, 1.0), flip=False, rotation=0.0, jitter=0.0),
}
"""From which a released sum of gradients is read back exactly, and views that change nothing."""

Scores = NDArray[np.float64]
Mechanism = Callable[[PatientPrivacy], training.Recipe]


def rates(hits: NDArray[np.int64], trials: int) -> tuple[Scores, Scores]:
    """Lowest and highest rate that so many hits in so many trials allow.

    Each fails with half of 1 - CONFIDENCE, so that one lower and one upper bound hold together.
    """
    tail = (1 - CONFIDENCE) / 2
    low = np.where(hits > 0, beta.ppf(tail, hits, trials - hits + 1), 0.0)
    high = np.where(hits < trials, beta.ppf(1 - tail, hits + 1, trials - hits), 1.0)
    return low, high


def implied(present: Scores, absent: Scores, thresholds: Scores) -> Scores:
    """(2, thresholds) epsilons: of the tests that call a higher score present, and those that call others absent."""
    seen, missed = ((scores[:, None] > thresholds).sum(axis=0) for scores in (present, absent))
    guesses = (
        (seen, len(present), missed, len(absent)),
        (len(absent) - missed, len(absent), len(present) - seen, len(present)),
    )
    bounds = [(rates(true, of)[0], rates(false, among)[1]) for true, of, false, among in guesses]
    return np.stack([np.log(np.maximum(low - DELTA, 1e-12) / high) for low, high in bounds])


def lower_bound(present: Scores, absent: Scores) -> float:
    """What epsilon at DELTA is not below, from independent scores of canaries that took part and that did not."""
    choosing, measuring = zip(*(np.split(scores, [len(scores) // 2]) for scores in (present, absent)), strict=True)
    thresholds = np.unique(np.concatenate(choosing))
    kind, place = divmod(int(implied(*choosing, thresholds).argmax()), len(thresholds))
    return max(0.0, float(implied(*measuring, thresholds[[place]])[kind, 0]))


def released(
    module: nn.Module,
    method: Method,
    cohort: Cohort,
    stage: Stage,
    recipe: training.Recipe,
    rounds: int = 1,
    targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """Train; the sum over all steps of what the optimizer was given, by parameter, with its sign turned.

    Whoever sees each step's weights knows it. It is read off the last ones and SGD's last velocity: with v' = m v + g
    and w' = w - r v', the sum of g is (1 - m) (w_first - w_last) / r + m v_last.
    """
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    moments = None
    for number in range(rounds):
        _, moments = training.train(
            module,
            method,
            cohort,
            stage,
            Compute(threads=1, precision="fp32"),
            stage_round=0,
            seed=number,
            targets=targets,
            optimizer_state=moments,
            recipe=recipe,
        )
    keep = training.MOMENTUM
    return {
        name: (1 - keep) * (value.detach() - before[name]) / stage.learning_rate
        - keep * (moments or {})[f"{name}.momentum_buffer"]
        for name, value in module.named_parameters()
    }


def cohort_of(images: NDArray[np.uint8], each: int = 1) -> Cohort:
    """(n, 1, SIDE, SIDE) images, `each` in turn of one patient."""
    unknown = np.full(len(images), "")
    patients = np.arange(len(images), dtype=np.int32) // each
    return Cohort(Path("memory"), images, np.arange(len(images)), patients, unknown, unknown, unknown, unknown)


class Pixels(nn.Flatten):
    """An encoder that learns nothing: (n, 1, SIDE, SIDE) -> (n, dim)."""

    dim = SIDE * SIDE


@dataclass(frozen=True)
class Setting:
    """One round of supervised training of PATIENTS patients, of whom some are canaries.

    Attributes:
        noise: as a multiple of the clip.
        batch_size: patients that a step expects.
        epochs: in the round.
        images: of a patient, all the same.
        canaries: 16, or 1 that is white all over, whose gradient is longer.
    """

    noise: float
    batch_size: int
    epochs: int = 1
    images: int = 1
    canaries: int = 16

    @property
    def stage(self) -> Finetune:
        """The settings of training."""
        return Finetune(
            kind="finetune",
            method="supervised",
            batch_size=self.batch_size,
            local_epochs=self.epochs,
            probe_rounds=0,
            layer_decay=1.0,
            class_weights="none",
            **PLAIN_SGD,
        )

    def claim(self, units: int = PATIENTS) -> float:
        """The epsilon of a round in which so many units are drawn from."""
        event = Event(self.noise, sampling_rate(units, self.batch_size), steps_of_round(units, self.stage))
        return epsilon([event], DELTA)

    def cohort(self) -> Cohort:
        """Canaries, each white in a square of its own, then patients whose images are black."""
        images = np.zeros((PATIENTS, 1, SIDE, SIDE), np.uint8)
        across = isqrt(self.canaries)
        side = SIDE // across
        for canary in range(self.canaries):
            row, column = (side * place for place in divmod(canary, across))
            images[canary, 0, row : row + side, column : column + side] = 255
        return cohort_of(images.repeat(self.images, axis=0), self.images)

    def audit(self, mechanism: Mechanism, runs: int, rounds: int = 1) -> float:
        """A lower bound on the epsilon of a canary. Each takes part in half of the runs, by the toss of a coin.

        Who does not has images without a label, which teach nothing, as black ones teach nothing but the bias: the
        number of patients is public. The score is how far a canary's pixels have moved the classifier to its class.
        """
        cohort, method = self.cohort(), Supervised(self.stage, 2)
        recipe = mechanism(PatientPrivacy(mode="patient", noise=self.noise, clip=1.0))
        white = cohort.pixels(np.arange(self.canaries) * self.images).flatten(1).float()  # (canaries, pixels)
        coins = np.random.default_rng(0).random((runs, self.canaries)) < 0.5
        scores = np.empty(coins.shape)
        for run, there in enumerate(coins):
            labelled = np.pad(there, (0, PATIENTS - self.canaries)).repeat(self.images)
            targets = torch.where(torch.from_numpy(labelled)[:, None], torch.tensor([0.0, 1.0]), torch.nan)
            with forked(run):
                module = method.build(Pixels())
            head = released(module, method, cohort, self.stage, recipe, rounds, targets)["head.weight"]
            scores[run] = white @ (head[1] - head[0])
        return lower_bound(scores[coins], scores[~coins])
