"""`polyclinic cohort` when things go wrong: an exit code, what is wrong, what to do, and no traceback."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from polyclinic.cli import run
from polyclinic.cohort import build, store
from polyclinic.cohort.columns import READ
from polyclinic.cohort.scan import Scan, scan

Write = Callable[..., Path]


@pytest.fixture
def scans(tmp_path: Path, png: Write) -> Path:
    """Twenty images in one class."""
    for k in range(20):
        png(tmp_path / "scans" / "x" / f"{k}.png", k)
    return tmp_path / "scans"


def test_a_full_disk_is_said_and_the_next_call_goes_on(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    append = store._append

    def full(file: BinaryIO, parts: list[bytes]) -> None:
        append(file, parts[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["cohort", "inspect", str(scans), "--json", "--state", str(tmp_path / "state")]
    with monkeypatch.context() as patch:
        patch.setattr(store, "_append", full)
        assert run(command) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: no space left") and "\n  fix: " in err and "Traceback" not in err
    assert run(command) == 0
    assert json.loads(capfd.readouterr().out)["files_used"] == 20


def test_a_file_that_cannot_be_read_is_put_aside(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here because it is gone when its turn comes; to the worker that is one OSError like any other."""

    def scan_then_lose(path: Path) -> Scan:
        found = scan(path)
        (scans / "x" / "7.png").unlink()
        return found

    monkeypatch.setattr(build, "scan", scan_then_lose)
    assert run(["cohort", "inspect", str(scans), "--json", "--state", str(tmp_path / "state")]) == 0
    card = json.loads(capfd.readouterr().out)
    assert (card["files"], card["files_used"], card["quarantine"]) == (20, 19, {"unreadable": 1})


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make one")
@pytest.mark.parametrize("state", ["/proc/y", "/proc"])
def test_a_state_that_cannot_be_written_is_named_whole(
    scans: Path, state: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["cohort", "inspect", str(scans), "--state", state]) == 1
    out, err = capfd.readouterr()
    assert out == "" and f" {state}" in err and "unexpected" not in err and "fix: give another directory" in err


def test_colour_that_is_read_as_grey_is_told_of(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for path in (scans / "x").iterdir():
        Image.open(path).convert("RGB").save(path)
    command = ["cohort", "inspect", str(scans), "--state", str(tmp_path / "state")]
    assert run(command) == 0
    assert "stored in colour and read as grey" in capfd.readouterr().out
    assert run([*command, "--channels", "3"]) == 0
    assert "read as grey" not in capfd.readouterr().out


def test_the_help_names_the_columns_of_a_csv(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["cohort", "inspect", "--help"]) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in READ)


@pytest.mark.parametrize("command", [["inspect", "."], ["which", ".", "0" * 32]])
def test_the_default_state_within_the_cohort_is_refused(
    scans: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scans)
    assert run(["cohort", *command]) == 2
    assert "fix: keep it elsewhere: --state DIR" in capfd.readouterr().err
    assert [path.name for path in scans.iterdir()] == ["x"]
