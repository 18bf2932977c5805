"""How good a fine-tuned classifier is on test patients: ranking, decisions, calibration, operating points."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from polyclinic.cohort import Cohort
from polyclinic.evaluation.encoding import features
from polyclinic.evaluation.labels import MIN_TEST_PATIENTS, NotMeasurable, targets_of
from polyclinic.evaluation.scores import Floats, auc, resamples
from polyclinic.seeding import seed_for
from polyclinic.stages import Finetune
from polyclinic.study import Study
from polyclinic.training import pick_device

BINS = 15
"""Of confidence, equally wide, in the calibration error (Guo et al., ICML 2017)."""
SENSITIVITIES = (0.8, 0.9, 0.95)
"""At which the operating points are given."""


@dataclass(frozen=True)
class ClassifierScores:
    """What a classifier's answers are worth.

    Attributes:
        auc, auc_low, auc_high: macro mean over classes of one-vs-rest (two exclusive classes are one question), with
            its 95 % percentile bootstrap over test patients.
        accuracy, accuracy_low, accuracy_high: fraction of the images whose class is the likeliest (multi-label: of the
            answers at 0.5), with its interval.
        balanced_accuracy: mean over classes of the recall; multi-label: of sensitivity and specificity at 0.5.
        ece: expected calibration error, mean gap between confidence and accuracy over 15 bins.
        operating: a row for each class and wanted sensitivity. Thresholds are chosen on the same test patients, so
            that the table describes the curve; it does not predict another hospital's.
        n_test: labelled patients that it was measured on.
        one_answer: whether every test image was given the same class (multi-label: the same answers at 0.5).
        test_images: those patients' labelled images.
        classes: that enough test patients have for the AUC.
        at_sites: {site: the same AUC on that site's test patients}, where a simulation has measured it; at a site that
            is held out, on all of its patients.
    """

    auc: float
    auc_low: float
    auc_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    ece: float
    n_test: int
    operating: list[dict[str, Any]]
    one_answer: bool = False
    test_images: int = 0
    classes: list[str] = field(default_factory=list)
    at_sites: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The figures of a row of `classifier` in summary.json."""
        others = ("operating", "one_answer", "test_images", "classes", "at_sites")
        return {name: value for name, value in vars(self).items() if name not in others}


def classifier_scores(
    logits: NDArray[np.float32],
    targets: NDArray[np.float32],
    patients: NDArray[np.integer],
    classes: list[str],
    *,
    multi_label: bool,
    seed: int,
) -> ClassifierScores:
    """Scores of (images, classes) logits against (images, classes) targets, NaN where nobody knows.

    Classes of fewer than two test patients are left out of the AUC and of the balanced accuracy.

    Raises:
        NotMeasurable: no class can be measured, or the logits are not finite.
    """
    answers, truth, patients = _known(logits, targets, patients)
    probabilities = 1 / (1 + np.exp(-answers)) if multi_label else _softmax(answers)
    measurable = _measurable(truth, patients)
    asked, ranks = _asked(measurable, classes, multi_label), answers if multi_label else _margins(answers)
    numbers, clusters = np.unique(patients, return_inverse=True)
    members = np.concatenate([truth[:, asked], ~truth[:, asked]], axis=1)
    right, confidence = _answers(probabilities, truth, multi_label)
    correct = right.reshape(len(truth), -1).mean(axis=1)  # (images,)
    areas, shares = [], []
    for weights in resamples(members, clusters, seed):
        areas.append(_macro(ranks, truth, asked, weights))
        shares.append(weights @ correct / weights.sum(axis=1))
    low, high = np.quantile(np.concatenate(areas), [0.025, 0.975])
    least, most = np.quantile(np.concatenate(shares), [0.025, 0.975])
    recalls = _recalls(probabilities, truth, multi_label, measurable)
    return ClassifierScores(
        auc=float(_macro(ranks, truth, asked, np.ones((1, len(truth))))[0]),
        auc_low=float(low),
        auc_high=float(high),
        accuracy=float(right.mean()),
        accuracy_low=float(least),
        accuracy_high=float(most),
        balanced_accuracy=float(np.mean(recalls)),
        ece=expected_calibration_error(confidence, right),
        n_test=len(numbers),
        operating=[
            {"class": classes[k], "wanted": wanted, **operating_point(probabilities[:, k], truth[:, k], wanted)}
            for k in measurable
            for wanted in SENSITIVITIES
        ],
        one_answer=len(np.unique(_called(probabilities, multi_label), axis=0)) == 1,
        test_images=len(truth),
        classes=[classes[k] for k in measurable],
    )


def _macro(ranks: Floats, truth: NDArray[np.bool_], asked: list[int], weights: Floats) -> Floats:
    """(resamples,) mean AUC of the classes that are asked about."""
    areas: Floats = np.mean([auc(ranks[:, k], truth[:, k], weights) for k in asked], axis=0)
    return areas


def score_classifier(
    module: nn.Module,
    cohorts: Mapping[str, Cohort],
    study: Study,
    stage: Finetune,
    held_out: Mapping[str, Cohort] = MappingProxyType({}),
) -> ClassifierScores:
    """`classifier_scores` of a module that turns images into logits, on the patients of the sites' cohorts together.

    With the AUC at each site, where it can be measured; those that are held out stand there alone.
    """
    classes, multi_label = study.evaluation.classes, stage.multi_label
    told = {
        name: (
            features(module, cohort, study.compute, pick_device()),
            targets_of(cohort.labels, study.evaluation.labels, multi_label),
            cohort.patients,
        )
        for name, cohort in {**cohorts, **held_out}.items()
    }
    logits, targets, patients = zip(*(told[name] for name in cohorts), strict=True)
    starts = np.cumsum([0] + [cohort.n_patients for cohort in cohorts.values()])
    whole = classifier_scores(
        np.concatenate(logits),
        np.concatenate(targets),
        np.concatenate([own + start for own, start in zip(patients, starts, strict=False)]),
        classes,
        multi_label=multi_label,
        seed=seed_for(study.seed, "probe"),
    )
    at_sites = {name: classifier_auc(*own, classes, multi_label=multi_label) for name, own in told.items()}
    return replace(whole, at_sites={name: area for name, area in at_sites.items() if area is not None})


def classifier_auc(
    logits: NDArray[np.float32],
    targets: NDArray[np.float32],
    patients: NDArray[np.integer],
    classes: list[str],
    *,
    multi_label: bool,
) -> float | None:
    """The AUC of `classifier_scores` by itself; None where it cannot be measured."""
    try:
        answers, truth, patients = _known(logits, targets, patients)
        asked = _asked(_measurable(truth, patients), classes, multi_label)
    except NotMeasurable:
        return None
    return float(_macro(answers if multi_label else _margins(answers), truth, asked, np.ones((1, len(truth))))[0])


def _known(
    logits: NDArray[np.float32], targets: NDArray[np.float32], patients: NDArray[np.integer]
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.integer]]:
    """The images whose classes are known."""
    known = ~np.isnan(targets).any(axis=1)
    answers = logits[known].astype(np.float64)
    if not np.isfinite(answers).all():
        raise NotMeasurable("the classifier's answers are not finite")
    return answers, targets[known] > 0, patients[known]


def _asked(measurable: list[int], classes: list[str], multi_label: bool) -> list[int]:
    """The classes whose AUC is taken: two exclusive ones are one question."""
    return measurable[:1] if not multi_label and len(classes) == 2 else measurable


def expected_calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Mean over answers of |accuracy - mean confidence| of their bin; both arguments are (answers,)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(gap).sum() / len(confidence))


def operating_point(scores: Floats, positive: NDArray[np.bool_], sensitivity: float) -> dict[str, float]:
    """The highest threshold at which `sensitivity` is reached, and what else holds there; calls are score >= it."""
    ordered = np.sort(scores[positive])[::-1]
    threshold = ordered[int(np.ceil(sensitivity * len(ordered) - 1e-9)) - 1]
    called = scores >= threshold
    hits, alarms = int((called & positive).sum()), int((called & ~positive).sum())
    negatives = int((~positive).sum())
    missed = len(ordered) - hits
    return {
        "threshold": float(threshold),
        "sensitivity": hits / len(ordered),
        "specificity": 1 - alarms / negatives,
        "ppv": hits / (hits + alarms),
        "npv": (negatives - alarms) / (negatives - alarms + missed) if negatives - alarms + missed else 1.0,
    }


def _measurable(truth: NDArray[np.bool_], patients: NDArray[np.integer]) -> list[int]:
    """The classes that enough test patients have, and enough have not."""
    found = [
        k
        for k in range(truth.shape[1])
        if all(len(np.unique(patients[side])) >= MIN_TEST_PATIENTS for side in (truth[:, k], ~truth[:, k]))
    ]
    if not found:
        raise NotMeasurable("no class has two test patients of it and two that are not")
    return found


def _margins(logits: Floats) -> Floats:
    """(images, classes) log-odds of each class: they rank where probabilities are rounded to 1."""
    others = [np.delete(logits, k, axis=1) for k in range(logits.shape[1])]
    return np.stack([z - np.logaddexp.reduce(rest, axis=1) for z, rest in zip(logits.T, others, strict=True)], axis=1)


def _answers(probabilities: Floats, truth: NDArray[np.bool_], multi_label: bool) -> tuple[NDArray[np.bool_], Floats]:
    """(answers,) which are right, and how sure each is."""
    if multi_label:
        yes = probabilities >= 0.5
        return (yes == truth).ravel(), np.where(yes, probabilities, 1 - probabilities).ravel()
    chosen = probabilities.argmax(axis=1)
    return np.take_along_axis(truth, chosen[:, None], axis=1)[:, 0], probabilities.max(axis=1)


def _called(probabilities: Floats, multi_label: bool) -> NDArray[Any]:
    """What each image is said to be: (images,) a class, or (images, classes) yes or no."""
    return probabilities >= 0.5 if multi_label else probabilities.argmax(axis=1)


def _recalls(probabilities: Floats, truth: NDArray[np.bool_], multi_label: bool, measurable: list[int]) -> list[float]:
    if multi_label:
        sides = [(k, side) for k in measurable for side in (True, False)]
        return [float(((probabilities[truth[:, k] == side, k] >= 0.5) == side).mean()) for k, side in sides]
    chosen = probabilities.argmax(axis=1)
    return [float((chosen[truth[:, k]] == k).mean()) for k in measurable]


def _softmax(logits: Floats) -> Floats:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = exponents / exponents.sum(axis=1, keepdims=True)
    return shares
