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
from polyclinic.cohort.quarantine import Entry, Reason, write_quarantine
from polyclinic.enrolment import Join
from polyclinic.study import Study
from polyclinic_client import doctor
from polyclinic_client.doctor import examine, firewall_note
from polyclinic_client.findings import Finding
from polyclinic_client.hospital import Hospital, make_hospital
from polyclinic_client.preview import preview
from polyclinic_client.rehearsal import Pace, Rehearsal
from polyclinic_server import pki
from polyclinic_server.pki import make_authority, make_server

from ..tiny import SIMCLR, tiny_study, write_cohort

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
OURS = make_authority("consortium")
Start = Callable[..., int]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Start]:
    """Starts what stands in for the coordinator's gateway; returns its port."""
    servers: list[http.server.HTTPServer] = []

    def start(
        authority: tuple[bytes, bytes] = OURS, off_s: float = 0.0, status: int = 200, host: str = "localhost"
    ) -> int:
        class Health(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + off_s, usegmt=True))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        key, certificate = make_server(*authority, "consortium", [host, "127.0.0.1"])
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


def join(site: Path, address: str, authority: bytes = OURS[1]) -> None:
    answer = Join(
        name="north", coordinator="consortium", address=address, authority=authority.decode(), bundle=bundle_hash()
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
        "configuration", "data", "decoders", "disk", "memory", "compute", "key", "ledger", "privacy ledger", "studies",
        "version", "answer", "DNS", "TCP", "TLS", "gateway", "clock",
    ]  # fmt: skip
    assert all(finding.level == "PASS" for name, finding in found.items() if name not in ("data", "disk", "memory"))
    assert not [finding for finding in found.values() if finding.level != "PASS" and not finding.fix]


@pytest.mark.parametrize(
    ("limit", "said"), [("100000000\n", "0.1 GB at most, in this container"), ("max\n", "GB free")]
)
def test_memory_is_what_a_container_may_take(
    limit: str, said: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(doctor, "LIMITS", (tmp_path / "memory.max", tmp_path / "of another version"))
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e6)
    found = doctor._memory(Hospital(site))
    assert found.level == "WARN"
    assert found.found.endswith(said)


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


def test_a_wrong_certificate_of_the_coordinators_own_is_not_called_interception(site: Path, gateway: Start) -> None:
    """It is for another name than the one that the site was told."""
    join(site, f"localhost:{gateway(host='elsewhere.example')}")
    found = findings(site)["TLS"]
    assert found.level == "FAIL"
    assert "the coordinator's own certificate, and not right" in found.found
    assert "localhost" in found.found
    assert "intercepts" not in found.found


@pytest.mark.parametrize("what", ["authority", "server"])
def test_a_certificate_that_is_about_to_expire_is_warned_of(
    what: str, site: Path, gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "AUTHORITY_DAYS" if what == "authority" else "SERVER_DAYS", 9)
    authority = make_authority("consortium")
    join(site, f"localhost:{gateway(authority)}", authority[1])
    found = findings(site)["authority" if what == "authority" else "TLS"]
    assert found.level == "WARN"
    assert "expires in 8 days" in found.found
    assert "coordinator" in found.fix


def test_another_version_than_the_coordinators_is_named(site: Path, gateway: Start) -> None:
    join(site, f"localhost:{gateway()}")
    assert findings(site)["version"].level == "PASS"
    path = site / "join.json"
    path.write_text(path.read_text().replace(bundle_hash(), "0" * 64))
    found = findings(site)["version"]
    assert found.level == "FAIL"
    assert "another version" in found.found


def test_kinds_of_files_without_a_decoder_are_named(site: Path, tmp_path: Path) -> None:
    assert findings(site)["decoders"].found == "no images have been read yet"
    hospital = Hospital(site)
    folder = hospital.cohort_for(tiny_study()).folder
    assert findings(site)["decoders"].level == "PASS"
    syntax = "1.2.840.10008.1.2.4.57"
    write_quarantine(folder / "quarantine.csv", [Entry(str(k), Reason.NO_DECODER, "CR", syntax) for k in range(3)])
    found = findings(site)["decoders"]
    assert found.level == "WARN"
    assert "no decoder for 3 files of JPEG Lossless" in found.found
    assert "gpl-decoders" in found.fix


def test_more_threads_than_processors_are_warned_of(site: Path) -> None:
    path = site / "site.toml"
    path.write_text(path.read_text().replace("threads = 0", "threads = 10000"))
    found = findings(site)["compute"]
    assert (found.level, found.fix) == ("WARN", "`threads` in site.toml is 10000: lower it")


def tried(
    site: Path, pace: float, monkeypatch: pytest.MonkeyPatch, *more: Pace, study: Study | None = None
) -> dict[str, Finding]:
    """Findings with a study of the policy's kind whose rounds take so many seconds."""
    made = Rehearsal([Pace("simclr", 2, 20.0, pace), *more], 1500.0, "cpu")
    monkeypatch.setattr(doctor, "rehearse", lambda *_: made)
    (site.parent / "study.toml").write_text((study or tiny_study()).to_toml())
    return {finding.check: finding for finding in examine(site, site.parent / "study.toml")}


def test_a_study_is_tried_on_the_sites_own_images(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(site, 12.0, monkeypatch)
    assert found["study"].found == "within the policy, on 12 images of 6 patients"
    assert found["dry run"].level == "PASS"
    assert "simclr: 20 images a second, 12.0 s a round; 1.5 GB of memory, on the cpu" in found["dry run"].found
    slow = tried(site, 100.0, monkeypatch)["dry run"]  # the study waits 30 s
    assert slow.level == "WARN"
    assert "round_deadline_s" in slow.fix


def test_a_stage_without_labels_here_is_warned_of(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(site, 12.0, monkeypatch, Pace("supervised", 2, 0.0, 0.0))
    assert found["labels"].level == "WARN"
    assert found["labels"].found.startswith("supervised: no patient to train on has its labels here")
    assert "supervised" not in found["dry run"].found
    assert "labels" not in tried(site, 12.0, monkeypatch)


def test_a_site_without_pairs_is_told_what_micle_makes_of_it(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(stages=[SIMCLR, {**SIMCLR, "method": "micle"}])
    assert "pairs" not in tried(site, 12.0, monkeypatch, study=study)
    make_hospital(tmp_path / "other", "south", write_cohort(tmp_path / "single", 6, images=1))
    found = tried(tmp_path / "other", 12.0, monkeypatch, study=study)["pairs"]
    assert (found.level, found.found) == ("WARN", "no patient to train on has two images: micle trains as simclr")
    hospital = Hospital(tmp_path / "other")
    pace = Rehearsal([Pace(name, 2, 20.0, 1.0) for name in ("simclr", "micle")], 1500.0, "cpu")
    monkeypatch.setattr("polyclinic_client.preview.rehearse", lambda *_: pace)
    said = list(preview(hospital, study, hospital.cohort_for(study)).words())
    assert said.count("no patient to train on has two images: micle trains as simclr") == 1


def test_a_study_beyond_the_policy_fails_and_the_network_is_looked_at_all_the_same(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = site / "site.toml"
    path.write_text(path.read_text().replace('"simclr", ', ""))
    found = tried(site, 12.0, monkeypatch)
    assert found["study"].level == "FAIL"
    assert "does not allow simclr" in found["study"].found
    assert "dry run" not in found
    assert list(found)[-1] == "answer"


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
