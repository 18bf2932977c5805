"""A run directory as a reader finds it: finished or not, whole or torn."""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from polyclinic.report.words import ALONE
from polyclinic.study import Study, load_study

Points = list[tuple[int, float]]
"""(round, value), ascending."""

FIGURES = ("auc", "balanced_accuracy")
INTERVAL = ("auc_low", "auc_high")
ASIDE = {"run_stopped", "warning"}
"""Events that may come between two attempts at a run."""


@dataclass(frozen=True)
class Run:
    """What stands in the files of a run; those that are not there yet are empty.

    Attributes:
        metrics: {metric: {site: points}}; site "" is the consortium. Values that are not finite are left out.
        seats: patients that each enrolled site was counted with.
    """

    path: Path
    study: Study
    summary: dict[str, Any]
    metrics: dict[str, dict[str, Points]]
    events: list[dict[str, Any]]
    cards: dict[str, Any]
    seats: dict[str, int]
    embedding: list[dict[str, str]]

    @property
    def finished(self) -> bool:
        """Has the run been summed up?"""
        return bool(self.summary)

    @cached_property
    def sites(self) -> dict[str, dict[str, int]]:
        """{site: {"patients", "images"}}, by name; of an unfinished run, as far as it is known."""
        if self.summary.get("sites"):
            return dict(sorted(self.summary["sites"].items()))
        names = set(self.seats) | {site for sites in self.metrics.values() for site in sites if site}
        names |= {site for event in self.events for site in event.get("sites", [])}
        return {name: {"patients": self.seats[name]} if name in self.seats else {} for name in sorted(names)}

    @cached_property
    def rounds_done(self) -> int:
        """Rounds that have closed."""
        return max((event.get("round", 0) for event in self.happened("round_closed")), default=0)

    @cached_property
    def stopped(self) -> dict[int, int]:
        """{stage: the round of it after which it was stopped early}, both as the study counts them, rounds from 1."""
        early = {e["stage"]: self.study.stage_of(e["round"] - 1)[1] + 1 for e in self.happened("stopped_early")}
        return early | self._unaffordable

    @property
    def _unaffordable(self) -> dict[int, int]:
        """The same for the stages of a study that ended as its epsilon was spent; of a later one, no round was made."""
        if not (ends := self.happened("epsilon_spent")):
            return {}
        left, made = ends[-1]["round"], {}
        for number, stage in enumerate(self.study.stages):
            made[number] = min(left, stage.rounds)
            left -= made[number]
        return {number: rounds for number, rounds in made.items() if rounds < self.study.stages[number].rounds}

    @cached_property
    def epsilon(self) -> dict[str, float]:
        """{site: what the study has spent there, at its delta}; empty without differential privacy."""
        if self.study.privacy.mode == "none":
            return {}
        spent = self.metrics.get("epsilon", {})
        return {site: max(value for _, value in points) for site, points in spent.items() if site}

    @property
    def attempts(self) -> int:
        """How often it was begun or gone on with."""
        return len(self.happened("run_started")) + len(self.happened("run_resumed"))

    @property
    def seconds(self) -> float:
        """Of all attempts, each from its start to its last event: not of the pauses between them."""
        begins = {"cohorts_read"} if self.happened("cohorts_read") else {"run_started", "run_resumed"}
        spent = [0.0]
        began: float | None = None
        for event in (event for event in self.events if event.keys() >= {"event", "time"}):
            name, now = event["event"], datetime.fromisoformat(event["time"]).timestamp()
            if name in begins:
                spent.append(event.get("seconds", 0.0))  # a cohort is read before that is told
                began = now - spent[-1]
            elif name == "submitted":  # what ends before it begins is no attempt
                began = None
            elif began is not None and name not in ASIDE:
                spent[-1] = now - began
        return sum(spent)

    @cached_property
    def comparison(self) -> dict[str, dict[str, float]]:
        """The rows whose figures are all finite, in reading order: floors, sites, federated, pooled.

        One whose interval nobody could measure, as across a network, is without `auc_low` and `auc_high`.
        """
        found = {
            name: {figure: value for figure in (*FIGURES, *INTERVAL) if (value := row.get(figure)) is not None}
            for name, row in self.summary.get("comparison", {}).items()
        }
        rows = {name: row for name, row in found.items() if _whole(row)}
        order = ["random", "pixels", ALONE, "scratch", "init", "federated", "pooled"]
        return dict(sorted(rows.items(), key=lambda item: (_place(item[0], order), item[0])))

    @property
    def alone(self) -> dict[str, dict[str, float]]:
        """The rows of single sites."""
        return {name: row for name, row in self.comparison.items() if name.startswith(ALONE)}

    @property
    def mean_alone(self) -> float | None:
        """Mean AUC of the single sites."""
        areas = [row["auc"] for row in self.alone.values()]
        return sum(areas) / len(areas) if areas else None

    def happened(self, event: str) -> list[dict[str, Any]]:
        """The events of one name, in order."""
        return [e for e in self.events if e.get("event") == event]

    def total(self, metric: str) -> Points:
        """Sum over sites, by round."""
        sums: dict[int, float] = defaultdict(float)
        for site, points in self.metrics.get(metric, {}).items():
            for round, value in points:
                sums[round] += value if site else 0.0
        return sorted(sums.items())


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        StudyError: it holds no readable study.toml.
    """
    return Run(
        path=path,
        study=load_study(path / "study.toml"),
        summary=_json(path / "summary.json"),
        metrics=_metrics(path / "metrics.csv"),
        events=_events(path / "events.jsonl"),
        cards=_json(path / "report" / "cards.json"),
        seats=_json(path / "seats.json"),
        embedding=[row for row in _table(path / "report" / "embedding.csv") if _number(row["x"]) and _number(row["y"])],
    )


def _place(row: str, order: list[str]) -> int:
    return next((k for k, start in enumerate(order) if row.startswith(start)), len(order))


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row of the comparison has all its figures, each finite, with its interval or without."""
    return all(map(_finite, row.values())) and row.keys() in ({*FIGURES}, {*FIGURES, *INTERVAL})


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or ""))
    except ValueError:
        return False


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file: the last may be torn."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _metrics(path: Path) -> dict[str, dict[str, Points]]:
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in _table(path):
        if _number(row["value"]) and row["round"].isdecimal():
            values[row["metric"]][row["site"]][int(row["round"])] = float(row["value"])
    return {
        metric: {site: sorted(points.items()) for site, points in sorted(sites.items())}
        for metric, sites in values.items()
    }


def _events(path: Path) -> list[dict[str, Any]]:
    """The events that can be read: the line being written may be torn."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        events += [event] if isinstance(event, dict) else []
    return events
