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
from polyclinic_client.hospital import Hospital

log = logging.getLogger(__name__)

BIN = Path(sys.executable).parent
GUARD = f"#!{sys.executable} -P\nfrom polyclinic_client.clientapp import main\nmain()\n"
"""The program that SuperNode finds as `flwr-clientapp`."""


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
        keep_running([_supernode(hospital)], lambda: None)


def write_guard(home: Path) -> Path:
    """The folder that is all of SuperNode's PATH: our own `flwr-clientapp`, and what SuperNode starts it by.

    Flower's program of that name must not be found after ours: a shell's search goes on past one that does not start.

    Raises:
        Refused: our program does not start from there.
    """
    folder = home / "bin"
    folder.mkdir(mode=0o700, exist_ok=True)
    guard, other = folder / "flwr-clientapp", folder / "flower-superexec"
    write_atomic(guard, GUARD)
    guard.chmod(0o700)
    other.unlink(missing_ok=True)
    other.symlink_to(BIN / "flower-superexec")
    fix = "put the site's folder where programs may run, on a path without a colon"
    try:
        works = subprocess.run([guard, "--help"], capture_output=True, timeout=120).returncode == 0  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{guard} does not start: {error}", fix) from error
    if not works or os.pathsep in str(folder):
        raise Refused(f"{guard} does not start", fix)
    return folder


def _supernode(hospital: Hospital) -> Program:
    """SuperNode, for which only our own `flwr-clientapp` is to be found."""
    joined, home = hospital.joined, hospital.path
    assert joined is not None
    for name in ("flwr", "logs"):
        (home / name).mkdir(mode=0o700, exist_ok=True)

    def command() -> list[str]:
        return [
            str(BIN / "flower-supernode"),
            *("--superlink", joined.address, "--root-certificates", str(home / "authority.crt")),
            *("--auth-supernode-private-key", str(home / "node.key")),
            *("--node-config", f'home="{home}"', "--host", "127.0.0.1", "--port", str(_free_port())),
        ]

    environment = {
        "PATH": str(write_guard(home)),
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    return Program("supernode", command, home / "logs" / "supernode.log", environment)


def _free_port() -> int:
    """On loopback, for SuperNode to speak with the program that carries out a message."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
