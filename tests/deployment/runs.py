"""What a run directory tells of how the run went, while it goes on and once it has ended."""

import csv
import json
from pathlib import Path
from typing import Any

from polyclinic.study import load_study

from .consortium import SITES
from .processes import until


def events(run: Path, name: str = "") -> list[dict[str, Any]]:
    """Those of a run, or those of one name; none before the first is whole."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if not name or event["event"] == name]


def finished(run: Path, patience_s: float = 280.0) -> list[dict[str, Any]]:
    """All events of a run, once it has ended well."""
    until(lambda: events(run, "run_reported") or events(run, "run_failed"), patience_s, "the run's end")
    assert not events(run, "run_failed"), events(run)
    return events(run)


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs have the same last checkpoint and export the same."""
    return _result(one) == _result(other)


def _result(run: Path) -> dict[str, bytes]:
    """{file: content} of what a run has come to."""
    last = f"round-{load_study(run / 'study.toml').rounds:04d}"
    files = [*run.glob("*.safetensors"), *(run / "checkpoints" / f"{last}.{kind}" for kind in ("json", "safetensors"))]
    return {path.name: path.read_bytes() for path in files}


def figures(run: Path) -> dict[tuple[str, ...], str]:
    """{(stage, round, site, metric): value} of what the sites have said, and of their means, but for seconds."""
    return {row[:4]: row[4] for row in _rows(run) if row[3] != "seconds"}


def each_round_once(run: Path) -> bool:
    """Every site's and the consortium's loss of each round of each stage, and no figure twice."""
    study = load_study(run / "study.toml")
    keys = [row[:4] for row in _rows(run)]
    losses = {key[:3] for key in keys if key[3] == "loss"}
    due = {(str(study.stage_of(r)[0]), str(r + 1), site) for r in range(study.rounds) for site in ("", *SITES)}
    return len(keys) == len(set(keys)) and losses == due


def _rows(run: Path) -> list[tuple[str, ...]]:
    """(stage, round, site, metric, value) of each."""
    return [tuple(row) for row in csv.reader((run / "metrics.csv").read_text().splitlines()[1:])]
