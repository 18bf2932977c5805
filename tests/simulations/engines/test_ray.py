"""The ray engine: the local engine's bits, errors as they are, and nothing of Ray's or Flower's noise."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ...tiny import events, measured

pytest.importorskip("ray")

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).with_name("ray_script.py")


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts the script in a process and a home of its own; what a failed test leaves of its session is ended."""
    sessions = []

    def start(what: str) -> "subprocess.Popen[str]":
        (tmp_path / "home").mkdir()
        command = [sys.executable, "-W", "error", "-W", "default::ResourceWarning", SCRIPT, what, tmp_path]
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        sessions.append(process)
        return process

    yield start
    for process in sessions:
        subprocess.run(["pkill", "-KILL", "--session", str(process.pid)], check=False)
        process.communicate(timeout=20)


def without_resource_warnings(printed: str) -> str:
    """Ray drops open files and processes in ways that Python's development mode speaks of."""
    lines = printed.splitlines()
    return "\n".join(line for line in lines if "ResourceWarning" not in line and not line.startswith("  "))


def left_behind(session: int) -> list[str]:
    """Processes of a session that still run, once Ray's have had time to end."""
    for _ in range(100):
        listed = subprocess.run(["ps", "-s", str(session), "-o", "stat=,comm="], capture_output=True, text=True)
        running = [line for line in listed.stdout.splitlines() if line.strip() and not line.startswith("Z")]
        if not running:
            return []
        time.sleep(0.2)
    return running


@pytest.mark.slow
def test_has_the_local_engines_bits_and_errors_and_makes_no_noise(
    script: Callable[[str], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = script("engines")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert left_behind(process.pid) == []
    local, ray = tmp_path / "local", tmp_path / "ray"
    kept = sorted(path.name for path in (local / "checkpoints").iterdir())
    assert kept[-1] == "round-0002.safetensors"
    assert sorted(path.name for path in (ray / "checkpoints").iterdir()) == kept
    for name in kept:
        assert (local / "checkpoints" / name).read_bytes() == (ray / "checkpoints" / name).read_bytes(), name
    assert measured(local) == measured(ray)
    assert any(row[3] == "probe_auc" for row in measured(ray))
    lost = "only 1 of at least 2 sites sent an update that passed in round 3"
    assert out.splitlines() == [lost, lost, "environment changed: []"]
    assert [line["reason"] for line in events(ray, "update_refused")] == ["the site failed: FileExistsError"]
    noise = [line for line in without_resource_warnings(err).splitlines() if "FileExistsError" not in line]
    assert noise == []
    assert list((tmp_path / "home").rglob("*flwr*")) == []


@pytest.mark.slow
def test_ctrl_c_ends_round_loop_and_sites(script: Callable[[str], "subprocess.Popen[str]"], tmp_path: Path) -> None:
    process = script("endless")
    log = tmp_path / "ray" / "events.jsonl"
    while process.poll() is None and not (log.exists() and "round_started" in log.read_text()):
        time.sleep(0.2)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "stopped\n"), err
    assert left_behind(process.pid) == []
