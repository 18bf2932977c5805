"""What a hospital's own monitoring reads, as files in the site's folder: no port is opened to anybody.

health.json    where SuperNode answers on loopback: `http`, a URL that gives 200, and `grpc`, host:port of a gRPC health
               service (grpc_health_probe). Both change whenever it is started.
metrics.prom   for the node exporter's textfile collector, which must be let read it; every 15 s. Its age
               (node_textfile_mtime_seconds) tells of an agent that was killed.
"""

import http.client
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from polyclinic.errors import PolyclinicError
from polyclinic.files import atomic, write_atomic
from polyclinic_client.ledger import Ledger

log = logging.getLogger(__name__)

HEALTH, METRICS = "health.json", "metrics.prom"
EVERY_S = 15.0
ANSWER_S = 2.0
"""For which SuperNode's answer is waited for."""
ORDERS = ("train", "evaluate")
"""Kinds of messages that are orders; others ask who the site is."""


def note_health(home: Path, http_port: int, grpc_port: int) -> None:
    """Say where SuperNode will answer."""
    places = {"http": f"http://127.0.0.1:{http_port}/health", "grpc": f"127.0.0.1:{grpc_port}"}
    write_atomic(home / HEALTH, json.dumps(places))


def answers(home: Path) -> bool:
    """Does SuperNode answer where it said that it would? Not whether it reaches the coordinator."""
    try:
        place = json.loads((home / HEALTH).read_text())["http"].split("/")[2]
        connection = http.client.HTTPConnection(place, timeout=ANSWER_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return False


@dataclass
class Tally:
    """What the ledger adds up to; `read` goes on from where it was."""

    answered: int = 0
    refused: int = 0
    sent_bytes: int = 0
    last: dict[str, Any] | None = None
    """The newest entry about an order."""
    trained_s: float | None = None
    """Seconds of the newest training."""
    position: int = 0

    def read(self, ledger: Ledger) -> "Tally":
        """Take in what is new."""
        for entry, end in ledger.since(self.position):
            self.position = end
            self.sent_bytes += entry.get("bytes", 0)
            if entry["kind"].partition(".")[0] in ORDERS:
                self.last = entry
                self.answered += "error" not in entry
                self.refused += "error" in entry
                self.trained_s = entry.get("metrics", {}).get("seconds", self.trained_s)
        return self


class Meter:
    """Writes metrics.prom whenever it is called and EVERY_S has passed."""

    def __init__(self, home: Path, site: str, ledger: Ledger) -> None:
        self._home, self._site, self._ledger = home, site, ledger
        self._tally, self._due = Tally(), 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            self.write(answers(self._home))

    def write(self, up: bool) -> None:
        """Now; what goes wrong is logged, since the node is not to end by it."""
        try:
            text = "".join(self._lines(up, self._tally.read(self._ledger)))
            with atomic(self._home / METRICS, durable=False) as file:
                file.write(text.encode())
        except (OSError, ValueError, KeyError, PolyclinicError) as error:
            log.warning("%s was not written: %s", METRICS, type(error).__name__)

    def _lines(self, up: bool, tally: Tally) -> Iterator[str]:
        """In Prometheus's text format."""
        last = datetime.fromisoformat(tally.last["time"]).timestamp() if tally.last else None
        for name, kind, meaning, value in (
            ("up", "gauge", "Whether SuperNode runs and answers.", int(up)),
            ("orders_answered_total", "counter", "Orders that were carried out and answered.", tally.answered),
            ("orders_refused_total", "counter", "Orders that were refused, or failed.", tally.refused),
            ("sent_bytes_total", "counter", "Bytes of weights that have left.", tally.sent_bytes),
            ("last_order_timestamp_seconds", "gauge", "When the newest order was answered or refused.", last),
            ("last_training_seconds", "gauge", "Duration of the newest training.", tally.trained_s),
        ):
            if value is not None:
                full = f"polyclinic_site_{name}"
                yield f"# HELP {full} {meaning}\n# TYPE {full} {kind}\n"
                yield f'{full}{{site="{self._site}"}} {value}\n'
