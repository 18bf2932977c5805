"""A consortium small enough to simulate in seconds: invented patients as DICOM files at three hospitals."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyclinic_simulations.phantom import write_site

SITES = ("alpha", "beta", "gamma")

STUDY = """
[study]
name = "tiny"
seed = 3

[images]
size = 32

[encoder]
name = "vit_tiny"

[[stages]]
kind = "pretrain"
method = "mae"
rounds = 2
batch_size = 16

[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 1
batch_size = 16

[evaluation]
rows = ["pixels", "random"]
""" + "".join(f'\n[[simulation.site]]\nname = "{name}"\ncohort = "{name}"\n' for name in SITES)


@pytest.fixture(scope="session")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one DICOM tree a hospital."""
    folder = tmp_path_factory.mktemp("patients")
    for number, name in enumerate(SITES):
        write_site(folder / name, name, 10, 5, number=number)
    return folder


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built cohorts, shared by all tests."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def finished(patients: Path, state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; what it printed stands beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.toml").write_text(STUDY)
    done = polyclinic("simulate", folder / "tiny.toml", "--data", patients, "--state", state, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout + done.stderr)
    return folder / "run"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The study file."""
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def polyclinic(*arguments: object, cwd: Path | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own; `code` runs in that process first."""
    command = f"{code}\nfrom polyclinic.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=240
    )
