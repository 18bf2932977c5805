"""What the note on Kubernetes says of Flower is true of the Flower that is installed."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

from polyclinic_client.agent import GUARD, PROGRAMS

NOTE = (Path(__file__).parents[2] / "deploy" / "kubernetes.md").read_text()


@pytest.mark.parametrize("database", [":flwr-in-memory:", ":memory:", "state.db", "sqlite:///state.db"])
def test_memory_and_sqlite_will_do(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    get_objectstore_linkstate_factories(database, get_federation_manager())


def test_postgresql_will_not() -> None:
    with pytest.raises(ValueError, match="Unsupported value for `--database`"):
        get_objectstore_linkstate_factories("postgresql://user@host/state", get_federation_manager())
    assert '"Unsupported value for\n  `--database`"' in NOTE


def test_sqlite_is_opened_in_wal_mode() -> None:
    assert ("journal_mode", "WAL") in SQLITE_PRAGMAS


def test_the_options_are_there_and_the_version_is_this() -> None:
    shown = ""
    for program in ("flower-superlink", "flower-supernode"):
        path = Path(sys.executable).with_name(program)
        shown += subprocess.run([path, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    options = set(re.findall(r"`(--[a-z-]+)", NOTE))
    assert len(options) > 4
    assert all(option in shown for option in options)
    assert set(re.findall(r"flwr/\w+:([\d.]+)", NOTE)) == {version("flwr")}


def test_the_guard_is_quoted_as_the_agent_writes_it() -> None:
    assert all(
        f"`{name}`" in NOTE and GUARD.format(module).splitlines()[1] in NOTE for name, module in PROGRAMS.items()
    )
    first, *rest = GUARD.format("clientapp").splitlines()
    assert first.endswith("python -P") or re.search(r"python[\d.]* -P$", first)
    assert "`#!/path/to/python -P`" in NOTE
    assert all(f"`{line}`" in NOTE for line in rest)
