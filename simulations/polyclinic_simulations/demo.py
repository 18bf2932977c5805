"""The demo: a study file that ships with the package, and invented patients for its sites."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

from polyclinic import __version__
from polyclinic.files import make_folder
from polyclinic.study import Study, load_study
from polyclinic_simulations.phantom import write_site

PATIENTS = 80
"""At each site."""


def demo_study(seed: int) -> Study:
    """The demo's study, as shipped, with another seed."""
    here = Path(__file__).parent
    shipped = here / "studies" / "demo.toml"
    study = load_study(shipped if shipped.exists() else here.parent / "studies" / "demo.toml")
    return study.model_copy(update={"study": study.study.model_copy(update={"seed": seed})})


def demo_patients(study: Study, state: Path) -> Path:
    """The folder with one DICOM tree a site; written once for what it is made from, whole or not there."""
    made_from = [__version__, PATIENTS, study.seed, [site.name for site in study.simulation.site]]
    folder = state / f"phantom-{sha256(json.dumps(made_from).encode()).hexdigest()[:16]}"
    if not folder.exists():
        make_folder(state)
        unfinished = Path(mkdtemp(prefix=".phantom-", dir=state))
        try:
            for number, site in enumerate(study.simulation.site):
                write_site(unfinished / site.cohort, site.name, PATIENTS, study.seed, number=number)
            if not folder.exists():
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
