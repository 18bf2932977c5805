"""The sites of a simulated study: cohorts built, patients dealt, one state folder a site."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.cohort import Cohort, build_cohort, union
from polyclinic.cohort.index import read_meta, require_patients
from polyclinic.errors import CohortError, StudyError
from polyclinic.seeding import seed_for
from polyclinic.stages import Finetune
from polyclinic.study import SimulatedSite, Simulation, Study
from polyclinic_client.site import Site, open_site, write_site
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.checks import find, sources
from polyclinic_simulations.partition import partition

Progress = Callable[[str, int, int], None]
"""(what is being read, files done, files in all)."""


@dataclass(frozen=True)
class Member:
    """A site before it has a folder: its cohort, and which of the cohort's patients are its own (None: all)."""

    name: str
    cohort: Cohort
    patients: list[int] | None


def gather(study: Study, data: Path, state: Path, progress: Progress) -> list[Member]:
    """Build the cohorts that `[simulation]` names and deal their patients to sites.

    Args:
        data: the folder that relative cohort paths start from.
        state: where built cohorts are kept between runs.

    Raises:
        StudyError: the study names no cohort. CohortError: a cohort is missing or cannot be used.
    """
    cohorts = {name: _build(name, source, study, data, state, progress) for name, source in sources(study).items()}
    if study.simulation.site:
        return [Member(name, cohort, None) for name, cohort in cohorts.items()]
    wanted, cohort = study.simulation, cohorts["all"]
    parts = partition(cohort, wanted.sites, wanted.partition, seed_for(study.seed, "partition"))
    return [Member(f"site-{number}", cohort, part.tolist()) for number, part in enumerate(parts, start=1)]


def _build(
    name: str, source: Simulation | SimulatedSite, study: Study, data: Path, state: Path, progress: Progress
) -> Cohort:
    path = find(name, source, data)
    with _named(name):
        return build_cohort(
            path,
            study.images,
            state,
            allow_burned_in=source.allow_burned_in,
            progress=lambda done, total: progress(name, done, total),
        )


@contextmanager
def _named(site: str) -> Iterator[None]:
    """Say whose cohort an error is about."""
    try:
        yield
    except CohortError as error:
        raise CohortError(f"site {site!r}: {error.problem}", error.fix) from error


def settle(members: list[Member], study: Study, run: RunDir) -> dict[str, Site]:
    """Give every member a state folder in the run. Nothing is written if the study cannot be run.

    Raises:
        CohortError: a member cannot both train and hold patients out.
        StudyError: there are too few members, or two with the same patients: who trains at one would test at the other.
        Refused: a member is not what it was when the run began.
    """
    seen: dict[str, str] = {}
    for member in members:
        patients = json.dumps([read_meta(member.cohort.folder)["digest"], member.patients])
        if (other := seen.setdefault(patients, member.name)) != member.name:
            raise StudyError(f"sites {other!r} and {member.name!r} have the same patients", "give each its own cohort")
        chosen = member.cohort if member.patients is None else member.cohort.select(member.patients)
        with _named(member.name):
            if study.privacy.mode == "patient":
                require_patients(member.cohort.folder)
            Site(member.name, chosen, run.path).split(study)
    if len(members) < study.aggregation.min_sites:
        raise StudyError(
            f"{len(members)} sites can never be aggregation.min_sites = {study.aggregation.min_sites}",
            "lower min_sites, or simulate more sites",
        )
    folders = {member.name: run.path / "sites" / member.name for member in members}
    for member in members:
        write_site(folders[member.name], member.name, member.cohort.folder, member.patients)
    return {name: open_site(folder) for name, folder in folders.items()}


@dataclass(frozen=True)
class Pooled(Site):
    """All sites' patients in one place: what no consortium can have, and every result is read against."""

    members: Mapping[str, Site] = field(default_factory=dict)

    def split(self, study: Study) -> tuple[Cohort, Cohort]:
        """The sites' own training patients together, and their own test patients together."""
        splits = [site.split(study) for site in self.members.values()]
        return union([train for train, _ in splits]), union([test for _, test in splits])

    def labelled(self, study: Study, stage: Finetune) -> tuple[Cohort, Cohort | None]:
        """The sites' own labelled patients together, and their own validation patients together."""
        found = []
        for site in self.members.values():
            with suppress(CohortError):  # a site without labels has none to give
                found.append(site.labelled(study, stage))
        if not found:
            raise CohortError(
                "no site has a training patient with a label", "add the sites' words to the study's labels"
            )
        kept = [validation for _, validation in found if validation is not None]
        return union([train for train, _ in found]), union(kept) if kept else None


def pool(sites: Mapping[str, Site], state: Path) -> Pooled:
    """The sites as one."""
    return Pooled("pooled", union([site.cohort for site in sites.values()]), state, members=sites)
