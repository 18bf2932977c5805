"""What a run directory tells of its run while that goes on, and of each site's part in it.

The report reads the same files and more; it loads torch, and this is read every second.
"""

import csv
import json
import math
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from polyclinic.study import load_study
from polyclinic_server.rundir import ENDED

STATES = {
    "launched": "waiting",
    "submitted": "starting",
    "run_started": "running",
    "run_resumed": "running",
    "run_finished": "reporting",
    "run_interrupted": "interrupted",
    "run_failed": "failed",
    "run_stopped": "stopped",
    "run_reported": "finished",
}
"""Of a run, by the last of these events. An interrupted one goes on by itself."""
TROUBLE = {"update_refused": "left out: {reason}", "site_lost": "gone: {reason}", "site_missing": "was not there"}
EVENTS, METRICS = "events.jsonl", "metrics.csv"
RECENT = 5
"""Rounds whose median says how long the next will take."""

Event = dict[str, Any]
Points = list[tuple[int, float]]
"""(round, value), ascending."""


@dataclass(frozen=True)
class Records:
    """The events of a run, all and by site; {(site, metric): [(stage, round, value)]}, site "" being the consortium."""

    events: list[Event]
    told: dict[str, list[Event]]
    metrics: dict[tuple[str, str], list[tuple[int, int, float]]]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        state: a value of STATES; `problem` and `fix` say why it was interrupted or has failed.
        round: the last that has closed, of `rounds`; `at_work` is the one in flight.
        stage: of the round that is next or in flight, a place in `stages`: (method, rounds).
        losses: the consortium's, by stage: losses of different methods do not compare.
        probe: AUC of the sites' own linear probes, mean weighted by patients.
        round_s, left_s: seconds that a round takes, and that all that are left will.
    """

    name: str
    study: str
    hash: str
    state: str
    round: int
    rounds: int
    at_work: int | None
    stage: int
    stages: list[tuple[str, int]]
    losses: list[Points]
    probe: Points
    round_s: float | None
    left_s: float | None
    problem: str | None
    fix: str | None

    @property
    def ended(self) -> bool:
        """It does not go on."""
        return self.state in {STATES[event] for event in ENDED}


@dataclass(frozen=True)
class Part:
    """A site's part in a run; None: not known.

    Attributes:
        approved: whether the study may run there, as the site says.
        clock_ahead_s: of the coordinator's clock, when the site last said who it is.
        accepted: rounds whose update was accepted.
        trouble: the last refusal or absence, with its round and reason.
        bytes_sent, bytes_received: by the site, as tensors.
        epsilon: spent in this run; None without differential privacy.
    """

    version: str | None
    approved: bool | None
    clock_ahead_s: float | None
    accepted: list[int]
    trouble: str | None
    bytes_sent: int
    bytes_received: int
    epsilon: float | None


def records(run: Path) -> Records:
    """What stands in a run's files so far, read again only when one of them has grown."""
    return _read(run, *(path.stat().st_size if path.exists() else 0 for path in (run / EVENTS, run / METRICS)))


@lru_cache(maxsize=1)
def _read(run: Path, *sizes: int) -> Records:
    """What cannot be read, as a full disk leaves it, is passed over."""
    found = Records([], defaultdict(list), defaultdict(list))
    for line in _whole_lines(run / EVENTS):
        with suppress(ValueError):
            found.events.append(event := json.loads(line))
            found.told[event.get("site", "")].append(event)
    for row in csv.DictReader(_whole_lines(run / METRICS)):
        with suppress(ValueError, TypeError):
            if math.isfinite(value := float(row["value"])):
                found.metrics[row["site"], row["metric"]].append((int(row["stage"]), int(row["round"]), value))
    return found


def _whole_lines(path: Path) -> list[str]:
    """Without the last, where that is still being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def progress(path: Path) -> Run:
    """What is known of a run.

    Raises:
        StudyError: its study cannot be read.
    """
    study, found = load_study(path / "study.toml"), records(path)
    told = [e for e in found.events if e["event"] in STATES] or [{"event": "launched"}]
    last = next((e for e in told if e["event"] in ENDED), told[-1])  # what has ended may still be killed
    state = STATES[last["event"]]
    turns = [e for e in found.events if e["event"] in ("run_resumed", "round_started", "round_closed")]
    closed = next((e["round"] for e in reversed(turns) if e["event"] != "round_started"), 0)
    in_flight = state == "running" and turns and turns[-1]["event"] == "round_started"
    at_work = turns[-1]["round"] if in_flight else None
    times = [e["seconds"] for e in found.events if e["event"] == "round_closed"][-RECENT:]
    losses = found.metrics.get(("", "loss"), [])
    return Run(
        name=path.name,
        study=study.name,
        hash=study.hash,
        state=state,
        round=closed,
        rounds=study.rounds,
        at_work=at_work,
        stage=study.stage_of(min(at_work or closed + 1, study.rounds) - 1)[0],
        stages=[(stage.method, stage.rounds) for stage in study.stages],
        losses=[[(r, v) for s, r, v in losses if s == stage] for stage in range(len(study.stages))],
        probe=[(r, v) for _, r, v in found.metrics.get(("", "probe_auc"), [])],
        round_s=median(times) if times else None,
        left_s=median(times) * (study.rounds - closed) if times and last["event"] not in ENDED else None,
        problem=last.get("problem"),
        fix=last.get("fix"),
    )


def part(site: str, found: Records) -> Part:
    """A site's part in the run whose records these are."""
    told = found.told.get(site, [])
    introduced = next((e for e in reversed(told) if e["event"] == "site_found"), {})
    approved = [e.get("approved", True) for e in told if e["event"] in ("site_found", "update_accepted")]
    trouble = next((e for e in reversed(told) if e["event"] in TROUBLE), None)
    sent, received, epsilon = (
        [value for _, _, value in found.metrics.get((site, name), [])] for name in ("bytes_up", "bytes_down", "epsilon")
    )
    return Part(
        version=introduced.get("version"),
        approved=approved[-1] if approved else None,
        clock_ahead_s=introduced.get("clock_ahead_s"),
        accepted=sorted({e["round"] for e in told if e["event"] == "update_accepted"}),
        trouble=_words(trouble) if trouble else None,
        bytes_sent=int(sum(sent)),
        bytes_received=int(sum(received)),
        epsilon=epsilon[-1] if epsilon else None,
    )


def _words(trouble: Event) -> str:
    when = f"round {trouble['round']}" if trouble["round"] else "at the start"
    return f"{when}: {TROUBLE[trouble['event']].format(**trouble)}"
