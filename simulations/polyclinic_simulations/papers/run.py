"""Train and score one row of a table; what an earlier attempt finished is read back."""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyclinic.artifacts import load_tensors, save_encoder
from polyclinic.cohort import Cohort, union
from polyclinic.errors import CheckpointError, CohortError, Collapsed, Refused, StudyError
from polyclinic.files import locked, write_atomic
from polyclinic.model import encoder_of
from polyclinic.seeding import seed_for
from polyclinic.simulation import Dirichlet
from polyclinic.study import Study, load_study, resolve
from polyclinic_client.site import Site
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.compare import classify, train_row, without_pretraining
from polyclinic_simulations.consortium import pool
from polyclinic_simulations.holdout import leave_one_site_out
from polyclinic_simulations.papers.datasets import dataset
from polyclinic_simulations.papers.plans import (
    ALPHA,
    CHANNELS,
    CHEST,
    HOSPITALS,
    LABELS,
    OUTSIDE,
    PARTS,
    STARTS,
    Plan,
    Tier,
    pretraining,
)
from polyclinic_simulations.papers.workshop import METRICS, Workshop, finished, keep, row_folder
from polyclinic_simulations.partition import partition
from polyclinic_simulations.simulate import same
from polyclinic_simulations.tidy import tidy

PASSES = 4
"""Local epochs of fine-tuning at most: with half of the labels two, with a third three, or few images would make few
steps."""
_FIGURES = {f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")}


def run_plan(plan: Plan, at: Workshop) -> dict[str, Any] | None:
    """What `finished` gives, of a row that is made now if it was not; None while another process trains what it needs.

    A row whose pretraining collapses is finished without figures: with its settings it would collapse again.

    Raises:
        CohortError: a dataset is missing, or its test patients cannot be scored.
        CheckpointError: what is there of the protocol of table 4 is damaged.
    """
    lock = at.folder / "locks" / at.named(_shared(plan), plan)
    lock.mkdir(parents=True, exist_ok=True)
    with locked(lock) as free:
        if free and finished(plan, at) is None:
            made = _held_out(plan, at) if plan.table == 4 else _made(plan, at)
            start = f", from weights {weights}" if (weights := at.weights_of(plan)) else ""
            keep(plan, {**made, "machine": at.machine + start}, at)
            tidy(row_folder(plan, at))
    return finished(plan, at)


def _made(plan: Plan, at: Workshop) -> dict[str, Any]:
    """A row; anew where an earlier attempt's half cannot be gone on with."""
    try:
        try:
            return _measured(plan, at)
        except (CheckpointError, StudyError) as error:
            _warn(at, f"{plan.name} is made anew: {error.problem}")
            for half in (row_folder(plan, at), *(at.folder / "pretrained" / _shared(plan)).glob("*")):
                if not _readable(half / "encoder.safetensors"):
                    shutil.rmtree(half, ignore_errors=True)
            return _measured(plan, at)
    except Collapsed as error:
        _warn(at, f"{plan.name} has no figures: {error.problem}")
        return {"metrics": {}, "seconds": 0.0}


def _warn(at: Workshop, words: str) -> None:
    if at.listen is not None:
        at.listen({"event": "warning", "text": words})


def _readable(encoder: Path) -> bool:
    try:
        load_tensors(encoder)
    except CheckpointError:
        return False
    return True


def _shared(plan: Plan) -> str:
    """Names what is trained for a row and others: the pretraining, or one run of the protocol of table 4."""
    if plan.table == 4:
        return f"holdout-{plan.init}-{plan.seed}"
    return replace(plan, table=0, label_fraction=1.0).name


def _measured(plan: Plan, at: Workshop) -> dict[str, Any]:
    """The mean over those who train by themselves, each scored on all test patients; of one alone, its interval too."""
    started, folder = time.monotonic(), row_folder(plan, at)
    passes = min(round(1 / plan.label_fraction), PASSES)
    finetune = {**at.tier.finetune, "label_fraction": plan.label_fraction, "local_epochs": passes}
    stages = [{"kind": "finetune", **finetune}]
    scratch = without_pretraining(_study(plan, at.tier, "finetune", stages, "random"), keep_init=False)
    cohort = dataset(plan.dataset, plan.split, scratch, at)
    more = dataset(OUTSIDE[plan.dataset], "none", scratch, at) if plan.init == "outside" else None
    found = []
    for name, team in _teams(plan, cohort, folder).items():
        study = scratch
        if plan.method != "scratch":
            study = _study(plan, at.tier, "finetune", stages, _pretrained(plan, name, team, more, at))
        tensors = train_row(study, team, folder / name, at.listen, at.progress)
        if (scores := classify(study, tensors, _sites(plan, cohort, folder))) is None:
            raise CohortError(f"{plan.dataset} has too few labelled test patients", "use the dataset as published")
        found.append(scores)
    values = {metric: float(np.mean([getattr(scores, metric) for scores in found])) for metric in METRICS}
    ends = {
        metric: [getattr(found[0], f"{metric}_{end}", None) if len(found) == 1 else None for end in ("low", "high")]
        for metric in METRICS
    }
    metrics = {metric: [value, *ends[metric]] for metric, value in values.items()}
    return {"metrics": metrics, "seconds": round(time.monotonic() - started, 1)}


def _sites(plan: Plan, cohort: Cohort, folder: Path) -> dict[str, Site]:
    """Who holds the dataset: one site that has all of it, or several that it is dealt to."""
    if plan.regime == "central":
        return {"central": Site("central", cohort, folder / "sites" / "central")}
    parts = partition(cohort, PARTS, Dirichlet(kind="dirichlet", alpha=ALPHA), seed_for(plan.seed, "partition"))
    dealt = {f"site-{number}": cohort.select(part) for number, part in enumerate(parts, start=1)}
    return {name: Site(name, part, folder / "sites" / name) for name, part in dealt.items()}


def _teams(plan: Plan, cohort: Cohort, folder: Path) -> dict[str, dict[str, Site]]:
    """Who trains together: {name of the team: its sites}."""
    sites = _sites(plan, cohort, folder)
    if plan.regime == "alone":
        return {name: {name: site} for name, site in sites.items()}
    if plan.regime == "pooled":
        return {"pooled": {"pooled": pool(sites, folder / "sites" / "pooled")}}
    return {plan.regime: sites}


def _pretrained(plan: Plan, name: str, team: Mapping[str, Site], more: Cohort | None, at: Workshop) -> str:
    """The encoder file of a team's pretraining, on its training patients and, with init = "outside", on `more`."""
    folder = at.folder / "pretrained" / _shared(plan) / name
    study = _study(plan, at.tier, "pretrain", pretraining(plan, at.tier), "random")
    _clear_others(folder, study, plan, at)
    if not (file := folder / "encoder.safetensors").exists():
        if more is not None:
            team = {site: replace(member, cohort=union([member.cohort, more])) for site, member in team.items()}
        tensors = train_row(study, team, folder, at.listen, at.progress, evaluate=True)
        save_encoder(file, encoder_of(study, tensors), study)
        tidy(folder)
    return str(file)


def _held_out(plan: Plan, at: Workshop) -> dict[str, Any]:
    """A row of the protocol that leaves each hospital out in turn; the first row that is asked for runs it all."""
    out = at.folder / "holdout" / f"{at.named(plan.init, plan)}-{plan.seed}"
    study = protocol_study(plan, at)
    _clear_others(out, study, plan, at)
    protocol = partial(leave_one_site_out, study, out, at.data, at.folder / "state", resume=out.exists())
    try:
        protocol(listen=at.listen, reading=at.reading, progress=at.progress)
    except (CheckpointError, StudyError) as error:
        error.fix = f"delete {out}, or what is damaged in it"
        raise
    table = pd.read_csv(out / "holdout.csv")
    here = plan.split == "site"
    row = table[
        (table["held_out"] == plan.dataset.removeprefix("without "))
        & (table["start"] == STARTS[plan.method])
        & (table["scope"] == ("held-out" if here else "in-distribution"))
        & (table["label_fraction"] == (plan.label_fraction if here else 0.0))
    ]
    if row.empty:
        return {"metrics": {}, "seconds": 0.0}
    values = {name: float(value) for name, value in row.iloc[0].items() if name in _FIGURES or name == "seconds"}
    metrics = {name: [values[name], *(values.get(f"{name}_{end}") for end in ("low", "high"))] for name in METRICS}
    return {"metrics": metrics, "seconds": values["seconds"]}


def protocol_study(plan: Plan, at: Workshop) -> Study:
    """The study of table 4, of a seed and what it starts from.

    Raises:
        Refused: it starts from supervised weights, and none are given.
    """
    wanted = replace(plan, method="simclr", label_fraction=1.0)
    stages = [*pretraining(wanted, at.tier), {"kind": "finetune", **at.tier.finetune}]
    plain = _study(wanted, at.tier, "holdout", stages, "random").model_dump(mode="json")
    if plan.init == "supervised":
        if at.weights is None:
            raise Refused(f"{plan.name} starts from supervised weights", "give their file: --init FILE")
        plain["encoder"]["init"] = at.weights.model_dump(mode="json")
    sites = {"site": [{"name": name, "cohort": name} for name in HOSPITALS]}
    return resolve({**plain, "simulation": sites})


def _clear_others(run: Path, study: Study, plan: Plan, at: Workshop) -> None:
    """Remove what is no run of `study`: other settings made it, or it was damaged."""
    with suppress(StudyError):
        if same(RunDir(run).study, study):
            return
    if run.exists():
        _warn(at, f"{plan.name} is made anew: what is there is of other settings")
        shutil.rmtree(run)


def _study(plan: Plan, tier: Tier, kind: str, stages: list[dict[str, Any]], init: str) -> Study:
    """The study of one part of a row; read from a file where it starts from an encoder, whose hash it then holds."""
    encoder = {**tier.encoder, "context": plan.method == "mlvicx"}
    dataset = plan.dataset.removeprefix("without ")
    if init != "random":
        encoder["init"] = {"file": init, "family": "polyclinic"}
    return _with_weights(
        {
            "study": {"name": f"papers-{kind}", "seed": plan.seed},
            "images": {**tier.images, "channels": CHANNELS.get(dataset, 1)},
            "encoder": encoder,
            "stages": stages,
            "evaluation": {
                "labels": CHEST if plan.table == 4 else LABELS[dataset],
                "split": "column" if plan.split == "published" else "patient",
                "rows": [],
                "every": 0,
            },
            "aggregation": {"min_sites": 1},
            "compute": {"threads": tier.threads},
        },
        init,
    )


def _with_weights(plain: dict[str, Any], init: str) -> Study:
    if init == "random":
        return resolve(plain)
    path = Path(init).with_name("finetune.toml")
    write_atomic(path, resolve(plain).to_toml())
    return load_study(path)
