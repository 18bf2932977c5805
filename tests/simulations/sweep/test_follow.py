"""What another process notes in a run directory arrives here: once, whole, and with the row it is of."""

import json
from pathlib import Path

from polyclinic_server.rundir import RunDir
from polyclinic_simulations.compare import row_folder
from polyclinic_simulations.sweep.follow import Follower


def test_events_come_once_from_where_it_began_and_rows_with_their_names(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("run_started", rounds=2)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "torn by a ki')
    folder = row_folder(tmp_path, "alone:site-1")
    folder.mkdir(parents=True)
    RunDir(folder).event("run_started", rounds=2)  # by an earlier attempt
    follower = Follower(tmp_path)
    assert list(follower.new()) == []
    again = RunDir(tmp_path)
    again.event("run_resumed", round=1, rounds=2)
    again.event("row_started", row="alone:site-1", made=0, rows=1)
    RunDir(folder).event("round_closed", round=1)
    heard = [(event["event"], event.get("row")) for event in follower.new()]
    assert heard == [("run_resumed", None), ("row_started", "alone:site-1"), ("round_closed", "alone:site-1")]
    assert list(follower.new()) == []


def test_half_a_line_waits_for_its_other_half_and_a_folder_that_is_gone_says_nothing(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "run")
    assert list(follower.new()) == []
    (tmp_path / "run").mkdir()
    path, line = tmp_path / "run" / "events.jsonl", json.dumps({"event": "row_started", "row": "pooled"}) + "\n"
    path.write_text(line[:9])
    assert list(follower.new()) == []
    path.write_text(line)
    assert [event["event"] for event in follower.new()] == ["row_started"]
    path.unlink()
    assert list(follower.new()) == []
