"""The rows against which a federated encoder is read: only the encoder differs between them.

Every row is a linear probe on frozen features, learnt on all sites' training patients together and scored on all
sites' test patients together. `alone:<site>` and `pooled` train the same study for the same number of rounds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.evaluation import Scores, classes_of, features, linear_probe, pixel_features
from polyclinic.files import write_atomic
from polyclinic.model import encoder_of
from polyclinic.seeding import seed_for
from polyclinic.study import Study, resolve
from polyclinic.training import pick_device
from polyclinic.wire import Tensors
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_client.work import Progress
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import Listener, RunDir
from polyclinic_simulations.consortium import pool
from polyclinic_simulations.engines.local import LocalGrid

Features = Callable[[Cohort], NDArray[np.float32]]


def row_names(study: Study, sites: Mapping[str, Site]) -> list[str]:
    """The rows that the study asks for, cheapest first."""
    asked = study.evaluation.rows
    names = [row for row in ("pixels", "random") if row in asked] + ["federated"]
    if "alone" in asked:
        names += [f"alone:{name}" for name in sites]
    return names + (["pooled"] if "pooled" in asked else [])


def row(
    name: str,
    study: Study,
    sites: Mapping[str, Site],
    run: Path,
    federated: Tensors,
    listen: Listener | None = None,
    progress: Progress | None = None,
) -> Scores:
    """One row's scores; a row that an earlier attempt finished is read back.

    Raises:
        NotMeasurable: the labels do not allow a probe.
    """
    folder = run / "rows" / name.replace(":", "-")
    if (path := folder / "scores.json").exists():
        return Scores(**json.loads(path.read_text()))
    scores = probe(_features_of(name, study, sites, folder, federated, listen, progress), study, sites)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(scores)))
    return scores


def probe(encode: Features, study: Study, sites: Mapping[str, Site]) -> Scores:
    """A linear probe over all sites, given what turns a cohort into features."""
    splits = [site.split(study) for site in sites.values()]
    train, test = ([split[half] for split in splits] for half in (0, 1))
    return linear_probe(
        *(_together(train, encode, study)), *(_together(test, encode, study)), seed=seed_for(study.seed, "probe")
    )


def _together(
    cohorts: list[Cohort], encode: Features, study: Study
) -> tuple[NDArray[np.float32], NDArray[np.str_], NDArray[np.int64]]:
    """(features, classes, patients) of several cohorts, whose patients stay apart."""
    starts = np.cumsum([0] + [cohort.n_patients for cohort in cohorts])
    patients = [cohort.patients.astype(np.int64) + start for cohort, start in zip(cohorts, starts, strict=False)]
    classes = [classes_of(cohort.labels, study.evaluation.labels) for cohort in cohorts]
    return np.concatenate([encode(c) for c in cohorts]), np.concatenate(classes), np.concatenate(patients)


def _features_of(
    name: str,
    study: Study,
    sites: Mapping[str, Site],
    folder: Path,
    federated: Tensors,
    listen: Listener | None,
    progress: Progress | None,
) -> Features:
    if name == "pixels":
        return pixel_features
    if name == "random":
        tensors = None
    elif name == "federated":
        tensors = federated
    else:
        member = pool(sites, folder) if name == "pooled" else sites[name.removeprefix("alone:")]
        tensors = train_one(study, member, folder, listen, progress)
    return encoder_features(study, tensors)


def encoder_features(study: Study, tensors: Tensors | None) -> Features:
    """Features of the encoder in `tensors` (None: untrained)."""
    device = pick_device()
    encoder: torch.nn.Module = encoder_of(study, tensors).to(device)
    return lambda cohort: features(encoder, cohort, study.compute, device)


def train_one(
    study: Study, site: Site, folder: Path, listen: Listener | None = None, progress: Progress | None = None
) -> Tensors:
    """The study with a single site, through the same round loop; resumable in `folder`."""
    plain = study.model_dump(mode="json")
    alone = resolve({**plain, "aggregation": {**plain["aggregation"], "min_sites": 1}})
    run = RunDir(folder, listen)
    run.create(alone)
    grid = LocalGrid({site.name: make_app(lambda _: site, progress)})
    return run_study(grid, alone, run, {site.name: site.cohort.n_patients}, evaluate=False)
