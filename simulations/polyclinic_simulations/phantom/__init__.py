"""Synthetic chest-radiograph patients, written as the DICOM archives of hospitals.

Names load when they are first used: the command line imports this package each time it starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyclinic_simulations.phantom.headers import identifiers as identifiers
    from polyclinic_simulations.phantom.write import keep_site as keep_site
    from polyclinic_simulations.phantom.write import write_consortium as write_consortium
    from polyclinic_simulations.phantom.write import write_site as write_site

_HOME = {"identifiers": "headers", "keep_site": "write", "write_consortium": "write", "write_site": "write"}

__all__ = ["identifiers", "keep_site", "write_consortium", "write_site"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
