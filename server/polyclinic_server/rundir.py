"""A run directory as the coordinator writes it: study, events, metrics, checkpoints."""

import csv
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.files import storage, write_atomic
from polyclinic.study import Study, load_study

Listener = Callable[[dict[str, Any]], None]

REGISTERED = "registered.json"
"""In a deployed run's directory: {site: the node that its key is registered as}, written as the run is submitted."""
ENDED = ("run_reported", "run_failed", "run_stopped")
"""Last events of a deployed run that is not to be run again."""
COLUMNS = ["stage", "round", "site", "metric", "value"]


class RunDir:
    """The files of one run. Metrics of a round stand before its checkpoint does, so none goes missing in a crash."""

    def __init__(self, path: Path, listen: Listener | None = None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._listen = listen
        self._measured: set[tuple[str, ...]] = set()
        self._told = False

    def create(self, study: Study) -> None:
        """Make the directory with the resolved study in it."""
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "study.toml", study.to_toml())

    @property
    def study(self) -> Study:
        """The study as resolved."""
        return load_study(self.path / "study.toml")

    def event(self, name: str, **facts: Any) -> None:
        """Append an event, and tell whoever listens."""
        if not self._told:
            _drop_torn_line(self.path / "events.jsonl")
            self._told = True
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **facts}
        with storage(self.path), (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._listen:
            self._listen(line)

    def rewind(self, round: int) -> None:
        """Forget the metrics of rounds after `round`: they will be made again. Called once, before any metric.

        Those of `round` itself may be measured again, and only they are kept in memory.
        """
        path = self.path / "metrics.csv"
        _drop_torn_line(path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        kept = [row for row in list(csv.reader(text.splitlines()))[1:] if int(row[1]) <= round]
        self._measured = {tuple(row[:4]) for row in kept if int(row[1]) == round}
        write_atomic(path, "".join(",".join(row) + "\n" for row in [COLUMNS, *kept]))

    def metrics(self, stage: int, round: int, site: str, values: Mapping[str, float]) -> None:
        """Append metrics; those that already stood when the run was resumed are left as they are."""
        rows = [(str(stage), str(round), site, metric, repr(float(value))) for metric, value in values.items()]
        fresh = [row for row in rows if row[:4] not in self._measured]
        with storage(self.path), (self.path / "metrics.csv").open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(fresh)


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill or a full disk has left without its end."""
    data = path.read_bytes() if path.exists() else b""
    if not data.endswith(b"\n") and data:
        os.truncate(path, data.rfind(b"\n") + 1)


def last_event(run: Path) -> str:
    """The name of the newest event of a run directory; "" before any."""
    try:
        lines = (run / "events.jsonl").read_bytes().splitlines()
        return str(json.loads(lines[-1])["event"]) if lines else ""
    except (OSError, ValueError, KeyError):
        return ""
