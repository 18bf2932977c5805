"""The examples in the docstrings hold."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["admission", "attributes", "card", "cohort", "columns", "pixels", "scan", "show"])
def test_examples(name: str) -> None:
    outcome = doctest.testmod(import_module(f"polyclinic.cohort.{name}"))
    assert outcome.attempted and not outcome.failed
