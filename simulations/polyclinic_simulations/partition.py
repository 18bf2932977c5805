"""One cohort dealt to several sites, always by patient: every patient goes to exactly one site."""

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.seeding import numpy_generator
from polyclinic.study import Dirichlet, Iid

MIN_PATIENTS = 2
"""A site with one patient could neither train nor hold one out."""


def partition(cohort: Cohort, sites: int, how: Iid | Dirichlet, seed: int) -> list[NDArray[np.int64]]:
    """Patient numbers of each site, ascending.

    Raises:
        Refused: there are too few patients for the sites.
    """
    if cohort.n_patients < sites * MIN_PATIENTS:
        raise Refused(
            f"{cohort.n_patients} patients cannot be dealt to {sites} sites of at least {MIN_PATIENTS}",
            "ask for fewer sites, or give a larger cohort",
        )
    rng = numpy_generator(seed)
    return _iid(cohort, sites, rng) if isinstance(how, Iid) else _dirichlet(cohort, sites, how.alpha, rng)


def _iid(cohort: Cohort, sites: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    return [np.sort(part) for part in np.array_split(rng.permutation(cohort.n_patients), sites)]


def _dirichlet(cohort: Cohort, sites: int, alpha: float, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Each class cut in proportions ~ Dirichlet(alpha) [Hsu et al., 1909.06335]; too small sites take of others."""
    first = np.searchsorted(cohort.patients, np.arange(cohort.n_patients))
    labels = cohort.labels[first]  # (patients,) the label of each patient's first image
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(sites, alpha)))[:-1] * len(members)).astype(int)
        for site, part in enumerate(np.split(members, cuts)):
            parts[site].extend(part.tolist())
    while len(smallest := min(parts, key=len)) < MIN_PATIENTS:
        largest = max(parts, key=len)
        smallest.append(largest.pop())
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
