"""A site whose only way out is a forward proxy."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .consortium import ELSEWHERE, Consortium, free_port
from .processes import until
from .relay import Relay
from .runs import events, finished

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:GitWildMatchPattern")]

SITE = "gamma"


@pytest.fixture
def gateway(consortium: Consortium) -> Iterator[int]:
    """The gateway's port at the address elsewhere."""
    relay = Relay(consortium.port, ELSEWHERE)
    yield relay.port
    relay.close()


@pytest.fixture
def proxy(gateway: int, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, log) of a proxy that lets through to the gateway, and nowhere else."""
    assert shutil.which("tinyproxy"), "tinyproxy is not installed"
    port, log, settings = free_port(), tmp_path / "proxy.log", tmp_path / "proxy.conf"
    settings.write_text(
        f'Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nConnectPort {gateway}\nLogFile "{log}"\n'
        "LogLevel Connect\nMaxClients 50\nTimeout 600\n"
    )
    process = subprocess.Popen(["tinyproxy", "-d", "-c", settings], stdout=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port), 20, "the proxy")
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(timeout=20)


def _listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def test_a_site_takes_part_through_a_forward_proxy(
    proxy: tuple[str, Path], gateway: int, consortium: Consortium
) -> None:
    address, log = proxy
    joined = consortium.folder / SITE / "join.json"
    direct = joined.read_text()
    study = consortium.study("proxied", rounds=1)
    consortium.approve(study)
    consortium.stop(SITE)
    joined.write_text(direct.replace(f'"127.0.0.1:{consortium.port}"', f'"{ELSEWHERE}:{gateway}"'))
    consortium.start(SITE, environment={"HTTPS_PROXY": address, "NO_PROXY": "", "no_proxy": ""})
    try:
        run = consortium.launch(study)
        finished(run)
        assert {event["round"] for event in events(run, "update_accepted") if event["site"] == SITE} == {1, 2}
        assert f"CONNECT {ELSEWHERE}:{gateway}" in log.read_text()
    finally:
        consortium.stop(SITE)
        joined.write_text(direct)
        consortium.start(SITE)
