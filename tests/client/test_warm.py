"""The warm process: a worker for each message, that ends with who asked for it; and who asks."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest

from polyclinic_client.superexec import divert
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
        raise RuntimeError("so it is")
    if kind == "sleep":
        time.sleep(60)
    sys.exit(kind)
clientapp.prepare = lambda: run
warm.serve(folder)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In which a warm process serves."""
    deep = tmp_path / ("x" * 100)  # a path too long for a socket's own
    deep.mkdir()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(deep)], stderr=log)
    waited = time.monotonic() + 20
    while not ended(knock(deep, ["begin"])):
        assert time.monotonic() < waited
        time.sleep(0.05)
    yield deep
    process.kill()
    process.wait()


def ended(door: socket.socket | None) -> bool:
    """Whether somebody opened, once they have done their work."""
    if door is None:
        return False
    with door:
        return door.recv(1) == b""


def test_a_worker_for_each_message(folder: Path) -> None:
    workers = set()
    for word in ("one", "two", "three"):
        assert ended(knock(folder, [word]))
        workers.add((folder / f"{word}.pid").read_text())
    assert len(workers) == 3


def test_what_a_worker_raises_is_in_the_log(folder: Path) -> None:
    assert ended(knock(folder, ["raise"]))
    assert ended(knock(folder, []))
    assert ended(knock(folder, ["goodbye"]))
    log = (folder.parent / "log").read_text()
    assert "RuntimeError: so it is" in log
    assert "ValueError: not enough values" in log
    assert "goodbye" in log.splitlines()


def test_nobody_else_may_knock(folder: Path) -> None:
    assert (folder / SOCKET).stat().st_mode & 0o077 == 0


def test_a_worker_ends_with_who_asked_for_it_and_who_asked_is_told_of_its_death(folder: Path) -> None:
    for victim in ("caller", "worker"):
        door = knock(folder, ["sleep"])
        assert door is not None
        worker = int(_until(folder / "sleep.pid"))
        if victim == "caller":
            door.close()
        else:
            os.kill(worker, signal.SIGKILL)
            assert ended(door)
        waited = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < waited
            time.sleep(0.02)
        (folder / "sleep.pid").unlink()


@contextmanager
def listening(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as door:
        with chdir(folder):
            door.bind(SOCKET)
        door.listen()
        yield door


def _until(path: Path) -> str:
    waited = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < waited
        time.sleep(0.02)
    return path.read_text()


def test_nobody_opens_where_there_is_none_or_it_has_died(tmp_path: Path, folder: Path) -> None:
    assert knock(tmp_path, ["one"]) is None
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
    assert knock(dead, ["one"]) is None


def test_flower_has_the_warm_process_do_the_work_and_starts_the_program_where_there_is_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supercore.superexec.executor.types import ExecutionSpec

    for name in ("flwr-clientapp", "other"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.started\n')
        program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess)  # put back afterwards
    spec = ExecutionSpec(TaskType.CLIENT_APP, "127.0.0.1:1", "token", True, None, False, 1, False, 1)
    divert(subprocess_executor, folder)
    subprocess_executor.SubprocessExecutor().launch(spec)
    assert int(_until(folder / "--runtime-api-address.pid"))
    assert not (tmp_path / "flwr-clientapp.started").exists()
    divert(subprocess_executor, tmp_path)
    subprocess_executor.SubprocessExecutor().launch(spec)
    said = _until(tmp_path / "flwr-clientapp.started")
    assert said.split() == [
        "--runtime-api-address",
        "127.0.0.1:1",
        "--token",
        "token",
        "--insecure",
        "--parent-pid",
        "1",
    ]
    (tmp_path / "flwr-clientapp.started").unlink()
    with listening(tmp_path) as door:
        subprocess_executor.SubprocessExecutor().launch(spec)
        door.accept()[0].close()  # what was asked is not read
    assert _until(tmp_path / "flwr-clientapp.started") == said
    divert(subprocess_executor, folder)
    subprocess_executor.subprocess.Popen(["other", "way"])  # type: ignore[attr-defined]
    assert _until(tmp_path / "other.started").split() == ["way"]
