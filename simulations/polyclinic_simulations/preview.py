"""What a simulation would train on: sites by classes, before any of it runs."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from polyclinic.cohort import Cohort
from polyclinic.evaluation import classes_of
from polyclinic.study import Study
from polyclinic_simulations.consortium import Progress, gather, require

LISTED = 8
"""Classes with a column of their own."""


def preview(study: Study, data: Path, state: Path, progress: Progress) -> dict[str, Any]:
    """The sites of a study by name: `patients`, `images`, `classes` (patients of each, "" without one) and `shift`.

    Patients with images of several classes count in each. Builds the cohorts in `state` and writes nothing else.

    Raises:
        Refused: the simulation would be.
    """
    members = gather(study, data, state, progress)
    require(members, study)
    return {
        "study": study.name,
        "sites": {
            member.name: {
                "patients": member.own.n_patients,
                "images": len(member.own),
                "classes": _patients_by_class(member.own, study),
                "shift": [shift.model_dump(include={"kind", "severity"}) for shift in member.shifts],
            }
            for member in members
        },
    }


def _patients_by_class(cohort: Cohort, study: Study) -> dict[str, int]:
    classes = classes_of(cohort.labels, study.evaluation.labels)
    pairs = np.unique(np.stack([classes, cohort.patients.astype(np.str_)]), axis=1)
    return dict(sorted(Counter(pairs[0].tolist()).items()))


def preview_table(found: Mapping[str, Any]) -> Table:
    """A row a site: patients, images, patients of the most frequent classes, shifts."""
    totals: Counter[str] = Counter()
    for site in found["sites"].values():
        totals.update(site["classes"])
    shown = sorted(name for name, _ in totals.most_common(LISTED))
    more = len(totals) - len(shown)
    table = Table(title=f"{escape(found['study'])}: patients of each class", title_justify="left")
    table.add_column("site")
    for name in ("patients", "images", *(name or "no class" for name in shown)):
        table.add_column(escape(name), justify="right")
    table.add_column("shift")
    for name, site in found["sites"].items():
        counts = [site["patients"], site["images"], *(site["classes"].get(each, 0) for each in shown)]
        shifts = ", ".join(f"{shift['kind']} {shift['severity']:g}" for shift in site["shift"])
        table.add_row(name, *map(str, counts), shifts or "–")
    if more:
        table.caption = f"{more} rarer classes are left out"
    return table
