"""report.html: one self-contained file from what stands in a run directory. It asks the network for nothing."""

import base64
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from polyclinic.cohort.card import card_html
from polyclinic.files import write_atomic
from polyclinic.report import facts, figures, words
from polyclinic.report.forest import forest
from polyclinic.report.run import Run, read_run

REHEARSALS = ("local", "ray")
"""Engines that play all sites on one machine, so that patients can be pooled for measuring."""
PATHS: Any = {"simulation": {"cohort": True, "site": {"__all__": {"cohort"}}}}
"""What the shown study leaves out: where the cohorts lie on the disk of whoever rehearsed."""


def render_report(run: Path) -> Path:
    """Write report.html of a run directory, finished or not; returns its path.

    Raises:
        StudyError: the directory holds no readable study.toml.
    """
    page = run / "report.html"
    write_atomic(page, _environment().get_template("report.html.j2").render(context(read_run(run))))
    return page


def render_shared(run: Path) -> str:
    """The report as it may leave the house: without the pictures of images and without the sites' cards."""
    shown = context(read_run(run)) | {"views": None, "cards": [], "load": _BESIDE}
    return _environment().get_template("report.html.j2").render(shown)


def _environment() -> Environment:
    """Everything that is not markup made here is escaped: names of sites and labels come from outside."""
    environment = Environment(
        loader=PackageLoader("polyclinic.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": words.count, "duration": words.duration, "size": words.size, "row_name": words.row_name
    }  # fmt: skip
    return environment


def context(run: Run) -> dict[str, Any]:
    """What the template shows."""
    return {
        "run": run,
        "lede": [facts.what_was_trained(run), facts.how_it_was_trained(run)],
        "result": facts.result(run),
        "comparison": facts.comparison(run),
        "tested": {table: facts.tested_on(run, table) for table in ("comparison", "classifier")},
        "as_long": facts.as_long(run),
        "load": _loading(run.path),
        "intervals": facts.intervals(run),
        "at_sites": facts.at_sites(run),
        "classifier": facts.classifier(run),
        "classifier_at_sites": facts.classifier_at_sites(run),
        "operating": run.summary.get("operating", []),
        "forest": forest(run) if run.comparison else None,
        "rehearsed": run.summary.get("engine") in REHEARSALS,
        "training": figures.training(run),
        "unprobed": "effective_rank" in run.metrics and "probe_auc" not in run.metrics,
        "health": figures.health(run),
        "traffic": figures.traffic(run),
        "maps": figures.maps(run),
        "views": _image(run.path / "report" / "views.png"),
        "sites": facts.sites(run),
        "counted": any(run.sites.values()),
        "cards": _cards(run),
        "warnings": facts.warnings(run),
        "private": run.study.privacy.mode != "none",
        "privacy": facts.privacy(run),
        "releases": facts.releases(run),
        "refused": run.happened("update_refused"),
        "missing": facts.missing(run),
        "study": tomli_w.dumps(_without_paths(run)),
        "encoder": (run.path / "encoder.safetensors").exists(),
    }


_BESIDE = ("encoder.safetensors", "beside this page")


def _loading(path: Path) -> tuple[str, str]:
    """What `load_encoder` takes and from where: the run as it was given, unless that would tell where a home is."""
    return (
        (path.name, "in the folder that holds this run")
        if path.is_absolute()
        else (str(path), "where the run was made")
    )


def _without_paths(run: Run) -> dict[str, Any]:
    return {**run.study.model_dump(mode="json", exclude=PATHS), "encoder": run.study.plain()["encoder"]}


def _cards(run: Run) -> list[tuple[str, Markup]]:
    """Each cohort's data-fitness card, as the cohort's own module renders it."""
    return [(name, Markup(card_html(card))) for name, card in sorted(run.cards.items())]  # noqa: S704 (it escapes)


def _image(path: Path) -> str | None:
    """A PNG as a data address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None
