"""Synthetic chest-radiograph patients, written as the DICOM archives of hospitals."""

from polyclinic_simulations.phantom.headers import identifiers
from polyclinic_simulations.phantom.write import write_consortium, write_site

__all__ = ["identifiers", "write_consortium", "write_site"]
