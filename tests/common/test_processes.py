"""Programs that are kept running: started again, stopped with their children, gone with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyclinic import processes
from polyclinic.processes import Program


def until(true: Callable[[], bool], patience_s: float = 20.0) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def program(tmp_path: Path, code: str) -> Program:
    return Program("test", lambda: [sys.executable, "-c", code], tmp_path / "log", {"MARK": "set"})


def test_what_ends_is_started_again_after_longer_and_longer_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SHORTEST_S", 0.05)
    kept = program(tmp_path, "import os; print(os.environ['MARK'], flush=True)")
    kept._wait_s = 0.05
    waits = []
    for _ in range(3):
        until(lambda: kept.tend() or kept.pid is not None)  # type: ignore[func-returns-value]
        until(lambda: kept.tend() or kept.pid is None)  # type: ignore[func-returns-value]
        waits.append(kept._wait_s)
    assert waits == [0.1, 0.2, 0.4]
    assert (tmp_path / "log").read_text().split() == ["set"] * 3


def test_stopping_ends_the_children_too(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    kept = program(tmp_path, code)
    kept.tend()
    until(lambda: bool((tmp_path / "log").exists() and (tmp_path / "log").read_text()))
    own, child = kept.pid, int((tmp_path / "log").read_text())
    assert own is not None and alive(own) and alive(child)
    kept.stop()
    assert kept.pid is None
    until(lambda: not alive(own) and not alive(child))


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    kept = program(tmp_path, code)
    kept.tend()
    until(lambda: bool((tmp_path / "log").exists() and (tmp_path / "log").read_text()))
    own = kept.pid
    kept.stop()
    assert own is not None and not alive(own)


KEEPER = """
import sys
from pathlib import Path
from polyclinic.processes import Program, keep_running
folder = Path(sys.argv[1])
kept = Program("sleeper", lambda: ["sleep", "60"], folder / "log", {})
def look():
    if kept.pid: (folder / "pid").write_text(str(kept.pid))
keep_running([kept], look, every_s=0.02)
print("ended well")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_programs_end_with_their_keeper_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, tmp_path], stdout=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    kept = int((tmp_path / "pid").read_text())
    assert alive(kept)
    os.kill(keeper.pid, number)
    said, _ = keeper.communicate(timeout=20)
    until(lambda: not alive(kept))
    assert said == ("" if number == signal.SIGKILL else "ended well\n")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_an_earlier_keeper_left_is_ended_and_nothing_of_this_one(tmp_path: Path) -> None:
    """In a container that was started again, the number that is noted may be that of a program beside."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=-3, start_new_session=True).pid)"
    left = int(subprocess.check_output([sys.executable, "-c", code]))
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as beside:
        for noted in (left, beside.pid):
            assert alive(noted)
            kept = Program("test", lambda: ["sleep", "60"], tmp_path / "log", {})
            kept._note.write_text(str(noted))
            kept.tend()
            kept.stop()
        until(lambda: not alive(left))
        assert beside.poll() is None
        beside.kill()


def test_a_long_log_begins_anew_and_one_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 10)
    (tmp_path / "log").write_text("x" * 11)
    kept = program(tmp_path, "print('new')")
    kept.tend()
    until(lambda: (tmp_path / "log").read_text() == "new\n")
    kept.stop()
    assert (tmp_path / "log.old.log").read_text() == "x" * 11
