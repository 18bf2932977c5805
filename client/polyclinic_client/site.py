"""A hospital as its node sees it: a name, a cohort, and a folder for what must outlive a message."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from polyclinic.cohort import Cohort, open_cohort
from polyclinic.cohort.sampling import split_patients
from polyclinic.files import storage, write_atomic
from polyclinic.seeding import seed_for
from polyclinic.study import Study


@dataclass(frozen=True)
class Site:
    """Name, cohort, and the state folder, in which each study keeps its rounds."""

    name: str
    cohort: Cohort
    state: Path

    def split(self, study: Study) -> tuple[Cohort, Cohort]:
        """(train, test) cohorts by patient: the same in every round of a study, and no stage trains on test."""
        return split_patients(self.cohort, study.evaluation, seed_for(study.seed, "split", site=self.name))


def write_site(folder: Path, name: str, cohort: Path, patients: list[int] | None = None) -> None:
    """Make a state folder that `open_site` opens: a site over all patients of a built cohort, or over some."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "site.json", json.dumps({"name": name, "cohort": str(cohort), "patients": patients}))
    open_site.cache_clear()


@lru_cache(maxsize=8)
def open_site(folder: Path) -> Site:
    """The site that a state folder describes. Cached: a process that serves many messages opens it once."""
    facts = json.loads((folder / "site.json").read_text())
    cohort = open_cohort(Path(facts["cohort"]))
    if facts["patients"] is not None:
        cohort = cohort.select(facts["patients"])
    return Site(facts["name"], cohort, folder)
