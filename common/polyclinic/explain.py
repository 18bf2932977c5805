"""Pydantic's errors in the words of the file that they are about: the key, the value, and what would do."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

MAX_PROBLEMS = 8
"""Problems named in one error; a hostile file may have thousands."""
MAX_SHOWN = 64
"""Characters of a key or value that an error repeats."""

FIXES = {
    "bool_type": "give true or false",
    "extra_forbidden": "{known}",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "give more than {gt}",
    "greater_than_equal": "give at least {ge}",
    "int_type": "give a whole number",
    "less_than": "give less than {lt}",
    "less_than_equal": "give at most {le}",
    "list_type": "give a list in [ ]",
    "literal_error": "give {expected}",
    "missing": "add it",
    "model_type": "give a table",
    "multiple_of": "give a multiple of {multiple_of}",
    "string_type": "give a text in quotes",
    "too_long": "give at most {max_length} items",
    "too_short": "give at least {min_length} items",
    "tuple_type": "give a list in [ ]",
    "union_tag_invalid": "give one of {expected_tags}",
    "union_tag_not_found": "add it",
}
"""What to do about each type of error, filled in from its context."""


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """(problem, fix) of what pydantic found against `model`."""
    found = [_one(dict(item), model) for item in error.errors()[:MAX_PROBLEMS]]
    if len(found) == 1:
        return found[0][1:]
    more = f"; and {error.error_count() - MAX_PROBLEMS} more" if error.error_count() > MAX_PROBLEMS else ""
    return "; ".join(problem for _, problem, _ in found) + more, "; ".join(f"{key}: {fix}" for key, _, fix in found)


def _one(item: dict[str, Any], model: type[BaseModel]) -> tuple[str, str, str]:
    """(key, problem, fix) of one error."""
    kind, context = item["type"], dict(item.get("ctx", {}))
    key, tables = _locate(item["loc"], model)
    if kind == "value_error":
        # Our validators raise "what is wrong: what to do", or only what to do about the one value.
        problem, _, fix = str(context["error"]).rpartition(": ")
        return key, problem or f"{key} is {_shown(item['input'])}", fix
    if kind == "extra_forbidden":
        context["known"] = _known(str(item["loc"][-1])[:MAX_SHOWN], [n for table in tables for n in table.model_fields])
        problem = f"unknown key {key!r}"
    elif kind.startswith("union_tag"):
        key += "." + context["discriminator"].strip("'")
        problem = f"{key} is " + (_shown(context["tag"]) if "tag" in context else "missing")
    else:
        problem = f"{key} is " + ("missing" if kind == "missing" else _shown(item["input"]))
    return key, problem, FIXES[kind].format(**context) if kind in FIXES else item["msg"]


def _known(key: str, known: Sequence[str]) -> str:
    """The known key that `key` may be meant for, or all of them where it is like none.

    >>> _known("sead", ["name", "seed"]), _known("foo", ["name", "seed"])
    ("the nearest known key is 'seed'", "the known keys are 'name', 'seed'")
    """
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"the nearest known key is {near[0]!r}"
    return "the known keys are " + ", ".join(map(repr, dict.fromkeys(known)))


def _shown(value: Any) -> str:
    text = "a table" if isinstance(value, dict) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _locate(loc: Sequence[str | int], model: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted key in the file, and the tables that may hold its last part; `loc` also names the tags of unions."""
    parts: list[str | int] = []
    tables = [model]
    for part in loc:
        fields = [table.model_fields[part] for table in tables if part in table.model_fields]
        tagged = [t for t in tables if any(part in get_args(field.annotation) for field in t.model_fields.values())]
        if fields:
            parts.append(part)
            tables = [table for field in fields for table in _tables(field.annotation)]
        elif len(tables) > 1 and tagged:
            tables = tagged
        else:
            parts.append(part)
    return ".".join(_key(part) for part in parts) or "the whole", tables


def _key(part: str | int) -> str:
    bare = isinstance(part, int) or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part)
    return str(part) if bare else _shown(part)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _tables(argument)]
