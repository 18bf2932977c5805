"""Which patients train and which test: drawn once for a study and a site, and the same in all its rounds."""

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError
from polyclinic.evaluation.labels import classes_of, targets_of
from polyclinic.stages import Finetune
from polyclinic.study import Evaluation


def split_patients(
    cohort: Cohort, evaluation: Evaluation, seed: int, independent: bool = False
) -> tuple[Cohort, Cohort]:
    """(train, test): no patient is in both.

    With split = "patient" each class gives `test_fraction` of its patients, at least one to either side where it has
    two; a patient with several classes goes by the first. Patients without a class cannot be tested on, and train.
    Where no class has two patients, one patient is drawn from all. With split = "column", `test` in the cohort's split
    column tests and everything else trains: `train`, `val`, and rows without a word, which no published test set
    knows. A patient with one image in the test set is in it with all of them. With `independent` each patient is drawn
    alone, without a look at the others: adding one changes nothing for them, as a promise of privacy needs it. Of a
    few, nobody may then be left to test on.

    Raises:
        CohortError: nobody is left to train on, or nobody to test on.
    """
    if evaluation.split == "column":
        test = np.unique(cohort.patients[cohort.splits == "test"])
    elif independent:
        test = np.flatnonzero(_own_draw(cohort, seed) < evaluation.test_fraction)
    else:
        classes = _class_of_patients(cohort, evaluation.labels)
        test = _draw(classes, evaluation.test_fraction, np.random.default_rng(seed))
    train = np.setdiff1d(np.arange(cohort.n_patients), test)
    if not len(train) or (not len(test) and not independent):  # who measures nothing needs nobody to test on
        raise _one_sided(cohort, evaluation.split, "train on" if not len(train) else "test on")
    return cohort.select(train), cohort.select(test)


def labelled_patients(
    cohort: Cohort, evaluation: Evaluation, stage: Finetune, seed: int, independent: bool = False
) -> tuple[Cohort, Cohort | None]:
    """(train, validation) of a finetune stage, out of a site's training patients; validation only with patience.

    Patients with a label, class by class: first those for validation (the split column's `val` where there are any),
    then of the others `label_fraction`, at least one. A smaller fraction's patients are all among a larger one's. A
    patient of several classes goes by the rarest. With `independent` each is drawn alone, as in `split_patients`.

    Raises:
        CohortError: nobody has a label.
    """
    group = _rarest_class(cohort, targets_of(cohort.labels, evaluation.labels, stage.multi_label))
    generator = np.random.default_rng(seed)
    kept = np.zeros(cohort.n_patients, bool)
    if evaluation.split == "column" and stage.patience:
        kept[np.unique(cohort.patients[cohort.splits == "val"])] = True
    draw = stage.patience > 0 and not kept.any()
    train = np.zeros(cohort.n_patients, bool)
    if independent:
        train = (group >= 0) & (_own_draw(cohort, seed) < stage.label_fraction)
    for code in np.unique(group[group >= 0]) if not independent else ():
        patients = generator.permutation(np.flatnonzero((group == code) & ~kept))
        if draw:
            count = min(max(round(stage.validation_fraction * len(patients)), 1), len(patients) - 1)
            kept[patients[:count]], patients = True, patients[count:]
        train[patients[: max(round(stage.label_fraction * len(patients)), 1)]] = True
    if not train.any():
        raise CohortError(
            "no training patient has a label of a class in [evaluation] labels, or none of them was drawn",
            "add the site's words to the study's labels, or leave the site out of it",
        )
    validation = cohort.select(np.flatnonzero(kept & (group >= 0))) if (kept & (group >= 0)).any() else None
    return cohort.select(np.flatnonzero(train)), validation


def _own_draw(cohort: Cohort, seed: int) -> NDArray[np.float64]:
    """(patients,) a number from 0 to below 1 of each patient, from the seed and that patient's first image alone."""
    return np.array([int(found[:12], 16) for found in cohort.fingerprints(seed.to_bytes(16))]) / 2.0**48


def _rarest_class(cohort: Cohort, targets: NDArray[np.float32]) -> NDArray[np.int64]:
    """(patients,) the class of each patient that fewest patients have; one past the last of none, -1 unlabelled."""
    has = np.zeros((cohort.n_patients, targets.shape[1] + 1), bool)
    known = ~np.isnan(targets).any(axis=1)
    np.logical_or.at(has, cohort.patients[known], np.pad(targets[known] > 0, ((0, 0), (0, 1))))
    labelled = np.zeros(cohort.n_patients, bool)
    labelled[cohort.patients[known]] = True
    has[labelled & ~has.any(axis=1), -1] = True
    return np.where(labelled, np.where(has, has.sum(axis=0), len(has) + 1).argmin(axis=1), -1)


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
