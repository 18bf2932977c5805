"""The sites of a simulated study: cohorts built, patients dealt, one state folder a site."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import numpy as np

from polyclinic.cohort import Cohort, build_cohort, union
from polyclinic.cohort.index import read_meta, require_patients
from polyclinic.errors import CohortError, StudyError
from polyclinic.files import atomic
from polyclinic.seeding import seed_for
from polyclinic.simulation import Column, LabelShift, Shift, SimulatedSite, Simulation
from polyclinic.stages import Finetune
from polyclinic.study import Study
from polyclinic_client.site import Site, open_site, write_site
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.checks import find, sources
from polyclinic_simulations.partition import by_column, partition
from polyclinic_simulations.phantom import keep_site
from polyclinic_simulations.shift import pixel_shifts, shift_patients, shift_pixels

Progress = Callable[[str, int, int], None]
"""(what is being read, files done, files in all)."""

IMAGES = "images.bin"
"""In a site's folder: its images, where shifts have changed their pixels."""
BLOCK = 256
"""Images that are shifted at once."""


@dataclass(frozen=True)
class Member:
    """A site before it has a folder.

    Attributes:
        cohort: its cohort as it was built, but for labels that the site's shifts have changed.
        patients: which of the cohort's are its own; None: all.
        shifts: the site's, in their order; those of pixels are not made yet.
    """

    name: str
    cohort: Cohort
    patients: list[int] | None
    shifts: list[Shift] = field(default_factory=list)

    @cached_property
    def own(self) -> Cohort:
        """The cohort of its own patients."""
        return self.cohort if self.patients is None else self.cohort.select(self.patients)


def gather(study: Study, data: Path, state: Path, progress: Progress) -> list[Member]:
    """Build the cohorts that `[simulation]` names and deal their patients to sites.

    Args:
        data: the folder that relative cohort paths start from.
        state: where built cohorts are kept between runs.

    Raises:
        StudyError: the study names no cohort, or a site that is none. CohortError: a cohort is missing or cannot be
            used. Refused: its patients cannot be dealt as asked.
    """
    cohorts = {
        name: _build(name, number, source, study, data, state, progress)
        for number, (name, source) in enumerate(sources(study).items())
    }
    wanted = study.simulation
    if wanted.site:
        return [_admit(Member(name, cohort, None), study) for name, cohort in cohorts.items()]
    cohort, how = cohorts["all"], wanted.partition
    if isinstance(how, Column):
        parts = by_column(cohort, how)
        _require_sites(wanted, parts)
    else:
        dealt = partition(cohort, wanted.sites, how, seed_for(study.seed, "partition"))
        parts = {f"site-{number}": part for number, part in enumerate(dealt, start=1)}
    return [_admit(Member(name, cohort, part.tolist()), study) for name, part in parts.items()]


def _require_sites(wanted: Simulation, names: Collection[str]) -> None:
    try:
        wanted.require_sites(names)
    except ValueError as error:
        problem, _, fix = str(error).rpartition(": ")
        raise StudyError(problem, fix) from error


def _admit(member: Member, study: Study) -> Member:
    """The member with its shifts, those of labels and patients made."""
    shifts = study.simulation.shifts_of(member.name)
    before = np.arange(member.cohort.n_patients) if member.patients is None else np.array(member.patients)
    with _named(member.name):
        cohort, patients = shift_patients(member.cohort, before, shifts, study.seed, member.name)
    same = len(patients) == len(before)
    return Member(member.name, cohort, member.patients if same else patients.tolist(), shifts)


def _build(
    name: str,
    number: int,
    source: Simulation | SimulatedSite,
    study: Study,
    data: Path,
    state: Path,
    progress: Progress,
) -> Cohort:
    if source.phantom:
        told = partial(progress, f"{name}: inventing patients")
        path = keep_site(state, name, source.phantom, study.seed, number=number, progress=told)
    else:
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


def require(members: list[Member], study: Study) -> None:
    """Refuse sites that cannot run the study.

    Raises:
        CohortError: a member cannot both train and hold patients out.
        StudyError: there are too few members, or two share patients: who trains at one would test at the other.
    """
    seen: dict[str, dict[int, str]] = {}
    for member in members:
        patients = range(member.cohort.n_patients) if member.patients is None else member.patients
        others = seen.setdefault(read_meta(member.cohort.folder)["digest"], {})
        if shared := others.keys() & set(patients):
            other = others[min(shared)]
            raise StudyError(f"sites {other!r} and {member.name!r} have the same patients", "give each its own cohort")
        others.update(dict.fromkeys(patients, member.name))
        with _named(member.name):
            if study.privacy.mode == "patient":
                require_patients(member.cohort.folder)
            Site(member.name, member.own, Path()).split(study)
    left = len({member.name for member in members} - set(study.simulation.held_out))
    rule = study.aggregation
    if 1 < left < rule.least:
        raise StudyError(
            f"aggregation.rule {rule.rule!r}, as it is set, needs updates of {rule.least} sites, and there are {left}",
            "simulate more sites, choose 'fedavg', or have the rule expect fewer bad ones",
        )
    if left < study.aggregation.min_sites:
        held_out = len(members) - left
        raise StudyError(
            f"{left} sites{f' beside {held_out} held out' if held_out else ''} can never be aggregation.min_sites = "
            f"{study.aggregation.min_sites}",
            f"lower min_sites, {'hold fewer out, ' if held_out else ''}or simulate more sites",
        )


def settle(members: list[Member], study: Study, run: RunDir) -> dict[str, Site]:
    """Give every member a state folder in the run. Nothing is written if the study cannot be run.

    Raises:
        CohortError, StudyError: as `require`. Refused: a member is not what it was when the run began.
    """
    require(members, study)
    folders = {member.name: run.path / "sites" / member.name for member in members}
    for member in members:
        relabelled = any(shift.kind in get_args(LabelShift) for shift in member.shifts)
        labels = member.own.labels.tolist() if relabelled else None
        images = IMAGES if any(pixel_shifts(member.shifts)) else None
        write_site(folders[member.name], member.name, member.cohort.folder, member.patients, labels, images)
        if images:
            _store_images(member, study, folders[member.name])
    return {name: open_site(folder) for name, folder in folders.items()}


def hold_out(sites: Mapping[str, Site], study: Study) -> tuple[dict[str, Site], dict[str, Site]]:
    """(the sites that take part, those that `[simulation] held_out` names), both in the order given."""
    absent = set(study.simulation.held_out)
    taking_part = {name: site for name, site in sites.items() if name not in absent}
    return taking_part, {name: site for name, site in sites.items() if name in absent}


def _store_images(member: Member, study: Study, folder: Path) -> None:
    """The member's images with its pixel shifts as a file of `folder`, a block at a time; kept if it is there.

    It holds no others than the member's own, so that all sites together store each image of a cohort at most once.
    """
    path, whole = folder / IMAGES, member.cohort
    if path.exists():
        return
    for left in folder.glob(f".{IMAGES}.*"):  # by a killed process
        left.unlink()
    numbers = np.flatnonzero(np.isin(whole.rows, member.own.rows))
    numbers = numbers[np.argsort(whole.rows[numbers])]
    with atomic(path) as file:
        for start in range(0, len(numbers), BLOCK):
            block = numbers[start : start + BLOCK]
            images = np.asarray(whole.images[whole.rows[block]])
            file.write(shift_pixels(images, block, member.shifts, study.seed, member.name).tobytes())


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
