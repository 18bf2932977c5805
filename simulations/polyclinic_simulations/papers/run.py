"""Train and score one row of a table; what an earlier attempt finished is read back."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyclinic.artifacts import save_encoder
from polyclinic.cohort import Cohort, build_cohort, union
from polyclinic.errors import CheckpointError, CohortError, Refused, StudyError
from polyclinic.files import atomic, locked, write_atomic
from polyclinic.model import encoder_of
from polyclinic.seeding import seed_for
from polyclinic.simulation import Dirichlet
from polyclinic.study import Study, load_study, resolve
from polyclinic_client.site import Site
from polyclinic_client.work import Progress
from polyclinic_server.rundir import Listener
from polyclinic_simulations.compare import classify, train_row, without_pretraining
from polyclinic_simulations.consortium import pool
from polyclinic_simulations.holdout import leave_one_site_out
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
    plans,
    pretraining,
)
from polyclinic_simulations.partition import partition
from polyclinic_simulations.tidy import tidy

BORDER = 0.15
"""Width of the rim that the border-only control sees, fraction of the side: no lung reaches it."""
PASSES = 4
"""Local epochs of fine-tuning at most: of fewer labels as many more, or a few images would make a few steps."""
METRICS = ("auc", "accuracy", "balanced_accuracy", "ece")
PLAN_COLUMNS = [field.name for field in fields(Plan)]
_FIGURES = {f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")}

Reading = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workshop:
    """In which rows are made.

    Attributes:
        tier: how large, how long.
        data: the folder that holds the datasets.
        folder: where cohorts, encoders and finished rows are kept.
        machine: what makes the rows, in words; up to the first comma those of its tier, without which rows of two
            machines are no comparison.
        reading, listen, progress: are told of files, events and batches.
    """

    tier: Tier
    data: Path
    folder: Path
    machine: str = ""
    reading: Reading = lambda what, done, total: None
    listen: Listener | None = None
    progress: Progress | None = None


def finished(plan: Plan, at: Workshop) -> dict[str, Any] | None:
    """{"metrics": {metric: [value, low, high]}, "seconds": s, "machine": words} of a row that has been made, or None.

    It has no metrics where it cannot be measured.
    """
    kept = _kept(plan, at)
    return {"machine": at.machine, **json.loads(kept.read_text())} if kept.exists() else None


def run_plan(plan: Plan, at: Workshop) -> dict[str, Any] | None:
    """The same, of a row that is made now if it was not before; None while another process trains what it needs.

    Raises:
        CohortError: a dataset is missing, or its test patients cannot be scored.
    """
    lock, kept = at.folder / "locks" / _shared(plan), _kept(plan, at)
    lock.mkdir(parents=True, exist_ok=True)
    with locked(lock) as free:
        if free and not kept.exists():
            try:
                result = _made(plan, at)
            except (CheckpointError, StudyError) as error:
                _forget(plan, at, error.problem)
                result = _made(plan, at)
            _keep(kept, {**result, "machine": at.machine})
            tidy(kept.parent)
    return finished(plan, at)


def take_back(path: Path, workshops: Mapping[int, Workshop]) -> None:
    """Take the rows of a papers.csv for finished: they were made on another machine, or in a folder that is gone.

    Args:
        path: the table.
        workshops: by table.

    Raises:
        Refused: they were made with other settings, or are no whole rows of these tables.
    """
    fix = "give another folder as --out"
    known = {astuple(plan): plan for plan in plans()}
    try:
        table = pd.read_csv(path, dtype={"value": float, "low": float, "high": float, "seconds": float})
        for values, row in table.groupby(PLAN_COLUMNS, sort=False, dropna=False):
            at = workshops[known[values].table]
            tier = at.machine.partition(",")[0]
            [machine], [seconds] = row["machine"].unique(), row["seconds"].unique()
            if str(machine).partition(",")[0] != tier:
                raise Refused(f"{path} holds rows that are not of the {tier}: {machine}", fix)
            if sorted(row["metric"]) != sorted(METRICS) or row["value"].isna().any():
                raise ValueError(f"a row without its {len(METRICS)} metrics")
            ends = row[["value", "low", "high"]].astype(object).where(row[["value", "low", "high"]].notna(), None)
            metrics = dict(zip(row["metric"], ends.to_numpy().tolist(), strict=True))
            if finished(known[values], at) is None:
                _keep(_kept(known[values], at), {"metrics": metrics, "seconds": float(seconds), "machine": machine})
    except (ValueError, KeyError) as error:
        raise Refused(f"{path} is no table of such rows: {error}", fix) from error


def _keep(kept: Path, result: dict[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps(result))


def _kept(plan: Plan, at: Workshop) -> Path:
    return at.folder / "rows" / plan.name / "result.json"


def _made(plan: Plan, at: Workshop) -> dict[str, Any]:
    return _held_out(plan, at) if plan.table == 4 else _measured(plan, at, _kept(plan, at).parent)


def _forget(plan: Plan, at: Workshop, problem: str) -> None:
    """Remove what an earlier attempt left half made, by another version of the settings or with a damaged disk."""
    if at.listen is not None:
        at.listen({"event": "warning", "text": f"{plan.name} is made anew: {problem}"})
    halves = [_kept(plan, at).parent, *(at.folder / "pretrained" / _shared(plan)).glob("*")]
    halves += [_protocol(plan, at)] if plan.table == 4 else []
    for half in halves:
        if not (half / "encoder.safetensors").exists():
            shutil.rmtree(half, ignore_errors=True)


def _shared(plan: Plan) -> str:
    """Names what is trained for a row and others: the pretraining, or one run of the protocol of table 4."""
    return f"holdout-{plan.seed}" if plan.table == 4 else replace(plan, table=0, label_fraction=1.0).name


def _measured(plan: Plan, at: Workshop, folder: Path) -> dict[str, Any]:
    """The mean over those who train by themselves, each scored on all test patients; of one alone, its interval too."""
    started = time.monotonic()
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
    if not (file := folder / "encoder.safetensors").exists():
        study = _study(plan, at.tier, "pretrain", pretraining(plan, at.tier), "random")
        if more is not None:
            team = {site: replace(member, cohort=union([member.cohort, more])) for site, member in team.items()}
        tensors = train_row(study, team, folder, at.listen, at.progress)
        save_encoder(file, encoder_of(study, tensors), study)
        tidy(folder)
    return str(file)


def _protocol(plan: Plan, at: Workshop) -> Path:
    """The run of table 4 that a row is read from."""
    return at.folder / "holdout" / f"seed-{plan.seed}"


def _held_out(plan: Plan, at: Workshop) -> dict[str, Any]:
    """A row of the protocol that leaves each hospital out in turn; the first row that is asked for runs it all."""
    out = _protocol(plan, at)
    wanted = replace(plan, method="simclr", label_fraction=1.0)
    stages = [*pretraining(wanted, at.tier), {"kind": "finetune", **at.tier.finetune}]
    plain = _study(wanted, at.tier, "holdout", stages, "random").model_dump(mode="json")
    study = resolve({**plain, "simulation": {"site": [{"name": name, "cohort": name} for name in HOSPITALS]}})
    resume = (out / "study.toml").exists()
    leave_one_site_out(
        study,
        out,
        at.data,
        at.folder / "state",
        resume=resume,
        listen=at.listen,
        reading=at.reading,
        progress=at.progress,
    )
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


def dataset(name: str, split: str, study: Study, at: Workshop) -> Cohort:
    """A dataset as a cohort.

    `split` "document" regroups covid-ct's patients by the document that their slices were printed in, so that no
    document is on both sides; a dataset whose name ends in "-border" has everything but the rim blackened.
    """
    folder = at.data / name.removesuffix("-border")
    if not folder.exists():
        raise CohortError(f"the dataset is not there: {folder}", "give the folder of all datasets as --data")
    if split == "document":
        folder = by_document(folder, at.folder / "by-document" / name)
    told = partial(at.reading, name)
    cohort = build_cohort(folder, study.images, at.folder / "state", progress=told)
    if not name.endswith("-border"):
        return cohort
    images = cohort.pixels(slice(None)).numpy()
    rim = round(BORDER * images.shape[-1])
    images[:, :, rim:-rim, rim:-rim] = 0
    return replace(cohort, images=images, rows=np.arange(len(images)))


def by_document(folder: Path, to: Path) -> Path:
    """The same dataset with documents as patients, and all documents of a patient as one.

    `source_file` before its -p<digits> names a slice's document. Some patients stand in several, some documents show
    several patients: what hangs together stays together, or a patient would be on both sides.
    """
    table = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    table["patient"] = together(table["patient"].tolist(), [document(name) for name in table["source_file"]])
    for image in table["image"]:
        if not (to / image).exists():
            (to / image).parent.mkdir(parents=True, exist_ok=True)
            with atomic(to / image) as file:  # a cohort's files must lie in its folder
                file.write((folder / image).read_bytes())
    write_atomic(to / "labels.csv", table[["image", "label", "patient"]].to_csv(index=False))
    return to


def together(patients: Sequence[str], documents: Sequence[str]) -> list[str]:
    """The group of each image: images that share a patient or a document, directly or over others, are of one.

    >>> together(["a", "a", "b", "c"], ["x", "y", "y", "z"])
    ['group 0', 'group 0', 'group 0', 'group 3']
    """
    found = pd.Series(range(len(patients)))
    while True:
        merged = found.groupby(list(patients)).transform("min").groupby(list(documents)).transform("min")
        if merged.equals(found):
            return [f"group {number}" for number in found]
        found = merged


def document(source_file: str) -> str:
    """
    >>> document("2020.01.24.919183-p27-132.png"), document("12.jpg")
    ('2020.01.24.919183', '12')
    """
    found = re.match(r"(.+?)-p\d+", source_file)
    return found[1] if found else source_file.rpartition(".")[0]


def as_table(rows: dict[Plan, dict[str, Any]]) -> pd.DataFrame:
    """papers.csv: one line a row and metric."""
    lines = [
        {**asdict(plan), "metric": metric, "value": value, "low": low, "high": high}
        | {"seconds": result["seconds"], "machine": result["machine"]}
        for plan, result in rows.items()
        for metric, (value, low, high) in result["metrics"].items()
    ]
    return pd.DataFrame(lines, columns=[*PLAN_COLUMNS, "metric", "value", "low", "high", "seconds", "machine"])
