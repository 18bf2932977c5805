"""The Flower app bundle: what every site can compute the hash of, and nothing but names of installed modules."""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

APP = Path(__file__).parents[2] / "deploy" / "app"


def build(folder: Path) -> Path:
    """What `flwr build` makes of a copy of the bundle's folder, in `folder`."""
    shutil.copytree(APP, folder / "app")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder / "home")}
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run([flwr, "build", "--app", "app"], cwd=folder, env=os.environ | quiet, check=True, timeout=120)
    (bundle,) = folder.glob("*.fab")
    return bundle


def test_the_bundle_carries_no_code() -> None:
    assert sorted(path.name for path in APP.rglob("*")) == ["LICENSE", "pyproject.toml"]


def test_two_builds_have_the_same_hash_and_hold_the_two_files(tmp_path: Path) -> None:
    bundles = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bundles.append(build(tmp_path / name))
    one, two = (hashlib.sha256(bundle.read_bytes()).hexdigest() for bundle in bundles)
    assert one == two
    with zipfile.ZipFile(bundles[0]) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info")}
    assert names == {"LICENSE", "pyproject.toml"}


def test_the_components_are_installed() -> None:
    components = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    for kind, component in {"ServerApp": components["serverapp"], "ClientApp": components["clientapp"]}.items():
        module, _, name = component.partition(":")
        assert type(getattr(import_module(module), name)).__name__ == kind
