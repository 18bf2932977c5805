"""Worker processes that hang, die, or do not start."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cohort import pool
from polyclinic.cohort.quarantine import Reason
from polyclinic.errors import PolyclinicError

SETUP = {"intake": {"size": 16, "channels": 1, "window": "percentile"}, "key": "00", "known": []}

TROUBLED = """
import ctypes, os, signal, sys, time
from polyclinic.cohort import worker

whole = worker.decode

def decode(data, intake, key):
    if data == b"segfault":
        ctypes.string_at(0)
    if data == b"hang":
        time.sleep(1e6)
    if data == b"deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while True: pass
    if data == b"print":
        os.write(1, b"x" * 100_000)
        print("header values", flush=True)
    if data == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if data.startswith(b"once "):
        mark = data[5:].decode()
        if not os.path.exists(mark):
            open(mark, "w").close()
            os.abort()
    return whole(data, intake, key)

worker.decode = decode
if __name__ == "__main__":
    worker.main()
"""


@pytest.fixture
def troubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose decoder does what the file says."""
    (tmp_path / "troubled_worker.py").write_text(TROUBLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "WORKER", "troubled_worker")


def read(folder: Path, contents: list[bytes], workers: int = 2, timeout_s: float = 20.0) -> list[dict[str, Any]]:
    """The reply to each content, in order."""
    paths = [folder / f"{number}.bin" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    replies = {position: reply for position, reply, _ in pool.Pool(SETUP, workers, timeout_s).read(paths)}
    assert len(replies) == len(contents)
    return [replies[position] for position in range(len(contents))]


@pytest.mark.usefixtures("troubled")
def test_a_crashing_decoder_costs_one_file(tmp_path: Path) -> None:
    contents = [b"fine %d" % k for k in range(40)]
    contents[3] = contents[4] = contents[39] = b"segfault"
    reasons = [reply["reason"] for reply in read(tmp_path, contents)]
    assert [k for k, reason in enumerate(reasons) if reason == Reason.CRASHED] == [3, 4, 39]
    assert set(reasons) == {Reason.CRASHED, Reason.NOT_AN_IMAGE}


@pytest.mark.usefixtures("troubled")
@pytest.mark.parametrize("how", [b"hang", b"deaf"])
def test_a_hanging_decoder_costs_one_file(tmp_path: Path, how: bytes) -> None:
    started = time.monotonic()
    reasons = [reply["reason"] for reply in read(tmp_path, [b"fine", how, b"fine"], timeout_s=1.0)]
    assert reasons == [Reason.NOT_AN_IMAGE, Reason.TIMEOUT, Reason.NOT_AN_IMAGE]
    assert time.monotonic() - started < 30


@pytest.mark.usefixtures("troubled")
def test_a_passing_crash_is_tried_again(tmp_path: Path) -> None:
    (reply,) = read(tmp_path, [b"once %s" % os.fsencode(tmp_path / "mark")])
    assert reply["reason"] == Reason.NOT_AN_IMAGE and reply["sha"]


@pytest.mark.usefixtures("troubled")
def test_a_killed_worker_is_told_from_a_crash(tmp_path: Path) -> None:
    killed, crashed = read(tmp_path, [b"killed", b"segfault"])
    assert killed == {"reason": Reason.CRASHED, "killed": True}
    assert crashed == {"reason": Reason.CRASHED, "killed": False}


@pytest.mark.usefixtures("troubled")
def test_what_decoders_print_goes_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (reply,) = read(tmp_path, [b"print"])
    assert reply["reason"] == Reason.NOT_AN_IMAGE
    assert capfd.readouterr() == ("", "")


def test_workers_that_do_not_start_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WORKER", "polyclinic.no_such_module")
    with pytest.raises(PolyclinicError, match="do not start"):
        read(tmp_path, [b"fine"])


def test_workers_do_not_import_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it would cost each of them seconds."""
    probe = "import sys\nfrom polyclinic.cohort import worker\nassert 'torch' not in sys.modules\nworker.main()\n"
    (tmp_path / "probing_worker.py").write_text(probe)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "WORKER", "probing_worker")
    assert read(tmp_path, [b"fine"])[0]["reason"] == Reason.NOT_AN_IMAGE


def test_workers_end_with_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{k}.bin" for k in range(6000)]
    for path in paths:
        path.write_bytes(b"fine")
    monkeypatch.setattr(pool, "GROW_S", 0.0)
    workers = pool.Pool(SETUP, 3, 20.0)
    replies = workers.read(paths)
    while len(workers._workers) < 3:
        next(replies)
    processes = [worker.process for worker in workers._workers]
    replies.close()  # as an interrupted build does
    assert all(process.poll() is not None for process in processes)


def test_no_files_no_workers() -> None:
    assert list(pool.Pool(SETUP, 2, 1.0).read([])) == []
