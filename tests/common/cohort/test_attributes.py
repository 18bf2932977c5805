"""Sex and age as tables and headers write them, and what means nothing."""

import pytest

from polyclinic.cohort.attributes import TOP, Meaningless, parse_age, parse_sex


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("058Y", 58.0),
        ("58", 58.0),
        (" 58.0 ", 58.0),
        ("58 y", 58.0),
        ("0", 0.0),
        ("000D", 0.0),
        ("006M", 0.5),
        ("052W", 52 * 7 / 365.25),
        ("730D", 730 / 365.25),
        ("999D", 999 / 365.25),
        ("89", 89.0),
        ("90", TOP),
        ("104Y", TOP),
        ("122", TOP),
        ("90+", TOP),
        (">89", TOP),
        ("", None),
        ("NaN", None),
        ("unknown", None),
    ],
)
def test_ages_are_years_and_none_is_above_ninety(text: str, years: float | None) -> None:
    assert parse_age(text) == pytest.approx(years)


@pytest.mark.parametrize(
    "text", ["50+", "mid 50s", "414Y", "123", "-3", "58 years old", "Y", "1e2", "0x10", "\u0665\u0668", "1964-08-12"]
)
def test_what_is_no_age_means_nothing(text: str) -> None:
    with pytest.raises(Meaningless):
        parse_age(text)


@pytest.mark.parametrize(
    ("text", "sex"),
    [("F", "F"), ("female", "F"), (" Male", "M"), ("m", "M"), ("Other", "O"), ("", ""), ("U", ""), ("unknown", "")],
)
def test_sexes_are_terms_of_dicom(text: str, sex: str) -> None:
    assert parse_sex(text) == sex


@pytest.mark.parametrize("text", ["58", "Erika", "FM"])
def test_what_is_no_sex_means_nothing(text: str) -> None:
    with pytest.raises(Meaningless):
        parse_sex(text)
