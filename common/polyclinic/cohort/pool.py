"""Worker processes that read files: each with a deadline a file, replaced when it hangs or dies."""

import json
import math
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from polyclinic.cohort.quarantine import Reason
from polyclinic.errors import PolyclinicError

WORKER = "polyclinic.cohort.worker"
"""The module that workers run."""
GROW_S = 0.3
"""Seconds of work after which there are twice as many processes: starting one costs as much as reading many files."""
AHEAD = 2
"""Files that a worker holds at once, so that it need not wait for the next."""
START_S = 120.0
"""Seconds a worker may take to start."""
READY = -1
"""Stands for the empty reply by which a worker says that it has started."""

FRAME = struct.Struct(">IQ")
"""Before a reply: the lengths of its JSON and of its pixels, bytes."""

Reply = tuple[dict[str, Any], bytes]


DECODERS = ("pydicom", "pillow", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pylibjpeg-libjpeg", "pyjpegls", "python-gdcm")


def installed_decoders() -> list[str]:
    """Name and version of every installed distribution that decodes DICOM pixels."""
    found = []
    for name in DECODERS:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


class _Ended(Exception):
    """The worker's stream ended within a reply or before it."""


class _Worker:
    """One process. `waiting` holds the files given and not yet answered, the one in work first."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(  # noqa: S603  (this interpreter, a module of ours)
            # Warnings stay warnings, whatever the environment makes of them: they are about the files.
            [sys.executable, "-P", "-W", "default", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self.process.stdout is not None
        self.replies = self.process.stdout.fileno()
        self.waiting = deque([READY])
        self.deadline = time.monotonic() + START_S

    def send(self, line: bytes) -> None:
        """A worker that has died does not take it; that shows when its reply is read."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def receive(self) -> Reply:
        text, pixels = FRAME.unpack(self._exactly(FRAME.size))
        return json.loads(self._exactly(text)), self._exactly(pixels)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = os.read(self.replies, length - len(data))
            if not piece:
                raise _Ended
            data += piece
        return bytes(data)

    def end(self) -> int:
        """Kill it; its exit status, negative for the signal that it had died of before."""
        status = self.process.poll()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        return self.process.returncode if status is None else status


class Pool:
    """Reads files in worker processes that are started when `read` is, and ended with it.

    Args:
        setup: the first line that every worker gets (see worker.main), without `timeout_s`.
        workers: how many at most.
        timeout_s: seconds for one file.
    """

    def __init__(self, setup: dict[str, Any], workers: int, timeout_s: float) -> None:
        self._setup = json.dumps({**setup, "timeout_s": timeout_s}).encode() + b"\n"
        self._most, self._timeout_s = workers, timeout_s
        self._workers: list[_Worker] = []
        self._todo: deque[int] = deque()
        self._grow_at = math.inf
        self._retried: set[int] = set()

    def read(self, paths: Sequence[Path]) -> Generator[tuple[int, dict[str, Any], bytes], None, None]:
        """(position in `paths`, reply, pixels) of every file, in the order in which they are done.

        Beside the worker's own, a reply's reason is TIMEOUT, or CRASHED after a second try; `"killed": True` stands
        with it where something outside killed the worker, as the kernel does when memory runs out.

        Raises:
            PolyclinicError: the workers do not start.
        """
        self._todo = deque(range(len(paths)))
        try:
            self._start(min(1, len(paths)))
            while self._feed(paths):
                for worker, late in self._wait():
                    yield from self._collect(worker, late)
        finally:
            for worker in self._workers:
                worker.end()
            self._workers = []

    def _start(self, number: int) -> None:
        started = [_Worker() for _ in range(number)]
        self._workers += started
        for worker in started:
            worker.send(self._setup)

    def _feed(self, paths: Sequence[Path]) -> bool:
        """Give every worker something to do, and start more of them when it is time; False once all is done."""
        if time.monotonic() >= self._grow_at:
            self._grow_at = math.inf
            self._start(min(len(self._workers), self._most - len(self._workers), len(self._todo)))
        for worker in self._workers:
            while self._todo and len(worker.waiting) < AHEAD:
                position = self._todo.popleft()
                if not worker.waiting:
                    worker.deadline = time.monotonic() + self._timeout_s
                worker.waiting.append(position)
                worker.send(json.dumps({"path": os.fspath(paths[position])}).encode() + b"\n")
        return any(set(worker.waiting) - {READY} for worker in self._workers)

    def _wait(self) -> list[tuple[_Worker, bool]]:
        """The workers that have replied or died (False), or are past their deadline (True)."""
        busy = [worker for worker in self._workers if worker.waiting]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            soonest = min(self._grow_at, *(worker.deadline for worker in busy))
            ready = [key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))]
        now = time.monotonic()
        return [(worker, worker not in ready) for worker in busy if worker in ready or worker.deadline <= now]

    def _collect(self, worker: _Worker, late: bool) -> Iterator[tuple[int, dict[str, Any], bytes]]:
        try:
            if late:
                raise _Ended
            reply, pixels = worker.receive()
        except _Ended:
            yield from self._bury(worker, late)
            return
        now = time.monotonic()
        worker.deadline = now + self._timeout_s
        position = worker.waiting.popleft()
        if position == READY:
            self._grow_at = now + GROW_S
        else:
            yield position, reply, pixels

    def _bury(self, worker: _Worker, late: bool) -> Iterator[tuple[int, dict[str, Any], bytes]]:
        """Replace a worker; the file that it had in work is tried once more if it crashed, the others go back."""
        status = worker.end()
        if worker.waiting[0] == READY:
            raise PolyclinicError("the processes that read images do not start", "check the installation")
        culprit, *others = worker.waiting
        self._workers.remove(worker)
        self._todo.extendleft(reversed(others))
        self._start(1)
        if late:
            yield culprit, {"reason": Reason.TIMEOUT}, b""
        elif culprit in self._retried:
            yield culprit, {"reason": Reason.CRASHED, "killed": status in (-signal.SIGKILL, -signal.SIGTERM)}, b""
        else:
            self._retried.add(culprit)
            self._todo.appendleft(culprit)
