"""A stretch of network that can be cut: what a site sends to the coordinator passes through here."""

import math
import select
import socket
import threading
from contextlib import suppress


class Relay:
    """Forwards TCP connections on loopback. While it is cut, nothing passes in either direction and nobody is told.

    Attributes:
        passed: bytes, in both directions.
    """

    def __init__(self, to: int, host: str = "127.0.0.1") -> None:
        self._to = to
        self._listening = socket.create_server((host, 0))
        self.port = int(self._listening.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._open, self.passed, self._counting = True, 0, threading.Lock()
        self._cut_at = math.inf
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, after: int = 0) -> None:
        """Let nothing through any more, or only so many bytes."""
        self._cut_at = self.passed + after
        if not after:
            self._whole.clear()

    @property
    def whole(self) -> bool:
        return self._whole.is_set()

    def mend(self) -> None:
        self._cut_at = math.inf
        self._whole.set()

    def close(self) -> None:
        self._open = False
        self._whole.set()
        self._listening.close()

    def _accept(self) -> None:
        while self._open:
            with suppress(OSError):  # of one connection, which must not be the last; or closed
                near, _ = self._listening.accept()
                threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            other = {near: far, far: near}
            while self._open:
                ready, _, _ = select.select([near, far], [], [], 1.0)
                for end in ready:
                    self._whole.wait()
                    if not (data := end.recv(65_536)):
                        return
                    other[end].sendall(data)
                    with self._counting:
                        self.passed += len(data)
                        if self.passed >= self._cut_at:
                            self._whole.clear()
