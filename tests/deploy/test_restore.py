"""A coordinator and its sites are lost and restored from their backups; renewed; and go on as before."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..deployment.consortium import SITES, Consortium, healthy
from ..deployment.processes import until
from ..deployment.runs import finished

pytestmark = [
    pytest.mark.deployed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern"),
]
MEMBERS = ("coordinator", *SITES)


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    """Of its own: the tests of tests/deployment share theirs."""
    assert shutil.which("nginx"), "nginx is not installed"
    made = Consortium(tmp_path)
    try:
        yield made
    finally:
        made.close()


def up(consortium: Consortium) -> None:
    consortium.start(*MEMBERS)
    until(lambda: healthy(consortium), 60, "the gateway")


def study(consortium: Consortium, name: str) -> None:
    """Runs, in which every site takes part."""
    path = consortium.study(name, rounds=1)
    consortium.approve(path)
    closed = [event for event in finished(consortium.launch(path)) if event["event"] == "round_closed"]
    assert [event["accepted"] for event in closed] == [len(SITES)] * 2


def tar(folder: Path, *words: str) -> None:
    subprocess.run(["tar", *words], cwd=folder, check=True, timeout=60)


def test_all_are_restored_with_a_new_certificate_and_work_on(consortium: Consortium) -> None:
    up(consortium)
    study(consortium, "before")
    codes = [consortium.stop(name) for name in reversed(MEMBERS)]
    assert codes == [0] * len(MEMBERS)
    for name in MEMBERS:
        tar(
            consortium.folder, "--create", "--gzip", "--exclude", f"{name}/state/cohorts", "--file", f"{name}.tgz", name
        )
        shutil.rmtree(consortium.folder / name)
        tar(consortium.folder, "--extract", "--gzip", "--file", f"{name}.tgz")
    consortium.command("coordinator", "renew")
    up(consortium)
    study(consortium, "after")
    for name in SITES:
        assert "gateway: it answers" in consortium.command("site", "doctor", "--home", name)
        assert "each after the one before" in consortium.command("site", "ledger", "verify", "--home", name)
