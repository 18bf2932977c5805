"""Train and score one row of a table; what an earlier attempt finished is read back."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyclinic.artifacts import save_encoder
from polyclinic.cohort import Cohort, build_cohort, union
from polyclinic.errors import CohortError
from polyclinic.files import atomic, write_atomic
from polyclinic.model import encoder_of
from polyclinic.study import Study, load_study, resolve
from polyclinic_client.site import Site
from polyclinic_client.work import Progress
from polyclinic_server.rundir import Listener
from polyclinic_simulations.compare import classify, train_row, without_pretraining
from polyclinic_simulations.papers.plans import LABELS, OUTSIDE, Plan, Tier, pretraining

BORDER = 0.15
"""Width of the rim that the border-only control sees, fraction of the side: no lung reaches it."""
METRICS = ("auc", "accuracy", "balanced_accuracy", "ece")

Reading = Callable[[str, int, int], None]


def run_plan(
    plan: Plan, tier: Tier, data: Path, work: Path, reading: Reading, listen: Listener | None, progress: Progress | None
) -> dict[str, Any]:
    """{"metrics": {metric: [value, low, high]}, "seconds": s} of a row.

    Args:
        data: the folder that holds the datasets.
        work: where cohorts, encoders and finished rows are kept.

    Raises:
        CohortError: a dataset is missing, or its test patients cannot be scored.
    """
    kept = work / "rows" / plan.name / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    started = time.monotonic()
    stages = [{"kind": "finetune", **tier.finetune}]
    study = without_pretraining(_study(plan, tier, "finetune", stages, "random"), keep_init=False)
    cohort = dataset(plan.dataset, plan.split, data, study, work, reading)
    if plan.method != "scratch":
        weights = _pretrained(plan, tier, cohort, data, work, reading, listen, progress)
        study = _study(plan, tier, "finetune", stages, weights)
    sites = {"central": Site("central", cohort, kept.parent)}
    scores = classify(study, train_row(study, sites, kept.parent, listen, progress), sites)
    if scores is None:
        raise CohortError(f"{plan.dataset} has too few labelled test patients", "use the dataset as it was published")
    metrics = {
        name: [getattr(scores, name), getattr(scores, f"{name}_low", None), getattr(scores, f"{name}_high", None)]
        for name in METRICS
    }
    result = {"metrics": metrics, "seconds": round(time.monotonic() - started, 1)}
    write_atomic(kept, json.dumps(result))
    return result


def _pretrained(
    plan: Plan,
    tier: Tier,
    cohort: Cohort,
    data: Path,
    work: Path,
    reading: Reading,
    listen: Listener | None,
    progress: Progress | None,
) -> str:
    """The encoder file of a row's pretraining, on the row's training patients and, with init = "outside", on more."""
    name = replace(plan, table=0, label_fraction=1.0).name
    folder = work / "pretrained" / name
    study = _study(plan, tier, "pretrain", [pretraining(plan, tier)], "random")
    if not (file := folder / "encoder.safetensors").exists():
        if plan.init == "outside":
            cohort = union([cohort, dataset(OUTSIDE[plan.dataset], "none", data, study, work, reading)])
        site = Site("central", cohort, folder)
        tensors = train_row(study, {"central": site}, folder, listen, progress)
        save_encoder(file, encoder_of(study, tensors), study)
    return str(file)


def _study(plan: Plan, tier: Tier, kind: str, stages: list[dict[str, Any]], init: str) -> Study:
    """The study of one part of a row; read from a file where it starts from an encoder, whose hash it then holds."""
    encoder = {**tier.encoder, "context": plan.method == "mlvicx"}
    if init != "random":
        encoder["init"] = {"file": init, "family": "polyclinic"}
    return _with_weights(
        {
            "study": {"name": f"papers-{kind}", "seed": plan.seed},
            "images": tier.images,
            "encoder": encoder,
            "stages": stages,
            "evaluation": {
                "labels": LABELS[plan.dataset],
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


def dataset(name: str, split: str, data: Path, study: Study, work: Path, reading: Reading) -> Cohort:
    """A dataset as a cohort.

    `split` "document" regroups covid-ct's patients by the document that their slices were printed in, so that no
    document is on both sides; a dataset whose name ends in "-border" has everything but the rim blackened.
    """
    folder = data / name.removesuffix("-border")
    if not folder.exists():
        raise CohortError(f"the dataset is not there: {folder}", "give the folder of all datasets as --data")
    if split == "document":
        folder = by_document(folder, work / "by-document" / name)
    cohort = build_cohort(folder, study.images, work / "state", progress=lambda done, total: reading(name, done, total))
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


def as_table(rows: dict[Plan, dict[str, Any]], machine: str) -> pd.DataFrame:
    """papers.csv: one line a row and metric."""
    lines = [
        {**asdict(plan), "metric": metric, "value": value, "low": low, "high": high}
        | {"seconds": result["seconds"], "machine": machine}
        for plan, result in rows.items()
        for metric, (value, low, high) in result["metrics"].items()
    ]
    return pd.DataFrame(lines)
