"""What all parts of a study are made of."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

MAX_LISTED = 16
"""Known words that an error lists where none is near."""


class Settings(BaseModel):
    """A part of a study: frozen, checked, and closed to keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _is_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError("give 1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first")
    return value


Name = Annotated[str, AfterValidator(_is_name)]
"""Of a study or a site: fit for a file name."""


def nearest(word: object, known: Iterable[str]) -> str:
    """What to give in place of a word that is not known: the nearest, or some of them where it is like none."""
    words = list(known)
    if near := difflib.get_close_matches(str(word), words, n=1, cutoff=0.6):
        return f"the nearest is {near[0]!r}"
    return "give one of " + ", ".join(map(repr, words[:MAX_LISTED])) + (", ..." if len(words) > MAX_LISTED else "")
