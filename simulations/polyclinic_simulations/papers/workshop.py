"""Where rows are made, and what is kept of them: their figures in a folder, and all of them in papers.csv."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from polyclinic.errors import Refused
from polyclinic.files import write_atomic
from polyclinic.study import Weights
from polyclinic_client.work import Progress
from polyclinic_server.rundir import Listener
from polyclinic_simulations.papers.plans import Plan, Tier, plans

METRICS = ("auc", "accuracy", "balanced_accuracy", "ece")
RESULT = "result.json"
PLAN_COLUMNS = [field.name for field in fields(Plan)]

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
        weights: what rows of init "supervised" start from; without it they cannot be made.
        reading, listen, progress: are told of files, events and batches.
    """

    tier: Tier
    data: Path
    folder: Path
    machine: str = ""
    weights: Weights | None = None
    reading: Reading = lambda what, done, total: None
    listen: Listener | None = None
    progress: Progress | None = None

    def weights_of(self, plan: Plan) -> str:
        """Names the weights that a row starts from, where a file's: others make another row."""
        return self.weights.sha256[:8] if self.weights and plan.init == "supervised" else ""

    def named(self, name: str, plan: Plan) -> str:
        """`name` for a folder of what is made from a row's weights."""
        return "-".join(filter(None, (name, self.weights_of(plan))))


def finished(plan: Plan, at: Workshop) -> dict[str, Any] | None:
    """{"metrics": {metric: [value, low, high]}, "seconds": s, "machine": words} of a row that has been made, or None.

    It has no metrics where it cannot be measured.
    """
    kept = row_folder(plan, at) / RESULT
    return {"machine": at.machine, **json.loads(kept.read_text())} if kept.exists() else None


def take_back(path: Path, workshops: Mapping[int, Workshop]) -> dict[Plan, dict[str, Any]]:
    """Take the rows of a papers.csv for finished: they were made on another machine, or in a folder that is gone.

    Args:
        path: the table.
        workshops: by table.

    Returns:
        What `finished` cannot find: the rows that start from weights which are not given.

    Raises:
        Refused: they were made with other settings, or are no whole rows of these tables.
    """
    fix = "give another folder as --out"
    known, others = {astuple(plan): plan for plan in plans()}, {}
    try:
        table = pd.read_csv(path, dtype={"value": float, "low": float, "high": float, "seconds": float})
        for values, row in table.groupby(PLAN_COLUMNS, sort=False, dropna=False):
            plan = known[values]
            at = workshops[plan.table]
            tier = at.machine.partition(",")[0]
            [machine], [seconds] = row["machine"].unique(), row["seconds"].unique()
            if str(machine).partition(",")[0] != tier:
                raise Refused(f"{path} holds rows that are not of the {tier}: {machine}", fix)
            if at.weights_of(plan) not in str(machine):
                raise Refused(f"{path} holds rows that start from other weights than --init: {machine}", fix)
            if sorted(row["metric"]) != sorted(METRICS) or row["value"].isna().any():
                raise ValueError(f"a row without its {len(METRICS)} metrics")
            ends = row[["value", "low", "high"]].astype(object).where(row[["value", "low", "high"]].notna(), None)
            metrics = dict(zip(row["metric"], ends.to_numpy().tolist(), strict=True))
            result = {"metrics": metrics, "seconds": float(seconds), "machine": machine}
            if plan.init == "supervised" and at.weights is None:
                others[plan] = result
            elif finished(plan, at) is None:
                keep(plan, result, at)
    except (ValueError, KeyError) as error:
        raise Refused(f"{path} is no table of such rows: {error}", fix) from error
    return others


def keep(plan: Plan, result: dict[str, Any], at: Workshop) -> None:
    """The inverse of `finished`."""
    folder = row_folder(plan, at)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULT, json.dumps(result))


def row_folder(plan: Plan, at: Workshop) -> Path:
    """Where a row trains, and keeps its figures."""
    return at.folder / "rows" / at.named(plan.name, plan)


def as_table(rows: dict[Plan, dict[str, Any]]) -> pd.DataFrame:
    """papers.csv: one line a row and metric."""
    lines = [
        {**asdict(plan), "metric": metric, "value": value, "low": low, "high": high}
        | {"seconds": result["seconds"], "machine": result["machine"]}
        for plan, result in rows.items()
        for metric, (value, low, high) in result["metrics"].items()
    ]
    return pd.DataFrame(lines, columns=[*PLAN_COLUMNS, "metric", "value", "low", "high", "seconds", "machine"])
