"""What monitoring reads: counts from the ledger, and whether SuperNode answers."""

import http.server
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from polyclinic_client import monitor
from polyclinic_client.ledger import Ledger
from polyclinic_client.monitor import Meter, Tally, answers, note_health


@pytest.fixture
def node() -> Iterator[int]:
    """The port of what answers as SuperNode does."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()


def written(home: Path) -> dict[str, float]:
    """The samples of metrics.prom, each with a HELP and a TYPE before it."""
    text = (home / "metrics.prom").read_text()
    form = r'# HELP (\w+) .+\n# TYPE \1 (?:gauge|counter)\n\1\{site="north"\} (\S+)\n'
    assert re.sub(form, "", text) == ""
    return {name.removeprefix("polyclinic_site_"): float(value) for name, value in re.findall(form, text)}


def test_a_node_answers_where_it_said(node: int, tmp_path: Path) -> None:
    assert not answers(tmp_path)
    note_health(tmp_path, node, 1)
    assert answers(tmp_path)
    note_health(tmp_path, 1, node)
    assert not answers(tmp_path)
    (tmp_path / "health.json").write_text("{")
    assert not answers(tmp_path)


def test_the_ledger_adds_up(node: int, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    meter = Meter(tmp_path, "north", ledger)
    meter.write(up=False)
    assert written(tmp_path) == {
        "up": 0, "orders_answered_total": 0, "orders_refused_total": 0, "sent_bytes_total": 0
    }  # fmt: skip
    ledger.append({"kind": "query"})
    ledger.append({"kind": "train", "bytes": 1000, "metrics": {"loss": 1.0, "seconds": 12.5}})
    ledger.append({"kind": "train", "error": "not approved"})
    ledger.append({"kind": "query", "error": "no site"})
    note_health(tmp_path, node, 1)
    meter()
    first = written(tmp_path)
    last = first.pop("last_order_timestamp_seconds")
    assert abs(last - datetime.now(UTC).timestamp()) < 5
    assert first == {
        "up": 1, "orders_answered_total": 1, "orders_refused_total": 1, "sent_bytes_total": 1000,
        "last_training_seconds": 12.5,
    }  # fmt: skip


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    ledger, tally = Ledger(tmp_path / "ledger"), Tally()
    for number in range(5):
        ledger.append({"kind": "evaluate", "bytes": number})
        before = tally.position
        assert len(list(ledger.since(before))) == 1
        tally.read(ledger)
        assert tally.position > before
    assert (tally.answered, tally.sent_bytes) == (5, 10)
    with (tmp_path / "ledger" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"kind": "train"')  # half an entry: it has not left
    assert tally.read(ledger).answered == 5


def test_it_is_written_every_now_and_then_and_no_fault_ends_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Meter(tmp_path, "north", Ledger(tmp_path / "ledger"))
    meter()
    (tmp_path / "metrics.prom").unlink()
    meter()
    assert not (tmp_path / "metrics.prom").exists()
    monkeypatch.setattr(monitor, "EVERY_S", 0.0)
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.jsonl").write_text("no JSON\n")
    meter._due = 0.0
    meter()
    assert "was not written" in caplog.text
