import time

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from polyclinic.evaluation import NotMeasurable, knn_probe, linear_probe
from polyclinic.evaluation.probes import FALLBACK, FOLDS, _choose_strength, _folds, _unit, _votes


def blobs(images: int, classes: int, dim: int = 16, distance: float = 2.0, seed: int = 0):
    """Features, class names and patients (two images each) of Gaussian blobs."""
    rng = np.random.default_rng(seed)
    patients = np.arange(images) // 2
    y = patients % classes
    x = rng.normal(size=(images, dim)) + distance * np.eye(classes, dim)[y]
    return x.astype(np.float32), np.array([f"c{k}" for k in range(classes)])[y], patients


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_probe_finds_what_a_line_can_tell_and_nothing_in_noise(classes):
    train, test = blobs(200, classes, distance=3.0), blobs(160, classes, distance=3.0, seed=1)
    found = linear_probe(*train, *test, seed=0)
    assert found.auc > 0.9 and found.balanced_accuracy > 0.8
    assert found.auc_low < found.auc < found.auc_high
    assert (found.n_train, found.n_test) == (200, 80)
    train, test = blobs(200, classes, distance=0.0), blobs(160, classes, distance=0.0, seed=1)
    noise = linear_probe(*train, *test, seed=0)
    assert noise.auc_low < 0.5 < noise.auc_high


def test_probes_repeat_themselves_exactly():
    train, test = blobs(120, 3), blobs(90, 3, seed=1)
    assert linear_probe(*train, *test, seed=4) == linear_probe(*train, *test, seed=4)
    x, y, _ = train
    assert knn_probe(x, y, *test, neighbours=5) == knn_probe(x, y, *test, neighbours=5)


def test_unlabelled_images_and_hopeless_classes_take_no_part():
    (x, y, patients), test = blobs(120, 2), blobs(80, 2, seed=1)
    reference = linear_probe(x, y, patients, *test, seed=0)
    more = np.concatenate([x, np.full((3, 16), 1e6, np.float32)]), np.concatenate([y, ["", "", "only here"]])
    assert linear_probe(*more, np.concatenate([patients, [90, 91, 92]]), *test, seed=0) == reference


def test_imbalance_does_not_hide_the_rare_class():
    x, y, patients = blobs(400, 2, distance=4.0)
    keep = (y == "c0") | (patients % 20 == 1)
    test = blobs(200, 2, distance=4.0, seed=1)
    assert linear_probe(x[keep], y[keep], patients[keep], *test, seed=0).balanced_accuracy > 0.85


def test_scale_and_constant_features_do_not_matter():
    (x, y, patients), (tx, ty, tp) = blobs(120, 2), blobs(80, 2, seed=1)
    plain = linear_probe(x, y, patients, tx, ty, tp, seed=0)
    scale = np.geomspace(1e-2, 1e2, 16, dtype=np.float32)
    odd = [np.concatenate([z * scale, np.ones((len(z), 1), np.float32)], axis=1) for z in (x, tx)]
    scaled = linear_probe(odd[0], y, patients, odd[1], ty, tp, seed=0)
    assert scaled.auc == pytest.approx(plain.auc, abs=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_measured(bad):
    (x, y, patients), test = blobs(40, 2), blobs(40, 2, seed=1)
    x[3, 3] = bad
    with pytest.raises(NotMeasurable, match="not finite"):
        linear_probe(x, y, patients, *test, seed=0)
    with pytest.raises(NotMeasurable, match="not finite"):
        knn_probe(x, y, *test, neighbours=3)


def test_folds_keep_patients_whole_and_hold_every_class():
    _, y, patients = blobs(120, 4)
    classes = np.unique(y, return_inverse=True)[1]
    folds = _folds(classes, patients, seed=0)
    assert all(len(set(folds[patients == p])) == 1 for p in patients)
    assert all(set(classes[folds == fold]) == {0, 1, 2, 3} for fold in range(FOLDS))


def test_too_few_patients_to_cross_validate_take_the_fallback():
    x, y, patients = blobs(10, 2)
    classes = np.unique(y, return_inverse=True)[1]
    assert _folds(classes, patients, seed=0) is None
    assert _choose_strength(x.astype(float), classes, patients, seed=0) == FALLBACK


def test_penalty_is_strong_where_features_are_noise():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 300)), np.arange(150) % 2
    assert _choose_strength(x, y, np.arange(150), seed=0) == 0.001


@pytest.mark.parametrize(("images", "queries", "neighbours"), [(30, 7, 1), (80, 1100, 10), (12, 5, 12)])
def test_votes_agree_with_sklearns_neighbours(images, queries, neighbours):
    rng = np.random.default_rng(images)
    x, q, y = rng.normal(size=(images, 6)), rng.normal(size=(queries, 6)), np.arange(images) % 3
    twin = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    expected = twin.fit(x, y).predict_proba(q)
    np.testing.assert_allclose(_votes(_unit(x), np.eye(3)[y], _unit(q), neighbours), expected, atol=1e-9)


def test_knn_takes_fewer_neighbours_than_asked_where_there_are_fewer():
    (x, y, _), test = blobs(20, 2, distance=6.0), blobs(20, 2, distance=6.0, seed=1)
    assert knn_probe(x, y, *test, neighbours=1000).n_train == 20


def test_one_class_says_so():
    (x, y, patients), test = blobs(40, 1), blobs(40, 1, seed=1)
    with pytest.raises(NotMeasurable, match="one class"):
        linear_probe(x, y, patients, *test, seed=0)


def test_two_thousand_images_of_512_features_take_about_a_second():
    train, test = blobs(2000, 2, 512), blobs(500, 2, 512, seed=1)
    start = time.process_time()
    linear_probe(*train, *test, seed=0)
    assert time.process_time() - start < 4  # about 1 s on a quiet machine
