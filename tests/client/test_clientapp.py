"""Only installed code runs: another bundle is refused before it is unpacked, and ours is never imported from itself."""

import io
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supernode.runtime import run_clientapp

from polyclinic.bundle import bundle_folder, bundle_hash
from polyclinic.errors import Refused
from polyclinic_client import agent, clientapp
from polyclinic_client.agent import write_guard
from polyclinic_client.app import app

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")


def test_our_own_bundle_passes_and_has_no_code() -> None:
    bundle = build_fab_from_disk(bundle_folder())
    clientapp.check(bundle, skip_prompt=True)
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert not [name for name in names if name.endswith(".py")]


def test_any_other_byte_is_refused() -> None:
    bundle = bytearray(build_fab_from_disk(bundle_folder()))
    bundle[-1] ^= 1
    with pytest.raises(Refused, match="not the one that this site has installed"):
        clientapp.check(bytes(bundle), skip_prompt=True)


def test_the_hook_still_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own function asks for what is replaced, by these names, in its own module."""
    names = run_clientapp.run_clientapp.__code__.co_names
    assert {"install_from_fab", "get_load_client_app_fn"} <= set(names)
    for name in clientapp.REPLACED:
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))  # put back afterwards
    clientapp.hold(run_clientapp)
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert any(cell.cell_contents is app for cell in load("any", "0", "hash").__closure__)
    with pytest.raises(Refused):
        run_clientapp.install_from_fab(b"foreign", skip_prompt=True)


def test_another_flower_answers_nothing() -> None:
    with pytest.raises(Refused, match="has no get_load_client_app_fn"):
        clientapp.hold(SimpleNamespace(install_from_fab=print))


def test_the_hash_is_the_same_in_every_build() -> None:
    bundle_hash.cache_clear()
    first = bundle_hash()
    bundle_hash.cache_clear()
    assert bundle_hash() == first


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of SuperNode's PATH; each of its programs was started once."""
    return write_guard(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("mode", [0o600, 0o700])
def test_only_our_own_program_is_to_be_found(mode: int, guard: Path, tmp_path: Path) -> None:
    """Flower's of the same name stands in the same installation; a search for the name must not come to it."""
    folder = shutil.copytree(guard, tmp_path / "bin")
    (folder / "flwr-clientapp").chmod(mode)
    found = shutil.which("flwr-clientapp", path=str(folder))
    assert found == (str(folder / "flwr-clientapp") if mode == 0o700 else None)
    assert sorted(path.name for path in folder.iterdir()) == ["flower-superexec", "flwr-clientapp"]


def test_a_guard_that_does_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "GUARD", "#!/nowhere/python\n")
    with pytest.raises(Refused, match="does not start"):
        write_guard(tmp_path)
    (tmp_path / "a:b").mkdir()
    monkeypatch.setattr(agent, "GUARD", f"#!{shutil.which('true')}\n")  # which starts; PATH cannot hold it
    with pytest.raises(Refused, match="does not start"):
        write_guard(tmp_path / "a:b")
