"""What happens in a run that another process makes: read from its directory, which all of them share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyclinic_simulations.compare import row_folder

EVENTS = "events.jsonl"


class Follower:
    """The events of a run that come after this was made."""

    def __init__(self, run: Path) -> None:
        self._run, self._row = run, ""
        self._read = {path: _whole(path.read_bytes()) for path in [*run.glob(EVENTS), *run.glob(f"rows/*/{EVENTS}")]}

    def new(self) -> Iterator[dict[str, Any]]:
        """Those since it was last asked, as they stand in events.jsonl; of the row that trains, with its name."""
        for event in self._lines(self._run / EVENTS):
            if event["event"] == "row_started":
                self._row = event["row"]
            yield event
        if self._row:
            for event in self._lines(row_folder(self._run, self._row) / EVENTS):
                yield {**event, "row": self._row}

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        start = self._read.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(start)
                text = file.read()
        except FileNotFoundError:  # not begun yet, or tidied up already
            return
        end = _whole(text)
        self._read[path] = start + end
        yield from map(json.loads, text[:end].splitlines())


def _whole(text: bytes) -> int:
    """Where the last whole line ends: what follows is being written, or was left by a kill and will be cut off."""
    return text.rfind(b"\n") + 1
