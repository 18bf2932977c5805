"""The methods a stage may name. A new one is a file, its settings in stages.py and one line in METHODS.

A file is imported when its method is first made, as those of encoders are.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from polyclinic import study
from polyclinic.errors import StudyError
from polyclinic.methods.base import Method
from polyclinic.stages import Pretrain

METHODS: dict[str, Callable[[Any], Method]] = {
    "simclr": lambda stage: import_module("polyclinic.methods.simclr").SimCLR(stage),
    "micle": lambda stage: import_module("polyclinic.methods.micle").MICLe(stage),
    "mlvicx": lambda stage: import_module("polyclinic.methods.mlvicx").MLVICX(stage),
    "mae": lambda stage: import_module("polyclinic.methods.mae").MAE(stage),
    "sssd": lambda stage: import_module("polyclinic.methods.sssd").SSSD(stage),
}
"""Name of a method -> from its stage's settings to the method."""


def make_method(stage: Pretrain, images: study.Images) -> Method:
    """The method that a stage trains with.

    Raises:
        StudyError: no method has that name.
    """
    if stage.method not in METHODS:
        raise StudyError(f"no method is called {stage.method!r}", f"use one of {', '.join(METHODS)}")
    return METHODS[stage.method](stage)
