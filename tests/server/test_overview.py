"""What is known of a coordinator: its sites, its run at every stage of it, and SuperLink up, down or silent."""

import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from polyclinic.errors import PolyclinicError
from polyclinic.report import read_run
from polyclinic_server import overview as module
from polyclinic_server.home import Home, Settings, make_home
from polyclinic_server.overview import Overview, duration, overview, superlink_is_up
from polyclinic_server.rundir import RunDir

from ..tiny import SIMCLR, tiny_study

NODES = {"north": 11, "south": 12, "east": 13}
STAGES = [{**SIMCLR, "rounds": 3}, {"kind": "pretrain", "method": "micle", "rounds": 2, "batch_size": 8}]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make(path: Path) -> Home:
    """A coordinator without sites, on ports that nobody else has."""
    ports = [free_port() for _ in range(3)]
    settings = Settings("consortium", "node.example:443", "0.0.0.0:443", ports[0], ["localhost"], *ports[1:])
    return make_home(path, settings)


def play(home: Home, rounds: int, reason: str = "not approved") -> RunDir:
    """A run of five rounds in two stages: `rounds` have closed, one is in flight; south's updates are refused."""
    for name, node in NODES.items():
        home.change(name, public_key="key", patients=10, node=node)
    run = RunDir(home.path / "runs" / "tiny-1")
    run.create(tiny_study(stages=STAGES))
    run.rewind(0)
    home.want(run.path)
    run.event("launched", hash=run.study.hash, sites=list(NODES))
    run.event("submitted")
    run.event("run_started", study="tiny", hash=run.study.hash, rounds=5)
    run.event("site_found", site="north", version="0.1.0", approved=True, clock_ahead_s=0.2)
    run.event("site_found", site="south", version="0.0.9", approved=False, clock_ahead_s=-45.04)
    run.event("site_missing", round=0, site="east")
    for number in range(1, rounds + 2):
        stage = 0 if number <= 3 else 1
        if number <= 5:
            run.event("round_started", round=number, stage=stage, sites=["north", "south"])
        if number > rounds:
            break
        run.metrics(stage, number, "north", {"loss": 4.0 / number, "bytes_up": 1e6, "bytes_down": 2e6})
        run.event("update_accepted", round=number, site="north", norm=1.0, patients=9)
        run.event("update_refused", round=number, site="south", reason=reason)
        run.metrics(stage, number, "", {"loss": 4.0 / number, "accepted": 1, "seconds": 10.0 * number})
        run.metrics(stage, number - 1, "", {"probe_auc": 0.5 + number / 20})
        run.event("round_closed", round=number, seconds=10.0 * number, accepted=1, loss=4.0 / number)
    return run


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make(tmp_path / "c")


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SuperLink serves, and has missed south."""
    nodes = [
        {"node-id": "11", "status": "online", "offline-at": "N/A"},
        {"node-id": "12", "status": "offline", "offline-at": "2026-11-21 16:05:31Z"},
        {"node-id": "13", "status": "registered", "offline-at": "N/A"},
    ]
    monkeypatch.setattr(module, "superlink_is_up", lambda _: True)
    monkeypatch.setattr(module, "flower", lambda *_: {"nodes": nodes})
    module._nodes.cache_clear()
    yield
    module._nodes.cache_clear()


def seen(home: Home) -> Overview:
    return overview(Home(home.path))


def test_nothing_is_known_before_anything_has_happened(home: Home) -> None:
    facts = seen(home)
    assert (facts.sites, facts.run, facts.superlink) == ({}, None, False)
    assert facts.certificate_days == 396
    assert facts.notes == ["SuperLink does not answer: polyclinic coordinator start, or see logs/superlink.log"]


@pytest.mark.usefixtures("up")
def test_a_run_in_flight(home: Home) -> None:
    path = play(home, 4).path
    run = seen(home).run
    assert run is not None
    assert (run.state, run.round, run.at_work, run.rounds) == ("running", 4, 5, 5)
    assert (run.stage, run.stages) == (1, [("simclr", 3), ("micle", 2)])
    assert run.losses == [[(1, 4.0), (2, 2.0), (3, 4 / 3)], [(4, 1.0)]]
    assert [round for round, _ in run.probe] == [0, 1, 2, 3]
    assert (run.round_s, run.left_s) == (25.0, 25.0)  # median of 10, 20, 30, 40
    read = read_run(path)  # the report's own reader agrees
    assert run.round == read.rounds_done
    assert [point for stage in run.losses for point in stage] == read.metrics["loss"][""]
    assert run.probe == read.metrics["probe_auc"][""]
    assert run.hash == read.study.hash


@pytest.mark.usefixtures("up")
def test_a_round_that_is_made_again_is_not_counted_as_closed(home: Home) -> None:
    run = play(home, 4)
    run.event("run_interrupted", problem="the disk is full", fix="free some space")
    facts = seen(home).run
    assert facts is not None
    assert (facts.state, facts.at_work, facts.problem, facts.fix) == (
        "interrupted", None, "the disk is full", "free some space"
    )  # fmt: skip
    run.event("submitted")
    run.event("run_resumed", round=2, rounds=5)
    facts = seen(home).run
    assert facts is not None
    assert (facts.state, facts.round, facts.stage, facts.problem) == ("running", 2, 0, None)


@pytest.mark.usefixtures("up")
@pytest.mark.parametrize(
    ("event", "state"), [("run_failed", "failed"), ("run_stopped", "stopped"), ("run_reported", "finished")]
)
def test_a_run_that_has_ended_goes_on_no_more(event: str, state: str, home: Home) -> None:
    run = play(home, 3)
    run.event(event, problem="p", fix="f")
    run.event("run_interrupted", problem="killed as it was stopped", fix="")
    home.want(None)  # as `coordinator stop` does
    facts = seen(home)
    assert facts.run is not None
    assert (facts.run.state, facts.run.at_work, facts.run.left_s) == (state, None, None)
    assert facts.notes == []


def test_without_superlink_a_run_waits_and_who_is_online_is_not_known(home: Home) -> None:
    play(home, 1)
    facts = seen(home)
    assert facts.run is not None
    assert (facts.run.state, facts.run.at_work, facts.run.left_s) == ("waiting", None, None)
    assert {site.online for site in facts.sites.values()} == {None}
    assert facts.sites["north"].presence == "unknown"


@pytest.mark.usefixtures("up")
def test_sites(home: Home) -> None:
    run = play(home, 4)
    home.change("west", public_key="other", patients=10)
    home.change("left", public_key="third", patients=10, revoked=True)
    sites = seen(home).sites
    assert {name: site.presence for name, site in sites.items()} == {
        "north": "online", "south": "gone 11-21 16:05", "east": "not seen yet", "west": "enrolled", "left": "revoked"
    }  # fmt: skip
    north, south, east = (sites[name] for name in ("north", "south", "east"))
    assert (north.accepted, north.bytes_sent, north.bytes_received) == ([1, 2, 3, 4], 4_000_000, 8_000_000)
    assert (north.approved, north.version, north.clock_is_off, north.trouble) == (True, "0.1.0", False, None)
    assert (south.approved, south.clock_ahead_s, south.clock_is_off) == (False, -45.04, True)
    assert south.trouble == "round 4: left out: not approved"
    assert east.trouble == "at the start: was not there"
    assert (north.epsilon, sites["west"].accepted) == (None, [])
    run.event("site_lost", round=5, site="north", reason="Node Unavailable")
    run.event("update_accepted", round=5, site="south", norm=1.0, patients=9)
    run.metrics(1, 5, "north", {"epsilon": 1.5})
    sites = seen(home).sites
    assert sites["north"].trouble == "round 5: gone: Node Unavailable"
    assert sites["north"].epsilon == 1.5
    assert sites["south"].approved is True  # it has, since


@pytest.mark.usefixtures("up")
def test_what_somebody_should_see_to_is_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    play(home, 1)
    monkeypatch.setattr(module, "days_left", lambda _: 12)
    notes = seen(home).notes
    assert notes[0] == "the certificate ends in 12 days: polyclinic coordinator renew"
    assert [note.split(":")[0] for note in notes[1:]] == [
        "south has not approved the study",
        "the clock of south is off by -45 s",
        "south has version 0.0.9, and this coordinator 0.1.0",
    ]
    home.revoke("south")
    assert not any("south" in note for note in seen(home).notes)


@pytest.mark.usefixtures("up")
def test_flower_is_asked_seldom_and_may_be_silent(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def silent(at: Home, *arguments: str) -> dict[str, Any]:
        calls.append(arguments)
        raise PolyclinicError("no answer", "see the log")

    monkeypatch.setattr(module, "flower", silent)
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr(module, "time", clock)
    play(home, 1)
    for _ in range(3):
        assert seen(home).sites["north"].online is None
    assert calls == [("supernode", "list", "coordinator")]
    clock.monotonic = lambda: 1000.0 + module.ASK_S
    seen(home)
    assert len(calls) == 2


def test_lines_that_are_torn_or_spoilt_are_passed_over(home: Home) -> None:
    run = play(home, 2)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event": "round_cl{"event": "x"}\n{"event": "round_closed", "rou')
    with (run.path / "metrics.csv").open("a") as file:
        file.write("0,3\n0,3,,loss,nan\n0,3,,lo")
    facts = seen(home).run
    assert facts is not None
    assert facts.round == 2
    assert [round for round, _ in facts.losses[0]] == [1, 2]
    assert all(math.isfinite(value) for _, value in facts.losses[0])


def test_a_study_that_cannot_be_read_hides_nothing_else(home: Home) -> None:
    (play(home, 1).path / "study.toml").write_text("[study]\nnam = 1")
    facts = seen(home)
    assert facts.run is None
    assert facts.notes[-1].startswith("the last run cannot be read")
    assert facts.sites["north"].accepted == [1]


def test_superlink_is_up_while_its_health_service_says_so(home: Home) -> None:
    assert not superlink_is_up(home)
    server, health = grpc.server(ThreadPoolExecutor(1)), HealthServicer()
    add_HealthServicer_to_server(health, server)
    server.add_insecure_port(home.settings.health_address)
    server.start()
    try:
        assert superlink_is_up(home)
        health.enter_graceful_shutdown()
        assert not superlink_is_up(home)
    finally:
        server.stop(None).wait()
    assert not superlink_is_up(home)


def test_durations() -> None:
    assert (duration(0.4), duration(754.3), duration(90_000)) == ("0:00:00", "0:12:34", "1 day, 1:00:00")
