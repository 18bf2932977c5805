"""The doctor: a healthy site passes, and each fault is named at its own layer with what to do."""

import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join
from polyclinic_client.doctor import Finding, examine, firewall_note
from polyclinic_client.hospital import Hospital, make_hospital
from polyclinic_server.pki import make_authority, make_server

from ..tiny import tiny_study, write_cohort

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
OURS = make_authority("consortium")
Start = Callable[..., int]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Start]:
    """Starts what stands in for the coordinator's gateway; returns its port."""
    servers: list[http.server.HTTPServer] = []

    def start(authority: tuple[bytes, bytes] = OURS, off_s: float = 0.0, status: int = 200) -> int:
        class Health(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + off_s, usegmt=True))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        key, certificate = make_server(*authority, "consortium", ["localhost", "127.0.0.1"])
        (tmp_path / "s.key").write_bytes(key)
        (tmp_path / "s.crt").write_bytes(certificate)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tmp_path / "s.crt", tmp_path / "s.key")
        server = http.server.HTTPServer(("127.0.0.1", 0), Health)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    make_hospital(tmp_path / "site", "north", write_cohort(tmp_path / "images", 6))
    return tmp_path / "site"


def join(site: Path, address: str) -> None:
    answer = Join(
        name="north", coordinator="consortium", address=address, authority=OURS[1].decode(), bundle=bundle_hash()
    )
    (site.parent / "join.json").write_text(answer.model_dump_json())
    Hospital(site).join(site.parent / "join.json")


def findings(site: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(site)}


def test_a_healthy_site_passes(site: Path, gateway: Start) -> None:
    join(site, f"localhost:{gateway()}")
    hospital, study = Hospital(site), tiny_study()
    hospital.approve(study, hospital.cohort_for(study))
    found = findings(site)
    assert list(found) == [
        "configuration", "data", "decoders", "disk", "memory", "key", "ledger", "studies",
        "answer", "DNS", "TCP", "TLS", "gateway", "clock",
    ]  # fmt: skip
    assert all(finding.level == "PASS" for name, finding in found.items() if name not in ("data", "disk", "memory"))
    assert not [finding for finding in found.values() if finding.level != "PASS" and not finding.fix]


def test_data_that_could_be_written_to_is_warned_of(site: Path) -> None:
    found = findings(site)["data"]
    assert (found.level, found.fix) == ("WARN", "mount it read-only: Polyclinic never writes there")


def test_faults_of_the_site_itself(site: Path, tmp_path: Path) -> None:
    (site / "node.key").chmod(0o644)
    assert findings(site)["key"].level == "FAIL"
    (site / "node.key").chmod(0o600)
    make_hospital(tmp_path / "other", "south", tmp_path / "images")
    (site / "node.key").write_bytes((tmp_path / "other" / "node.key").read_bytes())
    assert "is not the one of request.json" in findings(site)["key"].found
    Hospital(site).ledger.append({"kind": "query"})
    (site / "ledger" / "ledger.jsonl").write_text("{}\n")
    assert findings(site)["ledger"].level == "FAIL"
    (tmp_path / "images").rename(tmp_path / "gone")
    assert "cannot be read" in findings(site)["data"].found
    (site / "site.toml").write_text("name = 3")
    assert list(findings(site)) == ["configuration"]


def test_before_the_answer_the_network_is_not_looked_at(site: Path) -> None:
    found = findings(site)
    assert list(found)[-1] == "answer"
    assert found["answer"].level == "FAIL"


@pytest.mark.parametrize(
    ("address", "layer", "says"),
    [("nowhere.invalid:443", "DNS", "has no address"), ("127.0.0.1:1", "TCP", "no connection to 127.0.0.1:1")],
)
def test_the_layer_that_fails_is_named_and_the_last(address: str, layer: str, says: str, site: Path) -> None:
    join(site, address)
    found = findings(site)
    assert list(found)[-1] == layer
    assert found[layer].level == "FAIL"
    assert says in found[layer].found


def test_interception_is_named(site: Path, gateway: Start) -> None:
    join(site, f"localhost:{gateway(make_authority('hospital proxy'))}")
    found = findings(site)
    assert "hospital proxy" in found["TLS"].found
    assert "something intercepts TLS" in found["TLS"].found
    assert list(found)[-1] == "TLS"


@pytest.mark.parametrize(("off_s", "level"), [(-100.0, "WARN"), (600.0, "FAIL"), (5.0, "PASS")])
def test_a_clock_that_is_off(off_s: float, level: str, site: Path, gateway: Start) -> None:
    join(site, f"localhost:{gateway(off_s=off_s)}")
    found = findings(site)["clock"]
    assert found.level == level
    if level != "PASS":
        assert "NTP" in found.fix
        assert ("behind" if off_s > 0 else "ahead of") in found.found


def test_a_gateway_without_superlink(site: Path, gateway: Start) -> None:
    join(site, f"localhost:{gateway(status=502)}")
    assert findings(site)["gateway"].found == "it answers 502"


def test_the_firewall_team_learns_what_it_needs(site: Path) -> None:
    join(site, "polyclinic.example.org:443")
    joined = Hospital(site).joined
    assert joined is not None
    note = firewall_note(joined)
    assert "outbound TCP to polyclinic.example.org port 443. Nothing inbound." in note
    assert max(map(len, note.splitlines())) <= 120
