"""Which patients train and which test: drawn once for a study and a site, and the same in all its rounds."""

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError
from polyclinic.evaluation.labels import classes_of
from polyclinic.study import Evaluation


def split_patients(cohort: Cohort, evaluation: Evaluation, seed: int) -> tuple[Cohort, Cohort]:
    """(train, test): no patient is in both.

    With split = "patient" each class gives `test_fraction` of its patients, at least one to either side where it has
    two; a patient with several classes goes by the first. Patients without a class cannot be tested on, and train.
    Where no class has two patients, one patient is drawn from all. With split = "column", `test` in the cohort's split
    column tests and everything else trains: `train`, `val`, and rows without a word, which no published test set
    knows. A patient with one image in the test set is in it with all of them.

    Raises:
        CohortError: nobody is left to train on, or nobody to test on.
    """
    if evaluation.split == "column":
        test = np.unique(cohort.patients[cohort.splits == "test"])
    else:
        classes = _class_of_patients(cohort, evaluation.labels)
        test = _draw(classes, evaluation.test_fraction, np.random.default_rng(seed))
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


def _class_of_patients(cohort: Cohort, labels: dict[str, list[str]]) -> NDArray[np.str_]:
    """(patients,) the class of each patient's first image that has one; "" for the others."""
    classes = classes_of(cohort.labels, labels)
    found = np.full(cohort.n_patients, "", dtype=classes.dtype)
    known = np.flatnonzero(classes != "")[::-1]  # backwards: the first image writes last
    found[cohort.patients[known]] = classes[known]
    return found


def _draw(classes: NDArray[np.str_], fraction: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """The test patients: `fraction` of every class. Classes of one patient are drawn from together."""
    names, codes, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    codes = np.where(sizes[codes] == 1, len(names), codes)
    codes = np.where(classes == "", -1, codes)
    chosen = [np.array([], np.int64)]
    for code in np.unique(codes[codes >= 0]):
        patients = generator.permutation(np.flatnonzero(codes == code))
        count = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
        chosen.append(patients[:count])
    test = np.sort(np.concatenate(chosen))
    return test if len(test) or len(classes) < 2 else generator.permutation(len(classes))[:1]
