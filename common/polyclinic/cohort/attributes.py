"""Sex and age of patients, from the words that labels.csv and DICOM headers have for them. Neither leaves the site."""

import re

SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
"""By their words, as terms of Patient's Sex (0010,0040), PS3.3 C.7.1.1."""
UNKNOWN = frozenset({"", "unknown", "u", "n/a", "na", "nan", "none", "null", "-", "?"})
"""How tables say, in small letters, that nobody knows."""
YEARS = {"d": 1 / 365.25, "w": 7 / 365.25, "m": 1 / 12, "y": 1.0, "": 1.0}
"""Of the units of an age string (AS, PS3.5 6.2); a bare number is in years."""
OLDEST = 122.5
"""Years that anybody has lived; more is a slip, such as the 414 of a public archive."""
TOP = 90.0
"""Years that stand for every age above 89: the Safe Harbor rule of de-identification, 45 CFR 164.514(b)(2)(i)(C)."""

_AGE = re.compile(r"(\d{1,3}(?:\.\d{0,9})?) ?([dwmy]?)", re.ASCII)


class Meaningless(ValueError):
    """A value that says neither an attribute nor that it is unknown."""


def parse_sex(text: str) -> str:
    """F, M or O; "" where it is unknown.

    >>> [parse_sex(text) for text in ("F", " male", "unknown")]
    ['F', 'M', '']

    Raises:
        Meaningless: it is no word for a sex.
    """
    word = text.strip().lower()
    if word in UNKNOWN:
        return ""
    if word not in SEXES:
        raise Meaningless
    return SEXES[word]


def parse_age(text: str) -> float | None:
    """Years, TOP for all above 89; None where it is unknown.

    >>> [parse_age(text) for text in ("058Y", "58.0", "018M", "93", "90+", "")]
    [58.0, 58.0, 1.5, 90.0, 90.0, None]

    Raises:
        Meaningless: it is no age, is one that nobody reaches, or is a range as in 50+.
    """
    word = text.strip().lower()
    if word in UNKNOWN:
        return None
    if word in ("90+", "89+", ">89"):  # as tables write that the rule has been kept
        return TOP
    if not (found := _AGE.fullmatch(word)) or (years := float(found[1]) * YEARS[found[2]]) > OLDEST:
        raise Meaningless
    return TOP if years >= TOP else years
