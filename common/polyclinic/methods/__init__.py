"""The methods a stage may name. A new one is a file, its settings in stages.py and one line in METHODS."""

from collections.abc import Callable
from typing import Any

from polyclinic import study
from polyclinic.errors import StudyError
from polyclinic.methods.base import Method
from polyclinic.methods.mae import MAE
from polyclinic.methods.simclr import SimCLR
from polyclinic.stages import Pretrain

METHODS: dict[str, Callable[[Any], Method]] = {"simclr": SimCLR, "mae": MAE}
"""Name of a method -> from its stage's settings to the method."""


def make_method(stage: Pretrain, images: study.Images) -> Method:
    """The method that a stage trains with.

    Raises:
        StudyError: no method has that name.
    """
    name = getattr(stage, "method", "")
    if name not in METHODS:
        raise StudyError(f"no method is called {name!r}", f"use one of {', '.join(METHODS)}")
    return METHODS[name](stage)
