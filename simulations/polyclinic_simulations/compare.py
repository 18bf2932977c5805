"""The rows against which a federated encoder is read: only the encoder differs between them.

Every row is a linear probe on frozen features, learnt on all sites' training patients together and scored on all
sites' test patients together. `alone:<site>` and `pooled` train the same study for the same number of rounds. A study
that ends in fine-tuning is also read by its classifier on the same test patients, with one more row: `scratch`, its
fine-tuning alone, federated; and where it starts from initial weights `init`, the same from those.
All are read by the labels as they were before a simulation changed any.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from polyclinic.cohort import Cohort
from polyclinic.evaluation import (
    ClassifierScores,
    NotMeasurable,
    Probe,
    Scores,
    classes_of,
    features,
    learn_probe,
    measurable_classes,
    pixel_features,
    score_classifier,
)
from polyclinic.files import write_atomic
from polyclinic.model import build_stage, encoder_of, load_tensors
from polyclinic.rules import Aggregation
from polyclinic.seeding import seed_for
from polyclinic.stages import Finetune
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
from polyclinic_simulations.profile import Half, Profile, profile, together

Features = Callable[[Cohort], NDArray[np.float32]]


def row_names(study: Study, sites: Mapping[str, Site]) -> list[str]:
    """The rows that the study asks for, cheapest first."""
    asked = study.evaluation.rows
    names = [row for row in ("pixels", "random") if row in asked] + ["federated"]
    if "scratch" in asked and has_scratch(study):
        names += ["scratch", "init"] if study.encoder.init != "random" else ["scratch"]
    if "alone" in asked:
        names += [f"alone:{name}" for name in sites]
    return names + (["pooled"] if "pooled" in asked else [])


def has_scratch(study: Study) -> bool:
    """Whether the row `scratch` can be made, and is not the study itself: it pretrains, and then fine-tunes."""
    return len({isinstance(stage, Finetune) for stage in study.stages}) == 2


def row(
    name: str,
    study: Study,
    sites: Mapping[str, Site],
    run: Path,
    federated: Tensors,
    listen: Listener | None = None,
    progress: Progress | None = None,
    held_out: Mapping[str, Site] = MappingProxyType({}),
) -> tuple[Scores | None, ClassifierScores | None, Profile | None]:
    """One row's probe, its classifier where the study ends in fine-tuning, and its profile; what an earlier attempt
    finished is read back. Sites that are held out stand in `at_sites` alone.

    Raises:
        NotMeasurable: the labels allow neither.
    """
    folder = row_folder(run, name)
    if (path := folder / "scores.json").exists():
        probed, classified, profiled = json.loads(path.read_text())
        kept = probed and Scores(**probed), classified and ClassifierScores(**classified)
        return *kept, profiled and Profile(**profiled)
    tensors = federated if name == "federated" else trained_row(name, study, sites, folder, listen, progress)
    encode = pixel_features if name == "pixels" else encoder_features(study, tensors)
    classified = None if tensors is None else classify(study, tensors, sites, held_out)
    encoded = encode_sites(encode, study, sites)
    probed = profiled = None
    try:
        learnt, probed = probe(encoded, study)
        away = encode_sites(encode, study, held_out)
        profiled = profile(learnt, encoded, away, study, name.removeprefix("alone:"))
    except NotMeasurable:
        if classified is None:
            raise
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps([found and asdict(found) for found in (probed, classified, profiled)]))
    return probed, classified, profiled


def row_folder(run: Path, name: str) -> Path:
    """Where a row of a run trains and keeps its scores."""
    return run / "rows" / name.replace(":", "-")


def trained_row(
    name: str,
    study: Study,
    sites: Mapping[str, Site],
    folder: Path,
    listen: Listener | None,
    progress: Progress | None,
) -> Tensors | None:
    """The tensors of a row other than the study's own; None of one that trains nothing."""
    if name in ("pixels", "random"):
        return None
    if name in ("scratch", "init"):
        return train_row(without_pretraining(study, keep_init=name == "init"), sites, folder, listen, progress)
    if name == "pooled":
        return train_one(study, pool(sites, folder), folder, listen, progress)
    alone = replace(sites[name.removeprefix("alone:")], privacy=folder / "privacy")  # another world, another ledger
    return train_one(study, alone, folder, listen, progress)


def without_pretraining(study: Study, keep_init: bool) -> Study:
    """The supervised baseline: the study's fine-tuning alone, from its initial weights or from none.

    From none, all layers learn from the first step and at the full rate: what spares a trained encoder would only
    handicap one that knows nothing.
    """
    plain = study.model_dump(mode="json")
    stages = [stage for stage in plain["stages"] if stage["kind"] == "finetune"]
    if not keep_init or study.encoder.init == "random":
        stages = [{**stage, "probe_rounds": 0, "layer_decay": 1.0} for stage in stages]
    encoder = plain["encoder"] if keep_init else {**plain["encoder"], "init": "random"}
    return resolve({**plain, "stages": stages, "encoder": encoder})


def classify(
    study: Study, tensors: Tensors, sites: Mapping[str, Site], held_out: Mapping[str, Site] = MappingProxyType({})
) -> ClassifierScores | None:
    """Scores of the fine-tuned classifier on all sites' test patients together, and its AUC at each site.

    None where the study makes none, or where too few of those patients have labels.
    """
    stage = study.stages[-1]
    if not isinstance(stage, Finetune):
        return None
    _, module = build_stage(study, len(study.stages) - 1)
    load_tensors(module, tensors)

    tested = {name: site.measured(site.split(study)[1]) for name, site in sites.items()}
    away = {name: site.measured(site.cohort) for name, site in held_out.items()}
    try:
        return score_classifier(module, tested, study, stage, away)
    except NotMeasurable:
        return None


def encode_sites(encode: Features, study: Study, sites: Mapping[str, Site]) -> dict[str, tuple[Half, Half]]:
    """(train, test) of every site as an encoder sees them."""

    def half(cohort: Cohort) -> Half:
        classes = classes_of(cohort.labels, study.evaluation.labels)
        return Half(encode(cohort), classes, cohort.patients.astype(np.int64))

    halves = {name: map(site.measured, site.split(study)) for name, site in sites.items()}
    return {name: (half(train), half(test)) for name, (train, test) in halves.items()}


def probe(encoded: Mapping[str, tuple[Half, Half]], study: Study) -> tuple[Probe, Scores]:
    """A linear probe over all sites, and its scores on their test patients.

    Raises:
        NotMeasurable: the sites' labels allow none.
    """
    seed = seed_for(study.seed, "probe")
    train, test = (together([halves[k] for halves in encoded.values()]) for k in (0, 1))
    classes = measurable_classes(train.classes, test.classes, test.patients)
    learnt = learn_probe(*train, classes, seed=seed)
    return learnt, learnt.score(*test, seed=seed)


def encoder_features(study: Study, tensors: Tensors | None) -> Features:
    """Features of the encoder in `tensors` (None: untrained)."""
    device = pick_device()
    encoder: torch.nn.Module = encoder_of(study, tensors).to(device)
    return lambda cohort: features(encoder, cohort, study.compute, device)


def train_one(
    study: Study, site: Site, folder: Path, listen: Listener | None = None, progress: Progress | None = None
) -> Tensors:
    """The study with a single site, through the same round loop; resumable in `folder`.

    By the plain mean: with one update there is nothing that another rule could be better at, and some would be worse.
    """
    plain = study.model_dump(mode="json")
    shared = {key: value for key, value in plain["aggregation"].items() if key in Aggregation.model_fields}
    own = resolve({**plain, "aggregation": {**shared, "rule": "fedavg"}})
    return train_row(own, {site.name: site}, folder, listen, progress)


def train_row(
    study: Study,
    sites: Mapping[str, Site],
    folder: Path,
    listen: Listener | None,
    progress: Progress | None,
    evaluate: bool = False,
) -> Tensors:
    """A study of its own through the same round loop; resumable in `folder`. Sites measure only if they are to.

    Raises:
        Collapsed: they measure, and the encoder has.
    """
    plain = study.model_dump(mode="json")
    fewest = min(study.aggregation.min_sites, len(sites))
    own = resolve({**plain, "aggregation": {**plain["aggregation"], "min_sites": fewest}})
    run = RunDir(folder, listen)
    run.create(own)
    grid = LocalGrid({name: make_app(partial(_given, site), progress) for name, site in sites.items()})
    return run_study(grid, own, run, {name: site.cohort.n_patients for name, site in sites.items()}, evaluate)


def _given(site: Site, context: object) -> Site:
    return site
