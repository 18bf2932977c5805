"""A run's encoder on a cohort that it has not seen."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyclinic.artifacts import load_encoder
from polyclinic.cohort import Cohort, build_cohort, open_cohort
from polyclinic.cohort.scan import LABELS
from polyclinic.errors import CohortError
from polyclinic.evaluation import NotMeasurable, classes_of, features, pixel_features
from polyclinic.study import Study, load_study
from polyclinic.training import pick_device
from polyclinic_client.site import Site
from polyclinic_simulations.compare import Features, encode_sites, encoder_features, probe


def evaluate_outside(
    run: Path, cohort: Path, state: Path, allow_burned_in: bool = False
) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows pixels, random and federated, learnt and scored on the cohort's own patients; and how many of its images
    the run's sites hold too, as far as their cohorts can still be opened where they were.

    Raises:
        CohortError: the cohort is not there, or its labels do not allow a probe.
    """
    study = load_study(run / "study.toml")
    if not cohort.exists():
        raise CohortError(f"the cohort is not there: {cohort}", "correct --cohort")
    within = sorted(path.parent.name for path in cohort.glob(f"*/{LABELS}"))
    if within and not (cohort / LABELS).exists():
        raise CohortError(
            f"{cohort} is no cohort but holds some: {', '.join(within)}", f"give one: --cohort {cohort / within[0]}"
        )
    built = build_cohort(cohort, study.images, state, allow_burned_in=allow_burned_in)
    sites = {"outside": Site("outside", built, state)}
    device = pick_device()
    encoder = load_encoder(run / "encoder.safetensors").to(device)
    rows: dict[str, Features] = {
        "pixels": pixel_features,
        "random": encoder_features(study, None),
        "federated": lambda images: features(encoder, images, study.compute, device),
    }
    try:
        return {
            name: asdict(probe(encode_sites(encode, study, sites), study)[1]) for name, encode in rows.items()
        }, _known(run, built)
    except NotMeasurable as reason:
        raise CohortError(f"no probe on {cohort.name}: {reason}", _cure(built, study)) from reason


def _cure(cohort: Cohort, study: Study) -> str:
    """What would make a cohort measurable on which no probe can be: labels, a second class, or more patients."""
    classes = set(classes_of(cohort.labels, study.evaluation.labels).tolist()) - {""}
    if not classes:
        return f"give a cohort with labels: a {LABELS} with the columns image and label, or a sub-directory a class"
    if len(classes) == 1:
        return "give a cohort with patients of two classes or more"
    share = f"{study.evaluation.test_fraction:.0%} of its patients, class by class"
    tested = "those that its split column names" if study.evaluation.split == "column" else share
    return f"give a cohort with more patients of each class: tested are {tested}, and a class needs two"


def _known(run: Path, cohort: Cohort) -> int:
    """Images of `cohort` that are the same, pixel by pixel, as one of the run's sites'."""
    folders = {json.loads(path.read_text())["cohort"] for path in run.glob("sites/*/site.json")}
    held: set[bytes] = set()
    for folder in folders:
        with suppress(CohortError):
            held.update(_images(open_cohort(Path(folder))))
    return sum(image in held for image in _images(cohort))


def _images(cohort: Cohort) -> Iterator[bytes]:
    """The SHA-256 of each image's pixels."""
    for row in cohort.rows:
        yield hashlib.sha256(cohort.images[row].tobytes()).digest()
