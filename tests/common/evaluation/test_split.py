"""Splits by patient, over cohorts made of arrays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError
from polyclinic.evaluation import labelled_patients, split_patients
from polyclinic.stages import Finetune
from polyclinic.study import Evaluation


def cohort(patients: ArrayLike, labels: ArrayLike = "", splits: ArrayLike = "") -> Cohort:
    """A cohort of 1 x 16 x 16 images whose first pixel is their number."""
    patients = np.asarray(patients, np.int32)
    n = len(patients)
    images = np.zeros((n, 1, 16, 16), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    words = [np.broadcast_to(np.asarray(w, np.str_), n) for w in (labels, "", "", splits)]
    return Cohort(Path("here"), images, np.arange(n), patients, *words)


def numbers(part: Cohort) -> list[int]:
    return part.pixels(slice(None))[:, 0, 0, 0].tolist()


@given(
    images=st.lists(st.integers(1, 4), min_size=2, max_size=40),
    classes=st.integers(1, 6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_split_by_patient(images: list[int], classes: int, fraction: float, seed: int) -> None:
    """Nobody on both sides, nobody lost, both sides inhabited, every class of two patients on both sides."""
    generator = np.random.default_rng(seed)
    class_of = generator.integers(0, classes, len(images)).astype(str)
    patients = np.repeat(np.arange(len(images)), images)
    whole = cohort(patients, class_of[patients])
    settings = Evaluation(test_fraction=fraction)
    train, test = split_patients(whole, settings, seed)
    assert sorted(numbers(train) + numbers(test)) == list(range(len(whole)))
    assert not set(patients[numbers(train)]) & set(patients[numbers(test)])
    assert train.n_patients + test.n_patients == len(images) and min(train.n_patients, test.n_patients) >= 1
    for name, count in zip(*np.unique(class_of, return_counts=True), strict=True):
        if count >= 2:
            assert name in train.labels and name in test.labels
    assert [numbers(part) for part in split_patients(whole, settings, seed)] == [numbers(train), numbers(test)]


def test_fraction_is_kept_within_each_class() -> None:
    whole = cohort(np.arange(1000), ["a"] * 900 + ["b"] * 100)
    train, test = split_patients(whole, Evaluation(test_fraction=0.3), 0)
    assert (test.labels == "a").sum() == 270 and (test.labels == "b").sum() == 30 and len(train) == 700
    assert numbers(split_patients(whole, Evaluation(test_fraction=0.3), 1)[1]) != numbers(test)


def test_words_of_one_class_are_one_stratum() -> None:
    settings = Evaluation(labels={"ill": ["PNEUMONIA", "tb"], "ignore": ["todo"]}, test_fraction=0.5)
    whole = cohort([0, 1, 2, 3, 4, 5], ["PNEUMONIA", "nodule|tb", "todo", "", "todo", ""])
    _, test = split_patients(whole, settings, 0)
    assert sum(label in ("PNEUMONIA", "nodule|tb") for label in test.labels) == 1


def test_a_patient_with_two_labels_goes_by_the_first() -> None:
    """Were patient 0 of class b, b would have two patients and so one on either side, always."""
    whole = cohort([0, 0, 0, 1, 2, 3], ["", "a", "b", "b", "a", "a"])
    splits = [split_patients(whole, Evaluation(test_fraction=0.3), seed) for seed in range(20)]
    assert all({"a"} <= set(train.labels) and {"a"} <= set(test.labels) for train, test in splits)
    assert {len(test) for _, test in splits} == {1, 3}


def test_split_column() -> None:
    whole = cohort([0, 0, 1, 2, 3], splits=["train", "test", "val", "", "test"])
    train, test = split_patients(whole, Evaluation(split="column"), 0)
    assert numbers(test) == [0, 1, 4] and numbers(train) == [2, 3]


@pytest.mark.parametrize("split", ["patient", "column"])
def test_one_patient_cannot_be_split(split: str) -> None:
    with pytest.raises(CohortError, match="1 patient leaves nobody"):
        split_patients(cohort([0, 0], splits="test"), Evaluation(split=split), 0)  # type: ignore[arg-type]


def test_a_split_column_without_test_patients_says_so() -> None:
    with pytest.raises(CohortError, match=r"split column .* nobody to test on"):
        split_patients(cohort([0, 1], splits="train"), Evaluation(split="column"), 0)


def random_images(n: int, labels: list[str]) -> Cohort:
    whole = cohort(np.arange(n), labels)
    return replace(whole, images=np.random.default_rng(0).integers(0, 256, (n, 1, 16, 16), np.uint8))


@pytest.mark.parametrize("gone", [0, 17, 59])
def test_drawn_alone_a_patient_changes_nothing_for_the_others(gone: int) -> None:
    """As a promise of privacy needs it: of two cohorts that differ by one patient, so do the halves."""
    whole = random_images(60, ["a", "b", "b"] * 20)
    fewer = whole.select(np.delete(np.arange(60), gone))
    settings, stage = Evaluation(test_fraction=0.4), Finetune(rounds=2, kind="finetune", method="supervised")
    stage = stage.model_copy(update={"label_fraction": 0.5})
    for draw in (
        lambda c: split_patients(c, settings, 7, independent=True),
        lambda c: (labelled_patients(c, settings, stage, 7, independent=True)[0],),
    ):
        for one, other in zip(draw(whole), draw(fewer), strict=True):
            assert set(one.rows) - {gone} == set(other.rows)
    by_class = [set(split_patients(c, settings, 7)[1].rows) - {gone} for c in (whole, fewer)]
    assert by_class[0] != by_class[1]  # drawn class by class, the others are affected


def test_drawn_alone_the_fractions_are_kept_and_the_smaller_is_part_of_the_larger() -> None:
    whole = random_images(2000, ["a", "b"] * 1000)
    train, test = split_patients(whole, Evaluation(test_fraction=0.3), 3, independent=True)
    assert abs(test.n_patients - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert train.n_patients + test.n_patients == 2000
    assert set(split_patients(whole, Evaluation(test_fraction=0.3), 4, independent=True)[1].rows) != set(test.rows)
    stages = [Finetune(rounds=2, kind="finetune", method="supervised", label_fraction=f) for f in (0.1, 0.5, 1.0)]
    few, half, every = (labelled_patients(whole, Evaluation(), s, 3, independent=True)[0] for s in stages)
    assert set(few.rows) < set(half.rows) < set(every.rows)
    assert len(every) == 2000
