"""One cohort dealt to several sites, always by patient: every patient goes to exactly one site.

The class of a patient is the label of its first image.

The partitioners of flwr-datasets are not used: they deal the rows of a Hugging Face dataset, images rather than
patients, count their least sizes in rows, and would bring that library along for a few draws.
"""

import re
from itertools import chain, count, pairwise

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.errors import Refused
from polyclinic.seeding import numpy_generator
from polyclinic.simulation import Classes, Column, Dirichlet, Iid, Quantity

MIN_PATIENTS = 2
"""A site with one patient could neither train nor hold one out."""
COLUMNS = {"site": "sites", "view": "views", "scanner": "scanners", "sex": "sexes"}
"""Of a cohort's table, each with the attribute of `Cohort` that holds its words. `age` holds numbers."""
UNKNOWN = "unknown"
"""The site of patients without a value."""
LONGEST = 48
"""Characters of a site's name that come from a value."""


def partition(
    cohort: Cohort, sites: int, how: Iid | Dirichlet | Quantity | Classes, seed: int
) -> list[NDArray[np.int64]]:
    """Patient numbers of each site, ascending.

    Raises:
        Refused: there are too few patients for the sites, or too few or too many classes.
    """
    if cohort.n_patients < sites * MIN_PATIENTS:
        raise Refused(
            f"{cohort.n_patients} patients cannot be dealt to {sites} sites of at least {MIN_PATIENTS}",
            "ask for fewer sites, or give a larger cohort",
        )
    rng = numpy_generator(seed)
    match how:
        case Iid():
            parts = np.array_split(rng.permutation(cohort.n_patients), sites)
        case Dirichlet():
            parts = _dirichlet(cohort, sites, how.alpha, rng)
        case Quantity():
            shares = rng.dirichlet(np.full(sites, how.alpha))
            parts = _filled(_cut(rng.permutation(cohort.n_patients), shares))
        case Classes():
            parts = _classes(cohort, sites, how.per_site, rng)
    return [np.sort(part) for part in parts]


def by_column(cohort: Cohort, how: Column) -> dict[str, NDArray[np.int64]]:
    """Patient numbers, ascending, of a site for each value of a column, called by it; of ages, for each group of years.

    Patients go where most of their images are, on a tie to the first of those in order.

    Raises:
        Refused: no image has a value there, or a value has too few patients.
    """
    known = {name: getattr(cohort, attribute) != "" for name, attribute in COLUMNS.items()}
    known["age"] = ~np.isnan(cohort.ages)
    if not known.get(how.by, np.False_).any():
        filled = [name for name, there in known.items() if there.any()]
        raise Refused(
            f"no image has a value in the column {how.by!r}",
            f"set partition.by to {' or '.join(map(repr, filled))}" if filled else "use another partition",
        )
    if how.by == "age":
        words, codes = age_groups(cohort.ages, how.edges)
    else:
        words, codes = np.unique(getattr(cohort, COLUMNS[how.by]), return_inverse=True)
    chosen = _of_most_images(cohort, codes, words == "")
    parts = {str(words[code]): np.flatnonzero(chosen == code) for code in np.unique(chosen)}
    if small := [word for word, part in parts.items() if len(part) < MIN_PATIENTS]:
        raise Refused(
            f"the column {how.by!r} gives {len(small)} sites fewer than {MIN_PATIENTS} patients: {_listed(small)}",
            "move the edges, or leave these patients out"
            if how.by == "age"
            else "join these values to others in the cohort's table, or leave their patients out",
        )
    return dict(zip(_names(list(parts)), parts.values(), strict=True))


def age_groups(ages: NDArray[np.float64], edges: list[int]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """(groups,) names, "" for the unknown first, then from the youngest on; and (images,) which of them each age is in.

    >>> words, codes = age_groups(np.array([39.9, 40.0, np.nan, 90.0]), [40, 60])
    >>> words.tolist(), codes.tolist()
    (['', 'under-40', '40-59', '60-and-over'], [1, 2, 0, 3])
    """
    between = [f"{low}-{high - 1}" if high - low > 1 else str(low) for low, high in pairwise(edges)]
    words = np.array(["", f"under-{edges[0]}", *between, f"{edges[-1]}-and-over"])
    return words, np.where(np.isnan(ages), 0, 1 + np.searchsorted(edges, ages, side="right"))


def _of_most_images(cohort: Cohort, codes: NDArray[np.int64], none: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(patients,) the code that most of a patient's images have; any other outweighs the one that `none` marks."""
    counts = np.zeros((cohort.n_patients, len(none)))
    np.add.at(counts, (cohort.patients, codes), 1.0)
    counts[:, none] /= len(cohort) + 1
    chosen: NDArray[np.int64] = counts.argmax(axis=1)
    return chosen


def class_of_patients(cohort: Cohort) -> NDArray[np.str_]:
    """(patients,) the label of each patient's first image."""
    return cohort.labels[np.searchsorted(cohort.patients, np.arange(cohort.n_patients))]


def _cut(members: NDArray[np.int64], shares: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """`members` in as many runs as there are shares, which sum to 1; rounded down to whole members."""
    return np.split(members, (np.cumsum(shares)[:-1] * len(members)).astype(int))


def _filled(parts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The parts, those that are too small with patients of the largest."""
    lists = [part.tolist() for part in parts]
    while len(smallest := min(lists, key=len)) < MIN_PATIENTS:
        smallest.append(max(lists, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in lists]


def _dirichlet(cohort: Cohort, sites: int, alpha: float, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Each class cut in proportions ~ Dirichlet(alpha) [Hsu et al., 1909.06335]; too small sites take of others."""
    labels = class_of_patients(cohort)
    dealt: list[list[NDArray[np.int64]]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for site, part in enumerate(_cut(members, rng.dirichlet(np.full(sites, alpha)))):
            dealt[site].append(part)
    return _filled([np.concatenate(parts) for parts in dealt])


def _classes(cohort: Cohort, sites: int, per_site: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Shards of one class each, `per_site` of different classes to a site [after McMahan et al., 1602.05629].

    A class has as many shards as any other, or one less, all of nearly the same size; so a site of a rare class is
    small, and a class with fewer patients than shards is missing at some of its sites.
    """
    labels = class_of_patients(cohort)
    names = np.unique(labels)
    if per_site > len(names):
        raise Refused(
            f"{per_site} classes a site are asked for and the patients have {len(names)}: {_listed(names)}",
            f"set partition.per_site to at most {len(names)}",
        )
    if sites * per_site < len(names):
        raise Refused(
            f"{sites} sites of {per_site} classes leave patients of some of the {len(names)} classes to nobody",
            f"set partition.per_site to at least {-(-len(names) // sites)}, or ask for more sites",
        )
    shards = np.zeros((sites, len(names)), bool)
    for site in range(sites):
        rarest = np.lexsort((rng.random(len(names)), shards.sum(axis=0)))  # ties in random order
        shards[site, rarest[:per_site]] = True
    dealt: list[list[NDArray[np.int64]]] = [[] for _ in range(sites)]
    for number, label in enumerate(names):
        holders = rng.permutation(np.flatnonzero(shards[:, number]))
        members = rng.permutation(np.flatnonzero(labels == label))
        for site, part in zip(holders, np.array_split(members, len(holders)), strict=True):
            dealt[site].append(part)
    parts = [np.concatenate(shards) for shards in dealt]
    if (smallest := min(map(len, parts))) < MIN_PATIENTS:
        raise Refused(
            f"a site would have {smallest} patients, as its classes are rare; it needs {MIN_PATIENTS}",
            "ask for fewer sites or more classes a site, or give a larger cohort",
        )
    return parts


def _names(values: list[str]) -> list[str]:
    """A name for each value that is fit for a site: what is not goes, and what is then alike is numbered.

    >>> _names(["", "AP", "AP erect", "AP/erect", "St. Mary's"])
    ['unknown', 'AP', 'AP-erect', 'AP-erect-2', 'St.-Mary-s']
    """
    names: list[str] = []
    for value in values:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:LONGEST] or UNKNOWN
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(next(free for free in chain([name], numbered) if free not in names))
    return names


def _listed(words: list[str] | NDArray[np.str_], most: int = 8) -> str:
    """Some words, in quotes."""
    return ", ".join(repr(str(word)) for word in words[:most]) + (", ..." if len(words) > most else "")
