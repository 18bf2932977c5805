"""The consortium's processes, found by their command lines; what of them is waited for, stopped or killed."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyclinic.processes import PR_SET_PDEATHSIG

MARK, MINE = "POLYCLINIC_TESTED_BY", str(os.getpid())
"""In the environment of all that the tests start, so that they find and kill no process of somebody else's."""
os.environ[MARK] = MINE


def end_with_the_tests() -> None:
    """In a child: be told to end when the tests' process is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def until(true: Callable[[], Any], patience_s: float, what: str) -> Any:
    """What `true` gives, once that is something."""
    end = time.monotonic() + patience_s
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: waited {patience_s:.0f} s in vain"
        time.sleep(0.1)
    return found


def processes(*words: str) -> list[int]:
    """Those of the consortium whose command line holds all of `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in line for word in words) and _ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _ours(pid: int) -> bool:
    """Whether the tests started it, or one from which it descends: nginx writes its title over its environment."""
    if f"{MARK}={MINE}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        return True
    parent = _parent(pid)
    return parent > 1 and _ours(parent)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers(site: str) -> list[int]:
    """Those that the site's warm process has forked, each for a message."""
    parents = dict[int, int]()
    for pid in processes("polyclinic_client.warm", f"/{site}/"):
        with suppress(OSError):  # it may have ended since
            parents[pid] = _parent(pid)
    return [pid for pid, parent in parents.items() if parent in parents]


def kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)
