"""A column that is not read is named, with what it may be meant as: a misspelt `patient` puts one on both sides."""

import pytest

from polyclinic.cohort.columns import COLUMNS, meant_as, passed_over


@pytest.mark.parametrize(
    ("column", "known"),
    [
        ("Diagnosis", "label"),
        ("Finding Labels", "label"),
        ("Label", "label"),
        ("patient_id", "patient"),
        ("PatientID", "patient"),
        ("subject", "patient"),
        ("patients", "patient"),
        ("Image Index", "image"),
        ("hospital", "site"),
        ("View Position", "view"),
        ("Patient Age", "age"),
        ("gender", "sex"),
        ("Manufacturer's Model Name", "scanner"),
        ("device", "scanner"),
        ("dosage", ""),
        ("size", ""),
        ("source_file", ""),
        ("", ""),
    ],
)
def test_a_near_name_is_told(column: str, known: str) -> None:
    assert meant_as(column, list(COLUMNS)) == known


def test_all_columns_that_are_not_read_are_named() -> None:
    assert passed_over(["image", "Diagnosis", "patient_id"]) == (
        "columns of the CSV that are not read: 'Diagnosis' (if it is meant as `label`, name it so), "
        "'patient_id' (if it is meant as `patient`, name it so)"
    )


@pytest.mark.parametrize("columns", [["file", "label"], list(COLUMNS), ["", "image"]])
def test_what_is_read_and_what_has_no_name_is_not_told(columns: list[str]) -> None:
    assert passed_over(columns) == ""


def test_a_column_that_is_there_is_not_looked_for() -> None:
    assert passed_over(["file", "path", "label", "class"]) == "columns of the CSV that are not read: 'path', 'class'"
