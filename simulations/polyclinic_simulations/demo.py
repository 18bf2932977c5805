"""The demo: a study file that ships with the package."""

from pathlib import Path

from polyclinic.study import Study, load_study


def demo_study(seed: int) -> Study:
    """The demo's study, as shipped, with another seed."""
    here = Path(__file__).parent
    shipped = here / "studies" / "demo.toml"
    study = load_study(shipped if shipped.exists() else here.parent / "studies" / "demo.toml")
    return study.model_copy(update={"study": study.study.model_copy(update={"seed": seed})})
