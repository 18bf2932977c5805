"""What runs at a site under the name `flower-superexec`: Flower's own program, which has the warm process do the work.

Flower's node starts it once, and it starts `flwr-clientapp` for every message. Here it knocks at the warm process
instead; where nobody opens or listens, it starts that program.
"""

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polyclinic_client.warm import knock


def main() -> None:
    """As Flower's program of that name."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    divert(subprocess_executor, Path(sys.argv[0]).parent)
    flower_superexec()


def divert(executor: Any, folder: Path) -> None:
    """Replace `subprocess.Popen` as Flower's module `executor` sees it."""

    def start(command: list[str], **settings: Any) -> None:
        door = knock(folder, command[1:]) if command[0] == "flwr-clientapp" else None
        threading.Thread(target=_finish, args=(door, command, settings), daemon=True).start()

    executor.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": start})


def _finish(door: socket.socket | None, command: list[str], settings: dict[str, Any]) -> None:
    """Hold the connection until the worker has ended, since it ends with that; or start the program."""
    if door is not None:
        with door, suppress(ConnectionResetError):  # nobody has read what was asked: it died before it could fork
            door.recv(1)
            return
    subprocess.Popen(command, **settings).wait()  # noqa: S603 (Flower's own list of arguments)
