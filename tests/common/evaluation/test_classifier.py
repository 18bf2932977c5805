"""Scores of a classifier against scikit-learn and loops; labelled patients and targets."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from polyclinic.errors import CohortError
from polyclinic.evaluation import NotMeasurable, classifier_scores, labelled_patients, targets_of
from polyclinic.evaluation.classifier import classifier_auc, expected_calibration_error, operating_point
from polyclinic.stages import Finetune
from polyclinic.study import Evaluation

from ...tiny import in_memory

LABELS = {"clear": ["clear"], "spot": ["spot"]}


def stage_of(**settings: object) -> Finetune:
    return Finetune.model_validate({"kind": "finetune", "method": "supervised", "rounds": 8} | settings)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("multi_label", [False, True])
def test_scores_equal_scikit_learns(classes: int, multi_label: bool) -> None:
    rng = np.random.default_rng(classes)
    n = 200
    targets = np.zeros((n, classes), np.float32)
    if multi_label:
        targets[:] = rng.random((n, classes)) < 0.3
    else:
        targets[np.arange(n), rng.integers(0, classes, n)] = 1
    logits = (targets + rng.normal(0, 1.5, targets.shape)).astype(np.float32)
    targets[::17] = np.nan
    patients = np.arange(n) // 2
    names = [f"class {k}" for k in range(classes)]
    scores = classifier_scores(logits, targets, patients, names, multi_label=multi_label, seed=0)
    assert classifier_auc(logits, targets, patients, names, multi_label=multi_label) == scores.auc
    assert classifier_auc(logits[:1], targets[:1], patients[:1], names, multi_label=multi_label) is None
    known = ~np.isnan(targets[:, 0])
    z, y = logits[known].astype(float), targets[known] > 0
    p = 1 / (1 + np.exp(-z)) if multi_label else np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert scores.auc == pytest.approx(np.mean([roc_auc_score(y[:, k], p[:, k]) for k in range(classes)]))
    assert scores.auc_low < scores.auc < scores.auc_high
    assert scores.accuracy_low < scores.accuracy < scores.accuracy_high
    if multi_label:
        balanced = np.mean([balanced_accuracy_score(y[:, k], z[:, k] >= 0) for k in range(classes)])
        assert scores.accuracy == pytest.approx(((z >= 0) == y).mean())
    else:
        balanced = balanced_accuracy_score(y.argmax(1), z.argmax(1))
        assert scores.accuracy == pytest.approx((z.argmax(1) == y.argmax(1)).mean())
    assert scores.balanced_accuracy == pytest.approx(balanced)
    assert scores.n_test == len(np.unique(patients[known]))
    assert [point["class"] for point in scores.operating[::3]] == names


def test_certain_answers_are_still_ranked_and_rare_classes_left_out() -> None:
    targets = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    logits = np.array([[90, 0], [88, 0], [60, 0], [58, 0]], np.float32)
    assert classifier_scores(logits, targets, np.arange(4), ["a", "b"], multi_label=False, seed=0).auc == 1
    targets = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]]
    logits = 5 * np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 0]]  # the one patient of the third class is missed
    scores = classifier_scores(logits, targets, np.arange(5), ["a", "b", "c"], multi_label=False, seed=0)
    assert scores.balanced_accuracy == 1
    assert {point["class"] for point in scores.operating} == {"a", "b"}


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_that_always_gives_one_answer_is_told(multi_label: bool) -> None:
    targets = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    ranked = np.array([[3, -3], [2, -2], [1, -1.5], [0.5, -1]], np.float32)  # all are the first class
    for logits, told in ((ranked, True), (ranked * [[1, 1]] * 3 + [[0, 0], [0, 0], [0, 0], [-9, 9]], False)):
        scores = classifier_scores(
            np.asarray(logits, np.float32), targets, np.arange(4), ["a", "b"], multi_label=multi_label, seed=0
        )
        assert scores.one_answer == told
        assert "one_answer" not in scores.row()


def test_calibration_error_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    confidence, right = rng.random(300), rng.random(300) < 0.6
    total = 0.0
    for k in range(15):
        inside = [i for i in range(300) if k / 15 <= confidence[i] < (k + 1) / 15]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / 300 * abs(gap)
    assert expected_calibration_error(confidence, right) == pytest.approx(total)
    assert expected_calibration_error(np.ones(5), np.ones(5, bool)) == 0


def test_an_operating_point_is_the_highest_threshold_that_reaches_the_sensitivity() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    positive = np.array([1, 1, 0, 1, 0, 1, 0, 1], bool)
    point = operating_point(scores, positive, 0.8)
    assert point == {
        "threshold": 0.4, "sensitivity": 0.8, "specificity": pytest.approx(1 / 3), "ppv": pytest.approx(4 / 6),
        "npv": 0.5,
    }  # fmt: skip
    for wanted in np.linspace(0.05, 1, 20):
        found = operating_point(scores, positive, wanted)
        assert found["sensitivity"] >= wanted
        higher = scores[scores > found["threshold"]]
        assert all((scores[positive] >= t).mean() < wanted for t in higher)


def test_too_few_patients_of_a_class_are_not_measured() -> None:
    targets = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    with pytest.raises(NotMeasurable, match="two test patients"):
        classifier_scores(np.zeros((3, 2), np.float32), targets, np.arange(3), ["a", "b"], multi_label=False, seed=0)
    with pytest.raises(NotMeasurable, match="not finite"):
        classifier_scores(targets * np.nan, targets, np.arange(3), ["a", "b"], multi_label=False, seed=0)


def test_targets_know_unmapped_and_ignored_words() -> None:
    words = np.array(["a", "b|x", "x", "", "?", "a|b"])
    mapping = {"B": ["b"], "A": ["a"], "ignore": ["?"]}
    single, several = targets_of(words, mapping, False), targets_of(words, mapping, True)
    nan = [np.nan, np.nan]
    assert np.array_equal(single, np.array([[1, 0], nan, nan, nan, nan, nan]), equal_nan=True)
    assert np.array_equal(several, np.array([[1, 0], [0, 1], [0, 0], nan, nan, [1, 1]]), equal_nan=True)


def test_fractions_are_of_patients_stratified_and_nested() -> None:
    cohort, evaluation = in_memory(40), Evaluation(labels=LABELS)
    smaller: set[bytes] = set()
    for fraction, each in ((0.01, 1), (0.1, 2), (0.5, 10), (1.0, 20)):
        train, validation = labelled_patients(cohort, evaluation, stage_of(label_fraction=fraction), seed=5)
        assert validation is None
        assert train.n_patients == 2 * each
        assert len(train) == 2 * train.n_patients  # with all their images
        assert (train.labels == "spot").sum() == 2 * each
        images = {train.pixels([k]).numpy().tobytes() for k in range(len(train))}
        assert smaller <= images
        smaller = images


def test_validation_patients_do_not_train_whatever_the_fraction() -> None:
    cohort, evaluation = in_memory(40), Evaluation(labels=LABELS)
    kept = None
    for fraction in (0.1, 1.0):
        train, validation = labelled_patients(cohort, evaluation, stage_of(label_fraction=fraction, patience=2), seed=1)
        assert validation is not None
        assert validation.n_patients == 8
        held = {validation.pixels([k]).numpy().tobytes() for k in range(len(validation))}
        assert not held & {train.pixels([k]).numpy().tobytes() for k in range(len(train))}
        assert kept in (None, held)
        kept = held
    assert train.n_patients == 32


def test_a_site_without_labels_says_so() -> None:
    with pytest.raises(CohortError, match="no training patient has a label"):
        labelled_patients(in_memory(6), Evaluation(labels={"a": ["x"], "b": ["y"]}), stage_of(), seed=0)
