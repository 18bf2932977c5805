"""The methods a stage may name. A new one is a file, its settings in stages.py and one line in METHODS.

A file is imported when its method is first made, as those of encoders are.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from polyclinic.errors import StudyError
from polyclinic.methods.base import Method
from polyclinic.stages import AnyStage

METHODS: dict[str, Callable[[Any, int], Method]] = {
    "simclr": lambda stage, classes: import_module("polyclinic.methods.simclr").SimCLR(stage),
    "micle": lambda stage, classes: import_module("polyclinic.methods.micle").MICLe(stage),
    "mlvicx": lambda stage, classes: import_module("polyclinic.methods.mlvicx").MLVICX(stage),
    "mae": lambda stage, classes: import_module("polyclinic.methods.mae").MAE(stage),
    "sssd": lambda stage, classes: import_module("polyclinic.methods.sssd").SSSD(stage),
    "supervised": lambda stage, classes: import_module("polyclinic.methods.supervised").Supervised(stage, classes),
}
"""Name of a method -> from its stage's settings and the number of classes in the study to the method."""


def make_method(stage: AnyStage, classes: int = 0) -> Method:
    """The method that a stage trains with, in a study of so many classes.

    Raises:
        StudyError: no method has that name.
    """
    if stage.method not in METHODS:
        raise StudyError(f"no method is called {stage.method!r}", f"use one of {', '.join(METHODS)}")
    return METHODS[stage.method](stage, classes)
