"""The run directory: what is appended survives a torn line, and a resumed run holds no round twice."""

import errno
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import StorageError
from polyclinic_server.rundir import RunDir

from ..tiny import events, measured, open_run, tiny_study


def test_holds_the_study_as_resolved(tmp_path: Path) -> None:
    study = tiny_study()
    assert open_run(tmp_path / "deep" / "run", study).study == study


def test_events_are_lines_of_json_and_are_told(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    run = RunDir(tmp_path, heard.append)
    run.event("run_started", study="ä\n\x1b[31m")
    run.event("round_started", round=1)
    assert events(run) == heard
    assert [line["event"] for line in heard] == ["run_started", "round_started"]
    assert (tmp_path / "events.jsonl").read_text().isascii()


def test_metrics_stand_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.rewind(0)
    run.metrics(0, 1, "north", {"loss": 0.1, "images": 3})
    resumed = RunDir(tmp_path)
    resumed.rewind(1)
    resumed.metrics(0, 1, "north", {"loss": 0.2, "patients": 2})
    resumed.metrics(0, 1, "", {"loss": 1 / 3})
    assert measured(run) == [
        ("0", "1", "", "loss", repr(1 / 3)),
        ("0", "1", "north", "images", "3.0"),
        ("0", "1", "north", "loss", "0.1"),
        ("0", "1", "north", "patients", "2.0"),
    ]
    assert (tmp_path / "metrics.csv").read_text().startswith("stage,round,site,metric,value\n")


def test_metrics_are_not_held_in_memory(tmp_path: Path) -> None:
    """Those of a thousand sites over fifty rounds would take 60 MB."""

    def kept(rounds: range) -> int:
        for round in rounds:
            for site in range(100):
                run.metrics(0, round, f"site-{site}", {"loss": 0.1, "seconds": 2.0})
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        run = RunDir(tmp_path)
        run.rewind(0)
        before = kept(range(1, 3))
        assert kept(range(3, 9)) - before < 50_000
        run = RunDir(tmp_path)
        run.rewind(8)
        assert tracemalloc.get_traced_memory()[0] - before < 100_000  # of one round, not of eight
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("torn", ["", "1", "0,3,no", "0,3,north,loss,0.", '"0,3'])
def test_a_rewound_run_forgets_later_rounds_and_torn_lines(torn: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.rewind(0)
    for round in (1, 2, 3):
        run.metrics(0, round, "north", {"loss": float(round)})
        run.event("round_closed", round=round)
    for name in ("metrics.csv", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(torn)
    resumed = RunDir(tmp_path)
    resumed.rewind(2)
    assert [row[1] for row in measured(resumed)] == ["1", "2"]
    resumed.metrics(0, 2, "north", {"loss": 9.0})
    resumed.metrics(0, 3, "north", {"loss": 3.5})
    resumed.event("run_resumed")
    assert [row[4] for row in measured(resumed)] == ["1.0", "2.0", "3.5"]
    assert [line["event"] for line in events(resumed)] == ["round_closed"] * 3 + ["run_resumed"]


def test_events_are_only_ever_appended_to(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("run_started")
    file = (tmp_path / "events.jsonl").stat().st_ino
    RunDir(tmp_path).rewind(0)
    run.event("run_resumed")
    assert (tmp_path / "events.jsonl").stat().st_ino == file  # who follows the file sees the new line
    assert len(events(run)) == 2


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError):
        run.event("run_started")
    with pytest.raises(StorageError):
        run.metrics(0, 1, "", {"loss": 1.0})
    with pytest.raises(StorageError):
        run.rewind(0)
