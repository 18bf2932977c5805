"""A coordinator's gateway as far as a health check goes, for tests that start no SuperLink."""

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any


class _Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response_only(200 if self.path == "/health" else 403)
        self.send_header("Date", formatdate(time.time(), usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def gateway(home: Path, port: int = 0) -> Iterator[int]:
    """Answers on loopback, with the certificate of the coordinator in `home`; gives the port, a free one if 0."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(home / "server.crt", home / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Health)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """On loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
