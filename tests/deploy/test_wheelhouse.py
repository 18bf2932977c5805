"""The wheelhouse: whole, hashed, and enough to install from where there is no network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polyclinic import __version__

ROOT = Path(__file__).parents[2]
CUT = ["typer", "rich", "click"]
"""What is left of the dependencies of the small Polyclinic: pure, and enough for `polyclinic --version`."""
UNROUTABLE = "http://127.0.0.1:9"
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), UNROUTABLE),
    "PIP_NO_INDEX": "1",
    "PIP_INDEX_URL": UNROUTABLE,
    "PYTHON": sys.executable,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("wheelhouse", ROOT / "deploy" / "wheelhouse.py")
    assert spec is not None
    assert spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def small(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A wheelhouse of the real Polyclinic but for its dependencies, of which only CUT are left."""
    folder = tmp_path_factory.mktemp("small")
    needs_index(folder)
    checkout, text = folder / "checkout", (ROOT / "pyproject.toml").read_text()
    for part in ("common", "client", "server", "simulations", "deploy/app"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in ("README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, checkout)
    cut = re.sub(r"^dependencies = \[.*?^\]", f"dependencies = {CUT}", text, flags=re.MULTILINE | re.DOTALL)
    assert cut != text
    (checkout / "pyproject.toml").write_text(cut)
    names = set(CUT).union(*(script.needed(name) for name in CUT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ROOT", checkout)
        digest = script.make(folder / "wheels", names)
    assert subprocess.run(["sha256sum", folder / "wheels" / "SHA256SUMS"], capture_output=True).stdout.startswith(
        digest.encode()
    )
    yield folder / "wheels"


def needs_index(folder: Path) -> None:
    """Skip where no package can be had."""
    options = ["--no-deps", "--quiet", "--retries", "0", "--timeout", "10", "--dest", str(folder / "probe")]
    probe = [sys.executable, "-m", "pip", "download", *options, f"mdurl=={version('mdurl')}"]
    if subprocess.run(probe, capture_output=True, timeout=60).returncode:
        pytest.skip("no package index can be reached")


def install(wheels: Path, target: Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run install.sh from another folder, without a network."""
    target.parent.mkdir(exist_ok=True)
    cut_off = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        cut_off = []  # not allowed here; the proxy that leads nowhere must do
    return subprocess.run(
        [*cut_off, "sh", wheels / "install.sh", target.name],
        cwd=target.parent,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_what_is_needed_is_locked_here_and_holds_neither_tools_nor_ray(script: ModuleType) -> None:
    names = script.needed("polyclinic")
    assert {"torch", "flwr", "pydicom", "typer", "numpy", "opacus"} < names
    assert not {"ray", "pytest", "mypy", "lightly", "hatchling", "polyclinic"} & names
    entries = script.locked((ROOT / "requirements.lock").read_text(), names)
    pinned = [Requirement(line.rstrip(" \\")) for line in entries.splitlines() if "==" in line]
    assert sorted(requirement.name for requirement in pinned) == sorted(names)
    installed = {canonicalize_name(found.name): found.version for found in distributions()}
    assert all(requirement.specifier.contains(installed[requirement.name]) for requirement in pinned)


def test_extras_count_and_what_other_machines_need_does_not(script: ModuleType) -> None:
    assert script.needed("flwr[simulation]") - script.needed("flwr") >= {"ray"}
    assert "colorama" not in script.needed("click")  # on Windows


def test_what_is_not_locked_is_named(script: ModuleType) -> None:
    lock = "a==1 ; python_version < '3' \\\n    --hash=sha256:0\na==2 \\\n    --hash=sha256:1\n    --hash=sha256:2\n"
    assert script.locked(lock, {"a"}) == lock[lock.index("a==2") :]
    with pytest.raises(SystemExit, match=r"does not hold b\n  fix: make lock"):
        script.locked(lock, {"a", "b"})


def test_a_folder_in_use_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit, match="is not empty"):
        script.make(tmp_path, set())


def test_the_sums_cover_every_file(small: Path) -> None:
    summed = {line.split("  ")[1] for line in (small / "SHA256SUMS").read_text().splitlines()}
    assert summed == {path.name for path in small.iterdir()} - {"SHA256SUMS"}
    assert {f"polyclinic-{__version__}-py3-none-any.whl", "requirements.txt", "install.sh"} < summed


def test_it_installs_without_a_network(small: Path, tmp_path: Path) -> None:
    done = install(small, tmp_path / "elsewhere" / "venv")
    assert done.returncode == 0, done.stderr
    assert f"polyclinic {__version__}" in done.stdout
    code = "import polyclinic, typer; print(polyclinic.__file__, typer.__file__)"
    python = tmp_path / "elsewhere" / "venv" / "bin" / "python"
    shown = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert all(path.startswith(str(tmp_path)) for path in shown)


@pytest.mark.parametrize("kind", ["mdurl-*.whl", "polyclinic-*.whl", "requirements.txt"])
def test_a_changed_file_is_found_out_before_anything_is_installed(kind: str, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "wheels")
    (victim,) = (tmp_path / "wheels").glob(kind)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = install(tmp_path / "wheels", tmp_path / "there" / "venv")
    assert done.returncode != 0
    assert f"{victim.name}: FAILED" in done.stdout
    assert not (tmp_path / "there" / "venv" / "bin").exists()


def test_a_wheel_that_is_changed_together_with_its_sum_is_refused_by_pip(small: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    shutil.copytree(small, wheels)
    (victim,) = wheels.glob("mdurl-*.whl")
    victim.write_bytes(victim.read_bytes() + b"\0")
    names = sorted(path.name for path in wheels.iterdir() if path.name != "SHA256SUMS")
    sums = subprocess.run(["sha256sum", *names], cwd=wheels, capture_output=True, text=True, check=True).stdout
    (wheels / "SHA256SUMS").write_text(sums)
    done = install(wheels, tmp_path / "there" / "venv")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_another_python_is_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "wheels")
    script = tmp_path / "wheels" / "install.sh"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    script.write_text(script.read_text().replace(here, "3.99").replace("sha256sum --check", "true"))
    done = install(tmp_path / "wheels", tmp_path / "there" / "venv")
    assert done.returncode == 2
    assert f"these wheels are for Python 3.99 and this is {here}" in done.stderr


@pytest.mark.slow
@pytest.mark.deployed
@pytest.mark.timeout(1800)
def test_the_whole_of_it_installs_without_a_network(tmp_path: Path) -> None:
    """3 GB of wheels, 6 GB installed: run by hand, `pytest -m slow tests/deploy/test_wheelhouse.py`."""
    needs_index(tmp_path)
    make = [sys.executable, ROOT / "deploy" / "wheelhouse.py", tmp_path / "wheels"]
    subprocess.run(make, check=True, timeout=900)
    done = install(tmp_path / "wheels", tmp_path / "there" / "venv", timeout_s=900)
    assert done.returncode == 0, done.stderr
    binaries = tmp_path / "there" / "venv" / "bin"
    for words in (["python", "-m", "pip", "check"], ["polyclinic", "site", "--help"], ["flower-supernode", "--help"]):
        subprocess.run([binaries / words[0], *words[1:]], env=os.environ | OFFLINE, check=True, timeout=120)
    shutil.rmtree(tmp_path)
