"""How well probabilities tell classes apart: AUC, balanced accuracy, and 95 % intervals over patients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.labels import NotMeasurable

RESAMPLES = 1_000
MAX_DRAWS = 50 * RESAMPLES
"""Resamples drawn at most; those that lack a class are drawn again."""
CHUNK = 4_000_000
"""Weights (resamples x images) held at once: 32 MB."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a probe found on the test patients.

    Attributes:
        auc: area under the ROC curve; several classes: macro mean of one-vs-rest.
        auc_low, auc_high: 95 % percentile bootstrap over test patients.
        balanced_accuracy: mean over classes of the fraction of its images that were recognised.
        n_train: labelled images that the probe learnt from.
        n_test: labelled patients that it was measured on.
        one_answer: whether every test image was given the same class.
        test_images: those patients' labelled images.
        classes: that it tells apart, sorted.
    """

    auc: float
    auc_low: float
    auc_high: float
    balanced_accuracy: float
    n_train: int
    n_test: int
    one_answer: bool = False
    test_images: int = 0
    classes: list[str] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """The figures of a row of `comparison` in summary.json."""
        figures = ("auc", "auc_low", "auc_high", "balanced_accuracy", "n_test")
        return {name: getattr(self, name) for name in figures}


def score(
    probabilities: Floats,
    truth: NDArray[np.intp],
    patients: NDArray[np.integer],
    *,
    seed: int,
    n_train: int,
    classes: Sequence[str] = (),
) -> Scores:
    """Scores of (images, classes) probabilities against (images,) class indices; every class must occur.

    Raises:
        NotMeasurable: nearly every resample of these patients lacks a class.
    """
    numbers, clusters = np.unique(patients, return_inverse=True)
    members = truth[:, None] == np.unique(truth)
    resampled = np.concatenate(
        [macro_auc(probabilities, truth, weights) for weights in resamples(members, clusters, seed)]
    )
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Scores(
        auc=float(macro_auc(probabilities, truth, np.ones((1, len(truth))))[0]),
        auc_low=float(low),
        auc_high=float(high),
        balanced_accuracy=balanced_accuracy(probabilities, truth),
        n_train=n_train,
        n_test=len(numbers),
        one_answer=len(np.unique(probabilities.argmax(axis=1))) == 1,
        test_images=len(truth),
        classes=list(classes),
    )


def balanced_accuracy(probabilities: Floats, truth: NDArray[np.intp]) -> float:
    """Mean over classes of the recall of the likeliest class."""
    right = probabilities.argmax(axis=1) == truth
    return float(np.mean([right[truth == k].mean() for k in range(probabilities.shape[1])]))


def macro_auc(probabilities: Floats, truth: NDArray[np.intp], weights: Floats) -> Floats:
    """(resamples,) mean over classes of one-vs-rest AUC; two classes are one question.

    `probabilities` is (images, classes), `weights` (resamples, images): how often each resample holds each image.
    """
    classes = range(probabilities.shape[1]) if probabilities.shape[1] > 2 else [1]
    areas: Floats = np.mean([auc(probabilities[:, k], truth == k, weights) for k in classes], axis=0)
    return areas


def auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """(resamples,) the probability that a positive image scores above a negative one, ties counting half.

    Weighted Mann-Whitney statistic: images are sorted once by score, then every resample is a row of sums over them.
    """
    order = np.argsort(scores, kind="stable")
    first_of_tie = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    weights, positive = weights[:, order], positive[order]
    positives = np.add.reduceat(weights * positive, first_of_tie, axis=1)  # (resamples, distinct scores)
    negatives = np.add.reduceat(weights * ~positive, first_of_tie, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    wins: Floats = (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))
    return wins


def resamples(members: NDArray[np.bool_], clusters: NDArray[np.intp], seed: int) -> Iterator[Floats]:
    """RESAMPLES weights in all, in chunks of (resamples, images): patients drawn with replacement, images and all.

    `members` is (images, groups); a resample without an image of some group is drawn again. `clusters` is the patient
    of each image.

    Raises:
        NotMeasurable: nearly every resample of these patients lacks a group.
    """
    rng = np.random.default_rng(seed)
    n_patients = int(clusters.max()) + 1
    at_once = max(1, min(RESAMPLES, CHUNK // len(members)))
    found = drawn = 0
    while found < RESAMPLES:
        if drawn >= MAX_DRAWS:
            raise NotMeasurable(f"too few test patients of some class for an interval ({n_patients} patients in all)")
        draws = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=at_once)
        weights = draws[:, clusters].astype(np.float64)
        whole = np.all([weights[:, group].any(axis=1) for group in members.T], axis=0)
        weights = weights[whole][: RESAMPLES - found]
        found, drawn = found + len(weights), drawn + at_once
        if len(weights):
            yield weights
