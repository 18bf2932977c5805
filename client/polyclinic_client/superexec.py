"""What runs at a site under the name `flower-superexec`: Flower's own program, which has the warm process do the work.

Flower's node starts it once, and it starts `flwr-clientapp` for every message. Here it knocks at the warm process
instead; where nobody opens, or Flower no longer starts programs as it did, it starts that program.
"""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
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
        wait: Callable[[], Any]
        if command[0] == "flwr-clientapp" and (door := knock(folder, command[1:])) is not None:
            wait = partial(_end_of, door)
        else:
            wait = subprocess.Popen(command, **settings).wait  # noqa: S603 (Flower's own list of arguments)
        threading.Thread(target=wait, daemon=True).start()

    executor.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def _end_of(door: socket.socket) -> None:
    """Hold the connection until the worker has ended, since it ends with that."""
    with door:
        door.recv(1)
