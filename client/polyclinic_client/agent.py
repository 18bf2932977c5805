"""What `polyclinic site start` does: keeps Flower's SuperNode running, which calls the coordinator and nobody else.

SuperNode ends when the coordinator does not know it yet, or still believes in the one before; it is started again.
"""

import logging
import os
import socket
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


def _supernode(hospital: Hospital) -> Program:
    """SuperNode, with our own `flwr-clientapp` first on its PATH."""
    assert hospital.joined is not None
    home = hospital.path
    for name in ("bin", "flwr", "logs"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    write_atomic(home / "bin" / "flwr-clientapp", GUARD)
    (home / "bin" / "flwr-clientapp").chmod(0o700)
    command = [
        str(BIN / "flower-supernode"),
        *("--superlink", hospital.joined.address, "--root-certificates", str(home / "authority.crt")),
        *("--auth-supernode-private-key", str(home / "node.key")),
        *("--node-config", f'home="{home}"', "--host", "127.0.0.1", "--port", str(_free_port())),
    ]
    environment = {
        "PATH": os.pathsep.join([str(home / "bin"), str(BIN), os.environ.get("PATH", os.defpath)]),
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
