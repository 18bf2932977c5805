"""What `polyclinic site start` does: keeps Flower's SuperNode running, which calls the coordinator and nobody else.

SuperNode ends when the coordinator does not know it yet, or still believes in the one before; it is started again.
"""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from polyclinic.errors import Refused
from polyclinic.files import locked, write_atomic
from polyclinic.processes import Program, keep_running
from polyclinic_client import caps
from polyclinic_client.hospital import Hospital
from polyclinic_client.monitor import Meter, note_health
from polyclinic_client.network import direct_to_loopback
from polyclinic_client.warm import SOCKET

log = logging.getLogger(__name__)

GUARD = f"#!{sys.executable} -P\nfrom polyclinic_client.{{}} import main\nmain()\n"
AGAIN_S = 8.0
"""Longest wait before SuperNode is started again: for a minute after one was killed, the coordinator refuses the next,
and a longer wait would lie behind the end of that minute."""
PROGRAMS = {"flwr-clientapp": "clientapp", "flower-superexec": "superexec"}
"""What SuperNode finds under the names of Flower's programs, and the modules that they run."""


def run_agent(hospital: Hospital) -> None:
    """Until SIGTERM or SIGINT.

    Raises:
        Refused: the coordinator's answer is not here yet, or another agent runs for this site.
    """
    if hospital.joined is None:
        raise Refused(
            "the coordinator has not answered yet", "send it request.json; then: polyclinic site join join-NAME.json"
        )
    with locked(hospital.path) as free:
        if not free:
            raise Refused(f"another process runs for {hospital.path}", "stop it first")
        caps.limit_memory(hospital.settings.policy)  # and with it what it starts
        meter = Meter(hospital.path, hospital.name, hospital.ledger)
        try:
            keep_running(_programs(hospital), meter)
        finally:
            meter.write(up=False)
            (hospital.path / "bin" / SOCKET).unlink(missing_ok=True)


def write_guard(home: Path) -> Path:
    """The folder that is all of SuperNode's PATH: our own `flwr-clientapp`, and `flower-superexec`, which starts it.

    Flower's programs of these names must not be found after ours: a search goes on past one that does not start.

    Raises:
        Refused: one of ours does not start from there.
    """
    folder = home / "bin"
    folder.mkdir(mode=0o700, exist_ok=True)
    fix = "put the site's folder where programs may run, on a path without a colon"
    for name, module in PROGRAMS.items():
        program = folder / name
        program.unlink(missing_ok=True)
        write_atomic(program, GUARD.format(module))
        program.chmod(0o700)
        try:
            works = subprocess.run([program, "--help"], capture_output=True, timeout=120).returncode == 0  # noqa: S603
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"{program} does not start: {error}", fix) from error
        if not works or os.pathsep in str(folder):
            raise Refused(f"{program} does not start", fix)
    return folder


def _programs(hospital: Hospital) -> list[Program]:
    """SuperNode, for which only our own `flwr-clientapp` is to be found, and the warm process that does its work.

    They inherit the environment, and with it HTTPS_PROXY and NO_PROXY, which Flower's HTTP client heeds.
    """
    joined, home = hospital.joined, hospital.path
    assert joined is not None
    guard = write_guard(home)
    for name in ("flwr", "logs"):
        (home / name).mkdir(mode=0o700, exist_ok=True)

    def command() -> list[str]:
        port, health = _free_port(), _free_port()
        note_health(home, port, health)
        return [
            *(sys.executable, "-P", "-m", "polyclinic_client.supernode"),
            *("--superlink", joined.address, "--root-certificates", str(home / "authority.crt")),
            *("--auth-supernode-private-key", str(home / "node.key")),
            *("--node-config", f'home="{home}"', "--host", "127.0.0.1", "--port", str(port)),
            *("--health-server-address", f"127.0.0.1:{health}"),
        ]

    environment = {
        **caps.environment(hospital.settings.policy),
        **direct_to_loopback(),
        "PATH": str(guard),
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # on loopback; Flower's own second is long
    }
    supernode = Program("supernode", command, home / "logs" / "supernode.log", environment, longest_s=AGAIN_S)
    if sys.platform != "linux":  # elsewhere, a fork of a process that has imported torch cannot be relied upon
        return [supernode]
    warm = [sys.executable, "-P", "-m", "polyclinic_client.warm", str(guard)]
    return [Program("warm", lambda: warm, home / "logs" / "warm.log", environment), supernode]


def _free_port() -> int:
    """On loopback, for SuperNode to speak with the program that carries out a message, or to say that it is well."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
