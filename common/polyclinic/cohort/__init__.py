"""Image files to patients to tensors: scan -> read in workers -> store -> index -> Cohort.

The processes that read files import this package, so nothing here imports torch at module level.
"""

from polyclinic.cohort.build import build_cohort
from polyclinic.cohort.cohort import Cohort, union
from polyclinic.cohort.index import open_cohort

__all__ = ["Cohort", "build_cohort", "open_cohort", "union"]
