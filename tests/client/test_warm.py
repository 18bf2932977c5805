"""The warm process: a worker for each message, with its exit code, that ends with who asked for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyclinic_client.warm import SOCKET, knock

SERVE = """
import os, sys, time
from pathlib import Path
from polyclinic_client import clientapp, warm
folder = Path(sys.argv[1])
def run():
    kind, *rest = sys.argv[1:]
    (folder / f"{kind}.pid").write_text(str(os.getpid()))
    if kind == "raise":
        raise RuntimeError("no")
    if kind == "sleep":
        time.sleep(60)
    sys.exit(int(kind))
clientapp.prepare = lambda: run
warm.serve(folder)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In which a warm process serves."""
    deep = tmp_path / ("x" * 100)  # a path too long for a socket's own
    deep.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(deep)], stderr=subprocess.DEVNULL)
    waited = time.monotonic() + 20
    while knock(deep, ["0"]) is None:
        assert time.monotonic() < waited
        time.sleep(0.05)
    yield deep
    process.kill()
    process.wait()


def test_a_worker_for_each_message_and_its_exit_code(folder: Path) -> None:
    workers = set()
    for code in (0, 3, 0):
        assert knock(folder, [str(code)]) == code
        workers.add((folder / f"{code}.pid").read_text())
    assert len(workers) == 3
    assert knock(folder, ["raise"]) == 1
    assert knock(folder, ["not a number"]) == 1


def test_nobody_else_may_knock(folder: Path) -> None:
    assert (folder / SOCKET).stat().st_mode & 0o077 == 0


def test_a_worker_ends_with_who_asked_for_it_and_who_asked_is_told_of_its_death(folder: Path) -> None:
    knocking = "import sys; from pathlib import Path; from polyclinic_client.warm import knock; "
    knocking += "sys.exit(knock(Path(sys.argv[1]), ['sleep']))"
    for victim, expected in (("caller", -signal.SIGKILL), ("worker", 1)):
        caller = subprocess.Popen([sys.executable, "-c", knocking, str(folder)])
        worker = int(_until(folder / "sleep.pid"))
        os.kill(caller.pid if victim == "caller" else worker, signal.SIGKILL)
        assert caller.wait(timeout=20) == expected
        waited = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < waited
            time.sleep(0.02)
        (folder / "sleep.pid").unlink()


def _until(path: Path) -> str:
    waited = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < waited
        time.sleep(0.02)
    return path.read_text()


def test_nobody_opens_where_there_is_none_or_it_has_died(tmp_path: Path, folder: Path) -> None:
    assert knock(tmp_path, ["0"]) is None
    dead = tmp_path / "dead"
    dead.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import os, socket; os.chdir({str(dead)!r}); socket.socket(socket.AF_UNIX).bind('{SOCKET}')",
        ]
    )
    assert (dead / SOCKET).exists()
    assert knock(dead, ["0"]) is None
