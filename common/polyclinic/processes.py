"""Keeping other programs running: started again when they end, with longer and longer waits between."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from polyclinic.errors import StorageError

log = logging.getLogger(__name__)

SHORTEST_S, LONGEST_S = 1.0, 30.0
"""Waits before a program is started again: doubled each time up to the second, until it has run for HEALTHY_S."""
HEALTHY_S = 60.0
GRACE_S = 10.0
"""Between being asked to end and being killed."""
LOG_BYTES = 10_000_000
"""After which a program's output goes to a new file; the one before is kept."""
PR_SET_PDEATHSIG = 1


def with_time(logger: logging.Logger) -> None:
    """Have what a logger tells say when it was."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def _processes() -> Iterator[tuple[int, str, str, int, int]]:
    """(number, name, state, parent, group) of each process on the machine; of none where the system does not say."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            start, _, rest = path.read_text().rpartition(")")
            state, parent, group, *_ = rest.split()
            yield int(path.parent.name), start.partition("(")[2], state, int(parent), int(group)


class Program:
    """One program that is to run. Its children are its own process group, and end with it."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        output: Path,
        environment: Mapping[str, str],
        longest_s: float = LONGEST_S,
    ) -> None:
        self.name, self._command, self._longest_s = name, command, longest_s
        self._output, self._environment = output, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._wait_s, self._start_at, self._started = SHORTEST_S, 0.0, 0.0

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    def tend(self) -> None:
        """Start it if it does not run and its wait is over; notice that it has ended."""
        now = time.monotonic()
        if self._process is not None and (code := self._process.poll()) is not None:
            self._end_group()
            self._wait_s = SHORTEST_S if now - self._started > HEALTHY_S else min(2 * self._wait_s, self._longest_s)
            self._process, self._start_at = None, now + self._wait_s
            log.warning("%s ended with %d; it is started again in %.0f s", self.name, code, self._wait_s)
        if self._process is None and now >= self._start_at:
            try:
                self._start()
            except (OSError, StorageError) as error:  # a full disk
                self._wait_s = min(2 * self._wait_s, self._longest_s)
                self._start_at = now + self._wait_s
                log.warning("%s cannot be started: %s; it is tried again in %.0f s", self.name, error, self._wait_s)

    def _start(self) -> None:
        self._started = time.monotonic()
        if self._output.exists() and self._output.stat().st_size > LOG_BYTES:
            self._output.replace(self._output.with_suffix(".old.log"))
        command = list(self._command())
        self._end_orphans(Path(command[0]).name)
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 (a list that callers build of their own settings)
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._note.write_text(str(self._process.pid))
        log.info("%s runs as process %d", self.name, self._process.pid)

    @property
    def _note(self) -> Path:
        """The process group of the last start, for who starts it after this process was killed."""
        return self._output.with_suffix(".pid")

    def _end_orphans(self, name: str) -> None:
        """End what the last start has left: the kernel ends a program with its keeper, not its children.

        Not after the machine was started again, nor a program that this process has started (as in a container that
        starts again): numbers come back, and belong to others.
        """
        with suppress(OSError, ValueError):
            group, noted = int(self._note.read_text()), self._note.stat().st_mtime
            if sys.platform == "linux" and noted < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME):
                return
            for number, found, _, parent, of in _processes():
                if of == group and parent != os.getpid() and found == name[:15]:
                    with suppress(OSError):
                        os.kill(number, signal.SIGKILL)

    def has_lost_a_child(self) -> bool:
        """Whether one of its children has ended and it has not noticed; False where the system does not say."""
        return any(state == "Z" and parent == self.pid for _, _, state, parent, _ in _processes())

    def stop(self) -> None:
        """End it and its children: asked first, killed after GRACE_S."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._end_group()
        self._process.wait()
        self._process = None

    def _end_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """In the child: be killed when whoever started it is, or a second one would be started beside it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_running(programs: Sequence[Program], meanwhile: Callable[[], None], every_s: float = 0.5) -> None:
    """Tend `programs`, calling `meanwhile` between, until SIGTERM or SIGINT; then stop them, the last first."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not asked:
            for program in programs:
                program.tend()
            meanwhile()
            time.sleep(every_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for program in reversed(programs):
            program.stop()
