"""What a simulation would train on: sites by classes, views, sexes and ages, before any of it runs."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from polyclinic.cohort import Cohort
from polyclinic.evaluation import classes_of
from polyclinic.faults import AnyFault
from polyclinic.report import words
from polyclinic.stages import UNPAIRED
from polyclinic.study import Study
from polyclinic_client.site import Site
from polyclinic_simulations.consortium import Progress, gather, require

BROADEST = 40
"""Characters of the names of classes that have columns of their own; broader ones stand in one."""
LISTED = 8
"""Classes with a column of their own, and views named."""


def preview(study: Study, data: Path, state: Path, progress: Progress) -> dict[str, Any]:
    """The `sites` of a study by name, its `clock`, and by which `partition` (None of sites by name) and `seed`.

    Of a site: `patients`, `images`; `classes`, `views` and `sexes` (patients of each, "" without one); `ages` (their
    quartiles, years; [] where unknown); `shift`, `fault`, `held_out`, `warnings`. Patients with images of several
    classes or views count in each. Builds the cohorts in `state` and writes nothing else.

    Raises:
        Refused: the simulation would be.
    """
    members = gather(study, data, state, progress)
    require(members, study)
    return {
        "study": study.name,
        "seed": study.seed,
        "partition": None if study.simulation.site else study.simulation.partition.model_dump(),
        "clock": clock.model_dump() if (clock := study.simulation.clock).images_per_s else None,
        "sites": {
            member.name: {
                "patients": member.own.n_patients,
                "images": len(member.own),
                "classes": _patients_by(classes_of(member.own.labels, study.evaluation.labels), member.own),
                "views": _patients_by(member.own.views, member.own),
                "sexes": _patients_by(member.own.sexes, member.own),
                "ages": _ages(member.own),
                "shift": [shift.model_dump(exclude={"sites"}) for shift in member.shifts],
                "fault": [fault.model_dump(exclude={"sites"}) for fault in _faults(member.name, study)],
                "held_out": member.name in study.simulation.held_out,
                "warnings": [UNPAIRED] if Site(member.name, member.own, state).unpaired(study) else [],
            }
            for member in members
        },
    }


def _faults(name: str, study: Study) -> Iterable[AnyFault]:
    """Of a site, if it takes part."""
    return () if name in study.simulation.held_out else study.simulation.faults_of(name).values()


def _patients_by(said: NDArray[np.str_], cohort: Cohort) -> dict[str, int]:
    """{what an image is said to be: patients with such images}."""
    pairs = np.unique(np.stack([said, cohort.patients.astype(np.str_)]), axis=1)
    return dict(sorted(Counter(pairs[0].tolist()).items()))


def _ages(cohort: Cohort) -> list[float]:
    """Lower quartile, median and upper quartile over patients whose age is known; each one's is its first image's."""
    _, first = np.unique(cohort.patients, return_index=True)
    ages = cohort.ages[first]
    known = ages[~np.isnan(ages)]
    return [round(float(age), 1) for age in np.quantile(known, (0.25, 0.5, 0.75))] if len(known) else []


def preview_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Both with a row a site: classes, shifts and faults; and views, sex and age, if anything is known of them."""
    yield _classes_table(found)
    sites = found["sites"].values()
    if any(site["ages"] or {*site["views"], *site["sexes"]} - {""} for site in sites):
        yield _attributes_table(found["sites"])


def _attributes_table(sites: Mapping[str, Any]) -> Table:
    table = Table(
        "site", "views", "sex", "age, quartiles", title="Patients of each view, sex and age", title_justify="left"
    )
    for name, site in sites.items():
        views, sexes = (_counts(site[key]) for key in ("views", "sexes"))
        ages = " – ".join(f"{age:g}" for age in site["ages"]) or "unknown"
        table.add_row(escape(name), escape(views), escape(sexes), ages)
    return table


def _counts(patients: Mapping[str, int], none: str = "unknown") -> str:
    """The most frequent words, and how many more there are; `none` for those without one.

    >>> _counts({"": 1, "AP": 3, "PA": 12})
    '12 PA · 3 AP · 1 unknown'
    """
    most = Counter(patients).most_common(LISTED)
    more = [f"{len(patients) - LISTED} rarer ones"] if len(patients) > LISTED else []
    return " · ".join([*(f"{n} {word or none}" for word, n in most), *more])


def clock_in_words(clock: Mapping[str, Any]) -> str:
    """
    >>> clock_in_words({"images_per_s": 2.0, "bytes_per_s": 1e6, "nights": [20, 6], "start_hour": 0.0})
    'time is simulated: 2 images and 1 MB a second, from 20 to 6 h, begun at 0 h'
    """
    first, last = clock["nights"]
    return (
        f"time is simulated: {clock['images_per_s']:g} images and {clock['bytes_per_s'] / 1e6:g} MB a second, "
        f"from {first:g} to {last:g} h, begun at {clock['start_hour']:g} h"
    )


def _classes_table(found: Mapping[str, Any]) -> Table:
    """Patients, images, patients of the most frequent classes, shifts, faults if there are any."""
    totals: Counter[str] = Counter()
    for site in found["sites"].values():
        totals.update(site["classes"])
    shown = sorted(name for name, _ in totals.most_common(LISTED))
    wide = sum(map(len, shown)) > BROADEST
    unreliable = any(site["fault"] for site in found["sites"].values())
    table = Table(title=f"{escape(_dealt(found))}: patients of each class", title_justify="left")
    table.add_column("site", no_wrap=True)
    for name in ("patients", "images", *(() if wide else (name or "no class" for name in shown))):
        table.add_column(escape(name), justify="right", overflow="fold")
    for name in (*(("classes",) if wide else ()), "shift", *(("fault",) if unreliable else ())):
        table.add_column(name, overflow="fold")
    for name, site in found["sites"].items():
        counts = [site["patients"], site["images"], *(() if wide else (site["classes"].get(c, 0) for c in shown))]
        told = [_counts(site["classes"], "no class")] if wide else []
        told.append(", ".join(map(words.of_shift, site["shift"])) or "–")
        told += [", ".join(map(words.of_fault, site["fault"])) or "–"] if unreliable else []
        named = f"{name} (held out)" if site["held_out"] else name
        table.add_row(escape(named), *map(str, counts), *map(escape, told))
    if len(totals) > len(shown) and not wide:
        table.caption = f"{len(totals) - len(shown)} rarer classes are left out"
    return table


def _dealt(found: Mapping[str, Any]) -> str:
    """The study, and by which law and seed its patients are dealt to sites.

    >>> _dealt({"study": "chest", "seed": 3, "partition": {"kind": "dirichlet", "alpha": 0.1}})
    'chest, dealt by dirichlet alpha 0.1, seed 3'
    """
    if found["partition"] is None:
        return f"{found['study']}, seed {found['seed']}"
    settings = "".join(f" {key} {value}" for key, value in found["partition"].items() if key != "kind" and value)
    return f"{found['study']}, dealt by {found['partition']['kind']}{settings}, seed {found['seed']}"
