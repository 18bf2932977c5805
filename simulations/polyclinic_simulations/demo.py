"""The demo: a study file that ships with the package, and invented patients for its sites."""

import shutil
from pathlib import Path

from polyclinic.study import Study, load_study
from polyclinic_simulations.phantom import write_site

PATIENTS = 60
"""At each site."""


def demo_study(seed: int) -> Study:
    """The demo's study, as shipped, with another seed."""
    here = Path(__file__).parent
    shipped = here / "studies" / "demo.toml"
    study = load_study(shipped if shipped.exists() else here.parent / "studies" / "demo.toml")
    return study.model_copy(update={"study": study.study.model_copy(update={"seed": seed})})


def demo_patients(study: Study, state: Path) -> Path:
    """The folder with one DICOM tree a site; written once a seed, whole or not there."""
    folder = state / f"phantom-{study.seed}"
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        for number, site in enumerate(study.simulation.site):
            write_site(unfinished / site.cohort, site.name, PATIENTS, study.seed, number=number)
        unfinished.rename(folder)
    return folder
