"""A process that has imported all that a message needs, and forks a worker for each.

Flower's node starts a program for every message. Importing torch takes it seconds, longer than a small round trains,
so what starts that program (superexec.py) knocks here instead. Where nobody opens, the program is started.
"""

import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path

SOCKET = "warm.sock"
"""In the folder of the guard. Its path is given relative to that, as a socket's may have 107 characters."""
LONGEST = 1 << 16
"""Bytes of the arguments of one message's program."""


def knock(folder: Path, arguments: list[str]) -> socket.socket | None:
    """Have the warm process of this folder carry out a message: the connection, or None where there is nobody.

    The worker lives as long as the connection, and the connection no longer than the worker.
    """
    door = socket.socket(socket.AF_UNIX)
    try:
        with chdir(folder):
            door.connect(SOCKET)
        door.sendall(json.dumps(arguments).encode() + b"\n")
    except OSError:
        door.close()
        return None
    return door


def serve(folder: Path) -> None:
    """Import, listen, fork; until killed."""
    from polyclinic_client.clientapp import prepare

    run = prepare()
    gc.freeze()  # or every worker would copy what its collector touches
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.umask(0o077)
        with chdir(folder):
            Path(SOCKET).unlink(missing_ok=True)
            listening.bind(SOCKET)
        os.umask(before)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
        while True:
            caller, _ = listening.accept()
            with caller:
                if os.fork() == 0:
                    listening.close()
                    _work(caller, run)
                    os._exit(0)


def _work(caller: socket.socket, run: Callable[[], None]) -> None:
    """In the worker: Flower's own program, with the caller's arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with caller.makefile("rb") as said:
            sys.argv = ["flwr-clientapp", *json.loads(said.readline(LONGEST))]
        threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
        run()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with(caller: socket.socket) -> None:
    """End this process when the caller has: nobody waits for it any more."""
    with suppress(OSError):
        while caller.recv(1):
            pass
    os._exit(1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
