import numpy as np
import pytest

from polyclinic.evaluation import NotMeasurable, classes_of
from polyclinic.evaluation.labels import measurable_classes

SITES = np.array(["Pneumonia", "PNEUMONIA", "No_findings", "todo", "", "Effusion", "b|a", "a|b"])


def test_words_become_classes_and_the_unmapped_stay_themselves():
    mapping = {"positive": ["Pneumonia", "PNEUMONIA"], "negative": ["No_findings"], "ignore": ["todo"]}
    expected = ["positive", "positive", "negative", "", "", "Effusion", "a|b", "a|b"]
    assert classes_of(SITES, mapping).tolist() == expected


def test_without_a_mapping_the_words_are_the_classes():
    assert classes_of(SITES[:6], {}).tolist() == SITES[:6].tolist()
    assert classes_of(np.array([], dtype=np.str_), {}).shape == (0,)


def test_a_cell_of_several_labels_is_mapped_only_as_a_whole():
    mapping = {"first": ["a"], "both": ["b|a"]}
    assert classes_of(np.array(["a", "a|b", "a|c"]), mapping).tolist() == ["first", "both", "a|c"]


def test_a_long_class_name_is_not_cut():
    assert classes_of(np.array(["x", "y"]), {"a long class name": ["x"]}).tolist() == ["a long class name", "y"]


@pytest.mark.parametrize(
    ("train", "test", "patients", "reason"),
    [
        (["", ""], ["a", "b"], [0, 1], "no labelled training"),
        (["a", "b"], ["", ""], [0, 1], "no labelled test"),
        (["a", "a"], ["a", "a"], [0, 1], "one class, 'a'"),
        (["a", "a"], ["a", "a", "b", "b"], [0, 1, 2, 3], "'b' has no training patient"),
        (["a", "b"], ["a", "a", "b", "b"], [0, 1, 2, 2], "'b' has fewer than 2 test patients"),
        (["a", "b"], ["a", "a"], [0, 1], "'b' has fewer than 2 test patients"),
    ],
)
def test_what_cannot_be_measured_says_why(train, test, patients, reason):
    with pytest.raises(NotMeasurable, match=reason):
        measurable_classes(np.array(train), np.array(test), np.array(patients))


def test_a_class_too_rare_to_measure_does_not_stop_the_others():
    train, test = np.array(["a", "b", "rare"]), np.array(["a", "a", "b", "b", "rare", "new", "new"])
    assert measurable_classes(train, test, np.arange(7)) == ["a", "b"]
