"""What a simulation would train on: sites by classes, before any of it runs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from polyclinic.cohort import Cohort
from polyclinic.evaluation import classes_of
from polyclinic.faults import ANY_ROUND, AnyFault
from polyclinic.study import Study
from polyclinic_simulations.consortium import Progress, gather, require

LISTED = 8
"""Classes with a column of their own."""


def preview(study: Study, data: Path, state: Path, progress: Progress) -> dict[str, Any]:
    """The sites of a study by name: `patients`, `images`, `classes` (patients of each, "" without one), `shift`,
    `fault`, and whether it is `held_out`.

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
                "shift": [shift.model_dump(exclude={"sites"}) for shift in member.shifts],
                "fault": [fault.model_dump(exclude={"sites"}) for fault in _faults(member.name, study)],
                "held_out": member.name in study.simulation.held_out,
            }
            for member in members
        },
    }


def _faults(name: str, study: Study) -> Iterable[AnyFault]:
    """Of a site, if it takes part."""
    return () if name in study.simulation.held_out else study.simulation.faults_of(name).values()


def _patients_by_class(cohort: Cohort, study: Study) -> dict[str, int]:
    classes = classes_of(cohort.labels, study.evaluation.labels)
    pairs = np.unique(np.stack([classes, cohort.patients.astype(np.str_)]), axis=1)
    return dict(sorted(Counter(pairs[0].tolist()).items()))


def _in_words(shift: Mapping[str, Any]) -> str:
    """
    >>> _in_words({"kind": "prevalence", "severity": 0.5, "value": "nodule", "becomes": ""})
    'prevalence 0.5 nodule'
    """
    words = " to ".join(filter(None, (shift["value"], shift["becomes"])))
    return f"{shift['kind']} {shift['severity']:g} {words}".strip()


def preview_table(found: Mapping[str, Any]) -> Table:
    """A row a site: patients, images, patients of the most frequent classes, shifts, faults if there are any."""
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
    unreliable = any(site["fault"] for site in found["sites"].values())
    if unreliable:
        table.add_column("fault")
    for name, site in found["sites"].items():
        counts = [site["patients"], site["images"], *(site["classes"].get(each, 0) for each in shown)]
        shifts = ", ".join(map(_in_words, site["shift"]))
        words = [shifts or "–", *([", ".join(map(_words, site["fault"])) or "–"] if unreliable else [])]
        table.add_row(f"{name} (held out)" if site["held_out"] else name, *map(str, counts), *words)
    if more:
        table.caption = f"{more} rarer classes are left out"
    return table


def _words(fault: Mapping[str, Any]) -> str:
    """A fault in a few words.

    >>> _words({"kind": "lateness", "seconds": 600.0, "probability": 0.25, "rounds": (1, 1_000_000)})
    'lateness 600 s (0.25 of rounds)'
    >>> _words({"kind": "scaling", "factor": 10.0, "probability": 1.0, "rounds": (3, 5)})
    'scaling 10 (rounds 3 to 5)'
    """
    size = f" {fault['factor']:g}" if "factor" in fault else f" {fault['seconds']:g} s" if "seconds" in fault else ""
    first, last = fault["rounds"]
    when = [f"{fault['probability']:.3g} of rounds"] if fault["probability"] < 1 else []
    when += [f"rounds {first} to {last}"] if (first, last) != ANY_ROUND else []
    return f"{fault['kind']}{size}" + (f" ({', '.join(when)})" if when else "")
