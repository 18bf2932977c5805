"""Which patients train and which test, and the order of images in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort.cohort import Cohort
from polyclinic.errors import CohortError

if TYPE_CHECKING:
    from polyclinic.study import Evaluation


def split_patients(cohort: Cohort, evaluation: Evaluation, seed: int) -> tuple[Cohort, Cohort]:
    """(train, test): no patient is in both.

    With split = "patient" each class gives `test_fraction` of its patients, at least one to either side where it has
    two; a patient with several classes goes by the first. With split = "column", `test` in the cohort's split column
    tests and everything else trains: `train`, `val`, and rows without a word, which no published test set knows. A
    patient with one image in the test set is in it with all of them.

    Raises:
        CohortError: nobody is left to train on, or nobody to test on.
    """
    if evaluation.split == "column":
        test = np.unique(cohort.patients[cohort.splits == "test"])
    else:
        test = _draw(_strata(cohort, evaluation.labels), evaluation.test_fraction, np.random.default_rng(seed))
    train = np.setdiff1d(np.arange(cohort.n_patients), test)
    if not len(train) or not len(test):
        raise _one_sided(cohort, evaluation.split, "train on" if not len(train) else "test on")
    return cohort.select(train), cohort.select(test)


def _one_sided(cohort: Cohort, split: str, lacking: str) -> CohortError:
    patients = f"{cohort.n_patients} patient" + "s" * (cohort.n_patients != 1)
    if split == "column":
        return CohortError(
            f"the split column of a cohort of {patients} leaves nobody to {lacking}",
            'write `train` and `test` in the column `split`, or set evaluation.split = "patient"',
        )
    return CohortError(f"a cohort of {patients} leaves nobody to {lacking}", "give the site two patients or more")


def _strata(cohort: Cohort, labels: Mapping[str, list[str]]) -> NDArray[np.str_]:
    """(patients,) the class of each patient's first image that has one; "" for the others.

    A word belongs to the class that `labels` puts it under, or is its own class where `labels` is empty.
    """
    class_of = {word: name for name, words in labels.items() if name != "ignore" for word in words}

    def classify(cell: str) -> str:
        words = [cell, *cell.split("|")]
        return next((class_of[w] for w in words if w in class_of), "") if labels else words[1]

    unique, codes = np.unique(cohort.labels, return_inverse=True)
    classes = np.array([classify(str(cell)) for cell in unique], dtype=np.str_)[codes]
    strata = np.full(cohort.n_patients, "", dtype=classes.dtype)
    known = np.flatnonzero(classes != "")[::-1]  # backwards: the first image writes last
    strata[cohort.patients[known]] = classes[known]
    return strata


def _draw(strata: NDArray[np.str_], fraction: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """The test patients: `fraction` of every stratum. Strata of one patient are drawn from together."""
    names, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    codes = np.where(sizes[codes] == 1, len(names), codes)
    chosen = []
    for code in np.unique(codes):
        patients = generator.permutation(np.flatnonzero(codes == code))
        count = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
        chosen.append(patients[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.array([], np.int64)


def epoch(cohort: Cohort, batch_size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Image numbers of one epoch, (batch_size,) at a time and the rest last: every image once, in a new order."""
    order = generator.permutation(len(cohort))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
