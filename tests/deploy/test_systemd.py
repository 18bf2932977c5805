"""The units: systemd knows every line of them, and what they leave open is bounded."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyclinic.cli import build, run
from polyclinic.processes import GRACE_S
from polyclinic_server.home import Home
from polyclinic_server.supervisor import Supervisor

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = ["polyclinic-coordinator.service", "polyclinic-site.service"]
EXPOSURE = 20
"""Tenths of systemd's own exposure level, of ten; a unit without any of it has 96."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, timeout=60, env={"SYSTEMD_COLORS": "0"}
    )


def settings(unit: str) -> dict[str, str]:
    """`[Service]`; of what is given several times, the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(SYSTEMD / unit)
    return dict(parser["Service"])


def test_these_are_the_units() -> None:
    assert sorted(path.name for path in SYSTEMD.iterdir()) == UNITS


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_to_complain_of(unit: str, tmp_path: Path) -> None:
    """With a program in its place: systemd looks whether it is there."""
    program = settings(unit)["ExecStart"].split()[0]
    stand_in = tmp_path / "polyclinic"
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    (tmp_path / unit).write_text((SYSTEMD / unit).read_text().replace(program, str(stand_in)))
    done = analyze("verify", "--man=no", str(tmp_path / unit))
    assert done.returncode == 0, done.stderr
    assert unit not in done.stderr
    (tmp_path / unit).write_text((SYSTEMD / unit).read_text().replace("ProtectSystem=strict", "ProtectSystem=very"))
    assert f"{unit}:" in analyze("verify", "--man=no", str(tmp_path / unit)).stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_the_exposure_is_bounded(unit: str, tmp_path: Path) -> None:
    within = ("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE}")
    done = analyze(*within, str(SYSTEMD / unit))
    assert done.returncode == 0, done.stdout
    (tmp_path / unit).write_text(re.sub(r"^(Protect|SystemCall).*\n", "", (SYSTEMD / unit).read_text(), flags=re.M))
    assert analyze(*within, str(tmp_path / unit)).returncode != 0


@pytest.mark.parametrize("unit", UNITS)
def test_it_starts_a_command_that_is_there(unit: str) -> None:
    found = settings(unit)
    program, *words = found["ExecStart"].split()
    assert program == "/opt/polyclinic/current/bin/polyclinic"
    shown = CliRunner().invoke(build(), [*words[:2], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert words[2] in shown.output
    assert words[3].startswith(found["WorkingDirectory"] + "/")
    assert found["WorkingDirectory"] == "/var/lib/" + found["StateDirectory"]


def test_they_are_started_again_whatever_happens_and_have_time_to_stop(tmp_path: Path) -> None:
    assert run(["coordinator", "init", "--address", "localhost:8443", "--home", str(tmp_path / "c")]) == 0
    programs = len(Supervisor(Home(tmp_path / "c")).programs), 2  # stopped one by one
    for unit, count in zip(UNITS, programs, strict=True):
        found = settings(unit)
        assert found["Restart"] == "always"
        assert found["KillMode"] == "mixed"
        assert int(found["TimeoutStopSec"]) > count * GRACE_S


def test_only_the_coordinator_may_bind_a_low_port_and_nothing_else_is_granted() -> None:
    coordinator, site = map(settings, UNITS)
    for name in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert coordinator[name] == "CAP_NET_BIND_SERVICE"
        assert site[name] == ""
    assert site["User"] == coordinator["User"] == "polyclinic"


def test_the_images_can_be_neither_written_nor_run() -> None:
    site = settings(UNITS[1])
    assert site["ReadOnlyPaths"] == site["NoExecPaths"] == "-/mnt/images"
    assert site["ProtectSystem"] == "strict"
    assert "ReadWritePaths" not in site
