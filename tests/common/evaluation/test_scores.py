import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from polyclinic.evaluation import NotMeasurable, Scores
from polyclinic.evaluation.scores import auc, balanced_accuracy, macro_auc, resamples, score


def drawn(images: int, classes: int, seed: int, rounding: int = 12):
    """Probabilities that lean towards the truth; few decimals give ties."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(images) % classes)
    raw = rng.random((images, classes)) + 0.4 * np.eye(classes)[truth]
    return np.round(raw / raw.sum(axis=1, keepdims=True), rounding), truth


@pytest.mark.parametrize("images", [5, 40, 501])
@pytest.mark.parametrize("rounding", [1, 12])
def test_auc_is_sklearns_also_with_ties_and_resampled(images, rounding):
    probabilities, truth = drawn(images, 2, images, rounding)
    rng = np.random.default_rng(images)
    picks = [np.arange(images), *(rng.integers(0, images, images) for _ in range(20))]
    picks = [pick for pick in picks if len(set(truth[pick])) == 2]
    weights = np.array([np.bincount(pick, minlength=images) for pick in picks], float)
    expected = [roc_auc_score(truth[pick], probabilities[pick, 1]) for pick in picks]
    np.testing.assert_allclose(auc(probabilities[:, 1], truth == 1, weights), expected, atol=1e-12)


@pytest.mark.parametrize("classes", [3, 7])
def test_macro_auc_and_balanced_accuracy_are_sklearns(classes):
    probabilities, truth = drawn(210, classes, classes)
    expected = roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert macro_auc(probabilities, truth, np.ones((1, 210)))[0] == pytest.approx(expected, abs=1e-9)
    expected = balanced_accuracy_score(truth, probabilities.argmax(axis=1))
    assert balanced_accuracy(probabilities, truth) == pytest.approx(expected, abs=1e-12)


def test_resamples_take_whole_patients_and_hold_every_class():
    clusters = np.array([0, 0, 0, 1, 2, 2, 3, 4])
    truth = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    weights = np.concatenate(list(resamples(truth[:, None] == np.unique(truth), clusters, seed=3)))
    assert weights.shape == (1000, 8)
    for cluster in range(5):
        assert np.ptp(weights[:, clusters == cluster], axis=1).max() == 0
    first_images = np.unique(clusters, return_index=True)[1]
    assert (weights[:, first_images].sum(axis=1) == 5).all()
    assert weights[:, truth == 1].any(axis=1).all() and weights[:, truth == 0].any(axis=1).all()


def test_interval_agrees_with_a_slow_twin():
    probabilities, truth = drawn(120, 2, 5)
    patients = np.arange(120) // 3
    rng, found = np.random.default_rng(99), []
    while len(found) < 700:
        pick = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(0, 40, 40)])
        found.append(roc_auc_score(truth[pick], probabilities[pick, 1]))
    fast = score(probabilities, truth, patients, seed=1, n_train=0)
    np.testing.assert_allclose([fast.auc_low, fast.auc_high], np.quantile(found, [0.025, 0.975]), atol=0.02)


def test_images_of_one_patient_widen_the_interval():
    few, truth = drawn(60, 2, 11)
    copied, copied_truth = np.repeat(few, 8, axis=0), np.repeat(truth, 8)
    clustered = score(copied, copied_truth, np.repeat(np.arange(60), 8), seed=0, n_train=0)
    naive = score(copied, copied_truth, np.arange(480), seed=0, n_train=0)
    assert clustered.auc == naive.auc
    assert clustered.auc_high - clustered.auc_low > 2 * (naive.auc_high - naive.auc_low)


def test_95_percent_intervals_hold_the_truth_about_95_percent_of_the_time():
    """Scores are N(1, 1) against N(0, 1): the true AUC is Phi(1 / sqrt 2) = 0.7602."""
    rng, held, trials = np.random.default_rng(0), 0, 200
    for trial in range(trials):
        truth = np.arange(100) % 2
        scores = rng.normal(truth)
        got = score(np.stack([-scores, scores], axis=1), truth, np.arange(100), seed=trial, n_train=0)
        held += got.auc_low <= 0.7602 <= got.auc_high
    assert 0.88 <= held / trials <= 0.99


def test_a_thousand_resamples_of_500_images_take_well_below_a_second():
    probabilities, truth = drawn(500, 2, 2)
    start = time.perf_counter()
    score(probabilities, truth, np.arange(500), seed=0, n_train=0)
    assert time.perf_counter() - start < 0.8


def test_a_perfect_and_a_blind_probe():
    truth = np.arange(40) % 2
    perfect = score(np.eye(2)[truth], truth, np.arange(40), seed=0, n_train=7)
    assert perfect == Scores(1.0, 1.0, 1.0, 1.0, 7, 40, test_images=40)
    assert not perfect.one_answer
    blind = score(np.full((40, 2), 0.5), truth, np.arange(40), seed=0, n_train=7)
    assert (blind.auc, blind.auc_low, blind.auc_high, blind.balanced_accuracy) == (0.5, 0.5, 0.5, 0.5)
    assert blind.one_answer
    assert score(np.array([[0.6, 0.4], [0.9, 0.1]])[truth], truth, np.arange(40), seed=0, n_train=7).one_answer
    assert blind.row() == {"auc": 0.5, "auc_low": 0.5, "auc_high": 0.5, "balanced_accuracy": 0.5, "n_test": 40}


def test_classes_that_resamples_nearly_always_lack_end_with_a_reason():
    truth = np.arange(40)
    with pytest.raises(NotMeasurable, match="too few test patients"):
        score(np.eye(40), truth, np.arange(40), seed=0, n_train=0)
