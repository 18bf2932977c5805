"""Two questions to a frozen encoder: can a straight line tell the classes apart (linear), do neighbours agree (kNN)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from polyclinic.evaluation.labels import NotMeasurable, Words, measurable_classes
from polyclinic.evaluation.scores import Floats, Scores, macro_auc, score

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse L2 penalties C that cross-validation chooses from."""
FALLBACK = 0.01
"""C where a class has too few training patients to cross-validate: strong, as features outnumber patients."""
FOLDS = 3
TEMPERATURE = 0.07
"""Of the votes of neighbours."""
QUERIES = 1_024
"""Test images compared with all training images at once."""

Features = NDArray[np.floating]
Patients = NDArray[np.integer]


def linear_probe(
    train_x: Features,
    train_y: Words,
    train_patients: Patients,
    test_x: Features,
    test_y: Words,
    test_patients: Patients,
    *,
    seed: int,
) -> Scores:
    """Logistic regression on standardised features, classes weighted equally, its penalty chosen on training patients.

    `*_x` are (images, dim), the others (images,); images whose class is "" take no part.

    Raises:
        NotMeasurable: too few classes, or features that are not finite.
    """
    classes = measurable_classes(train_y, test_y, test_patients)
    learnt = learn_probe(train_x, train_y, train_patients, classes, seed=seed)
    return learnt.score(test_x, test_y, test_patients, seed=seed)


@dataclass(frozen=True)
class Probe:
    """A linear probe that has learnt.

    Attributes:
        classes: that it tells apart, sorted.
        n_train: images that it learnt from.
        strength: the inverse penalty that was chosen.
    """

    classes: list[str]
    n_train: int
    strength: float
    _model: Any

    def score(self, x: Features, y: Words, patients: Patients, *, seed: int) -> Scores:
        """On the images that are of one of its classes, each of which must occur."""
        queries, truth, clusters = _chosen(self.classes, x, y, patients)
        return score(self._answers(queries), truth, clusters, seed=seed, n_train=self.n_train, classes=self.classes)

    def auc(self, x: Features, y: Words) -> float | None:
        """AUC on the images that are of one of its classes, over those of the classes that occur; None of one alone."""
        queries, truth, _ = _chosen(self.classes, x, y, np.zeros(len(y), np.int64))
        seen, truth = np.unique(truth, return_inverse=True)
        if len(seen) < 2:
            return None
        return float(macro_auc(self._answers(queries)[:, seen], truth, np.ones((1, len(truth))))[0])

    def _answers(self, x: Floats) -> Floats:
        """(images, classes) probabilities."""
        with threadpool_limits(1):
            found: Floats = self._model.predict_proba(x)
        return found


def learn_probe(
    x: Features, y: Words, patients: Patients, classes: list[str], *, seed: int, strength: float | None = None
) -> Probe:
    """A linear probe from the images, (images, dim) and (images,), that are of one of `classes`; each must occur.

    `strength` is the inverse penalty, where it is not to be chosen here.

    Raises:
        NotMeasurable: features that are not finite.
    """
    found, truth, clusters = _chosen(classes, x, y, patients)
    with threadpool_limits(1):  # such small products gain nothing from more threads, which would change their last bits
        strength = strength or _choose_strength(found, truth, clusters, seed)
        model = _logistic(strength).fit(found, truth)
    return Probe(classes, len(truth), strength, model)


def knn_probe(
    train_x: Features, train_y: Words, test_x: Features, test_y: Words, test_patients: Patients, *, neighbours: int
) -> Scores:
    """Votes of the nearest training images by cosine, each worth exp(similarity / 0.07) (Wu et al. 2018, 1805.01978).

    Raises:
        NotMeasurable: too few classes, or features that are not finite.
    """
    classes = measurable_classes(train_y, test_y, test_patients)
    x, y, _ = _chosen(classes, train_x, train_y, np.zeros(len(train_y), np.int64))
    queries, truth, clusters = _chosen(classes, test_x, test_y, test_patients)
    votes = _votes(_unit(x), np.eye(len(classes))[y], _unit(queries), min(neighbours, len(y)))
    return score(votes, truth, clusters, seed=0, n_train=len(y), classes=classes)


def _chosen(classes: list[str], x: Features, y: Words, patients: Patients) -> tuple[Floats, NDArray[np.intp], Patients]:
    """Features, class indices and patients of the images that are of one of `classes`."""
    keep = np.isin(y, classes)
    features = np.asarray(x[keep], np.float64)
    if not np.isfinite(features).all():
        raise NotMeasurable("the encoder's features are not finite")
    return features, np.searchsorted(classes, y[keep]), patients[keep]


def _logistic(strength: float) -> Any:
    """An unfitted scikit-learn pipeline, imported here: a round without probes does not wait for it (1 s, 120 MB)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000))


def _choose_strength(x: Floats, y: NDArray[np.intp], patients: Patients, seed: int) -> float:
    """The C with the smallest log-loss on held-out patients, classes weighted equally; the stronger on a tie."""
    folds = _folds(y, patients, seed)
    if folds is None:
        return FALLBACK
    losses = [sum(_held_out_loss(x, y, folds == fold, c) for fold in range(FOLDS)) for c in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


def _folds(y: NDArray[np.intp], patients: Patients, seed: int) -> NDArray[np.intp] | None:
    """(images,) fold of every image: patients are shuffled, then dealt class by class; None if a class has too few.

    A patient with images of several classes is dealt with the class of the first.
    """
    _, first, numbers = np.unique(patients, return_index=True, return_inverse=True)
    own = y[first]
    if np.bincount(own, minlength=int(y.max()) + 1).min() < FOLDS:
        return None
    shuffled = np.random.default_rng(seed).permutation(len(own))
    dealt = shuffled[np.argsort(own[shuffled], kind="stable")]
    fold = np.empty(len(own), np.intp)
    fold[dealt] = np.arange(len(own)) % FOLDS
    return fold[numbers]


def _held_out_loss(x: Floats, y: NDArray[np.intp], held_out: NDArray[np.bool_], strength: float) -> float:
    model = _logistic(strength).fit(x[~held_out], y[~held_out])
    probability = model.predict_proba(x[held_out])[np.arange(held_out.sum()), y[held_out]]
    likelihood = np.log(np.maximum(probability, np.finfo(np.float64).tiny))  # a certainty may be rounded to 0
    present = np.unique(y[held_out])
    return -float(np.mean([likelihood[y[held_out] == k].mean() for k in present]))


def _unit(x: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros stays."""
    unit: Floats = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


def _votes(x: Floats, classes: Floats, queries: Floats, neighbours: int) -> Floats:
    """(queries, classes) shares of the votes; `classes` is one-hot (images, classes)."""
    shares = [np.empty((0, classes.shape[1]))]
    for start in range(0, len(queries), QUERIES):
        similarity = queries[start : start + QUERIES] @ x.T  # (queries, images)
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / TEMPERATURE)
        votes = np.einsum("qn,qnc->qc", weights, classes[nearest])
        shares.append(votes / votes.sum(axis=1, keepdims=True))
    return np.concatenate(shares)
