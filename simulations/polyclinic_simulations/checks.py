"""What can be told of a study before anything is loaded or read: torch alone takes seconds to import."""

from pathlib import Path

from polyclinic.errors import CohortError, StudyError
from polyclinic.simulation import SimulatedSite, Simulation
from polyclinic.stages import Finetune
from polyclinic.study import Study


def check(study: Study, data: Path, holding_out: bool) -> None:
    """Refuse a study that cannot be simulated. `data` is the folder that relative cohort paths start from.

    Raises:
        StudyError: it names no cohort, or leaves one site out and has nothing to compare, or holds sites out besides.
        CohortError: one is missing.
    """
    if holding_out:
        check_stages(study)
    for name, source in sources(study).items():
        if not source.phantom:
            find(name, source, data)


def check_weights(study: Study) -> None:
    """Refuse initial weights that training could not start from.

    Raises:
        StudyError: as `artifacts.first_tensors`.
    """
    if study.encoder.init != "random":
        from polyclinic.artifacts import first_tensors

        first_tensors(study)


def check_stages(study: Study) -> None:
    """Refuse a study with nothing to compare, or nothing to compare it by, or that the protocol would not heed."""
    if study.simulation.held_out:
        raise StudyError(
            "simulation.held_out names sites, and leaving one site out holds out each in turn",
            "leave held_out out, or --leave-one-site-out",
        )
    if study.simulation.unreliable:
        raise StudyError(
            "leaving one site out plays neither [simulation.clock] nor [[simulation.fault]]",
            "leave them out, or --leave-one-site-out",
        )
    if not isinstance(study.stages[-1], Finetune) or isinstance(study.stages[0], Finetune):
        raise StudyError(
            "leaving one site out compares pretraining, then fine-tuning, with fine-tuning alone",
            'give the study a [[stages]] of kind "pretrain" and a last one of kind "finetune"',
        )


def sources(study: Study) -> dict[str, Simulation | SimulatedSite]:
    """What names a cohort, by the name of its site; the one cohort that is dealt to sites is `all`."""
    wanted = study.simulation
    if wanted.site:
        return {site.name: site for site in wanted.site}
    if wanted.cohort or wanted.phantom:
        return {"all": wanted}
    raise StudyError(
        "the study has no [simulation]: there is no cohort to play the sites",
        'add [simulation] with sites = 3 and cohort = "DIR" (or phantom = 120), or one [[simulation.site]] a hospital',
    )


def find(name: str, source: Simulation | SimulatedSite, data: Path) -> Path:
    """Where a cohort lies."""
    path = data / source.cohort
    if not path.exists():
        raise CohortError(f"the cohort of {name!r} is not there: {path}", "correct its path, or give --data DIR")
    return path
