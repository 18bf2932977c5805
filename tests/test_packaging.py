"""The lock file and the wheel."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = (
    "common/polyclinic",
    "client/polyclinic_client",
    "server/polyclinic_server",
    "simulations/polyclinic_simulations",
)
LOCK = (ROOT / "requirements.lock").read_text()


def name(requirement: str) -> str:
    """`flwr` for "flwr[simulation]>=1.41.0,<1.42"."""
    return re.split(r"[^\w.-]", requirement.lower(), maxsplit=1)[0]


def test_the_lock_names_no_host_and_no_path() -> None:
    lines = [line for line in LOCK.splitlines() if not line.startswith("    --hash=sha256:")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.+-]+( ; .*)? \\", line) for line in lines)
    assert not re.search(r"://|@|/", LOCK)


def test_every_locked_package_has_hashes() -> None:
    pinned = re.findall(r"^[a-z0-9._-]+==.*$\n(.*)", LOCK, flags=re.MULTILINE)
    assert len(pinned) > 100
    assert all(line.startswith("    --hash=sha256:") for line in pinned)


def test_the_lock_covers_the_dependencies_but_not_the_gpl_decoders() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["dev"], *extras["ray"]]
    locked = {line.partition("==")[0] for line in LOCK.splitlines() if "==" in line}
    assert {name(requirement) for requirement in wanted} <= locked
    assert not {name(requirement) for requirement in extras["gpl-decoders"]} & locked


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree and unpacked: what an installation holds."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(unpacked: Path) -> None:
    wanted = {Path("polyclinic/app_bundle") / path.name for path in (ROOT / "deploy/app").iterdir()}
    wanted |= {Path("polyclinic_simulations/studies") / path.name for path in (ROOT / "simulations/studies").iterdir()}
    for folder in PACKAGES:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
        wanted |= {path.relative_to((ROOT / folder).parent) for path in files}
    assert {Path("polyclinic/py.typed"), Path("polyclinic_simulations/studies/demo.toml")} < wanted
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in held if not path.parts[0].endswith(".dist-info")} == wanted
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))


def test_the_command_starts_from_the_wheel(unpacked: Path) -> None:
    code = "import polyclinic, polyclinic.cli as cli; print(polyclinic.__file__); raise SystemExit(cli.run(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith(str(unpacked))
    assert all(group in done.stdout for group in ("simulate", "cohort", "study"))
