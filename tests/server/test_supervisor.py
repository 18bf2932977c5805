"""What the coordinator sees to between: sites registered, runs submitted once, and again where they have died."""

import http.client
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import PolyclinicError
from polyclinic.files import locked
from polyclinic.processes import Program
from polyclinic_server import supervisor as module
from polyclinic_server.home import Home, Settings, make_home
from polyclinic_server.rundir import REGISTERED, RunDir
from polyclinic_server.supervisor import Supervisor

from ..tiny import tiny_study
from .test_overview import make
from .test_web import until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = make_home(tmp_path / "c", Settings("c", "localhost:443", "127.0.0.1:443", 8000, ["localhost"]))
    RunDir(made.path / "runs" / "s-1").create(tiny_study())
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Flower's commands, which here do nothing and succeed."""
    calls: list[tuple[str, ...]] = []

    def flower(home: Home, *arguments: str) -> dict[str, Any]:
        calls.append(arguments)
        return {"node-id": 7, "runs": [{"run-id": 3, "status": "running"}, {"run-id": 2, "status": "finished:failed"}]}

    monkeypatch.setattr(module, "flower", flower)
    return calls


def test_three_programs_are_kept_running(home: Home) -> None:
    programs = {program.name: list(program._command()) for program in Supervisor(home).programs}
    assert list(programs) == ["superlink", "gateway", "page"]
    superlink = programs["superlink"]
    assert superlink[superlink.index("--health-server-address") + 1] == home.settings.health_address
    assert programs["page"][-4:] == ["-m", "polyclinic_server.web", "--home", str(home.path)]


def test_the_page_is_there_while_the_coordinator_runs(tmp_path: Path) -> None:
    home = make(tmp_path / "h")
    page, port = Supervisor(home).programs[-1], home.settings.web_port
    page.tend()
    try:
        until(lambda: reached(port), "the page")
    finally:
        page.stop()
    assert not reached(port)


def reached(port: int) -> bool:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False


def look(at: Supervisor) -> None:
    at._looked = 0.0
    at.look()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_superlink_is_started_again_when_what_starts_serverapps_has_ended(
    home: Home, asked: list[tuple[str, ...]], tmp_path: Path
) -> None:
    """As when it was frozen for long: its SuperExec gives up, and nobody starts that again."""
    lives = ["60", "0"]

    def command() -> list[str]:
        code = "import subprocess, sys, time; child = subprocess.Popen(['sleep', sys.argv[1]]); time.sleep(60)"
        return [sys.executable, "-c", code, lives.pop()]

    supervisor = Supervisor(home)
    superlink = supervisor.programs[0] = Program("superlink", command, tmp_path / "log", {})
    superlink.tend()
    try:
        until(superlink.has_lost_a_child, "the child's end")
        first = superlink.pid
        home.want(home.path / "runs" / "s-1")
        look(supervisor)
        assert asked == []
        superlink.tend()
        assert superlink.pid not in (None, first)
        look(supervisor)
        assert [call[0] for call in asked] == ["run"]
    finally:
        superlink.stop()


def test_a_site_is_registered_once_and_unregistered_when_revoked(home: Home, asked: list[tuple[str, ...]]) -> None:
    home.change("north", public_key="key", patients=10)
    supervisor = Supervisor(home)
    for _ in range(3):
        look(supervisor)
    assert [call[:2] for call in asked] == [("supernode", "register")]
    assert home.sites()["north"].node == 7
    home.revoke("north")
    for _ in range(3):
        look(supervisor)
    assert [call[:3] for call in asked[1:]] == [("supernode", "unregister", "7")]
    assert home.sites()["north"].node == 0


def test_a_run_is_submitted_once_and_again_when_its_serverapp_has_died(
    home: Home, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, supervisor = home.path / "runs" / "s-1", Supervisor(home)
    home.want(run)
    for _ in range(3):
        look(supervisor)
    assert len(asked) == 1  # it is given time to start
    assert asked[0][-1] == f'run="{run}"'
    assert (run / REGISTERED).read_text() == "{}"
    with locked(run):
        for _ in range(3):
            look(supervisor)
    assert len(asked) == 1  # it was at work
    look(supervisor)
    assert len(asked) == 2  # it is not any more
    monkeypatch.setattr(module, "STARTING_S", 0.01)
    time.sleep(0.02)
    supervisor._at_work = 0.0  # long ago
    look(supervisor)
    assert len(asked) == 3  # it never came to be


@pytest.mark.parametrize("end", ["run_reported", "run_failed", "run_stopped"])
def test_a_run_that_has_ended_is_left_alone(end: str, home: Home, asked: list[tuple[str, ...]]) -> None:
    run = home.path / "runs" / "s-1"
    home.want(run)
    RunDir(run).event(end)
    look(Supervisor(home))
    assert asked == []


def test_what_fails_is_tried_again_later(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise PolyclinicError("`flwr run` failed", "see the log")

    monkeypatch.setattr(module, "flower", fails)
    home.want(home.path / "runs" / "s-1")
    supervisor = Supervisor(home)
    look(supervisor)
    assert supervisor._looked > time.monotonic()  # not at once
    assert home.wanted is not None


def test_a_run_that_makes_no_round_is_tried_less_and_less_often(home: Home, asked: list[tuple[str, ...]]) -> None:
    run, supervisor = home.path / "runs" / "s-1", Supervisor(home)
    home.want(run)
    pauses = []
    for _ in range(8):
        supervisor._submitted = supervisor._at_work = 0.0
        look(supervisor)
        pauses.append(supervisor._pause(run))
    assert len(asked) == 8
    assert pauses == [0.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    run.joinpath("checkpoints").mkdir()
    (run / "checkpoints" / "round-0001.json").write_text("{}")
    assert supervisor._pause(run) == 0.0


def test_a_revocation_during_a_registration_stands(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.change("north", public_key="key", patients=10)

    def slow(at: Home, *_: str) -> dict[str, Any]:
        at.revoke("north")
        return {"node-id": 7}

    monkeypatch.setattr(module, "flower", slow)
    look(Supervisor(home))
    found = home.sites()["north"]
    assert (found.revoked, found.node) == (True, 7)  # and is unregistered at the next look


def test_one_site_that_cannot_be_registered_stops_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def flower(at: Home, *arguments: str) -> dict[str, Any]:
        calls.append(arguments)
        if arguments[1] == "register":
            raise PolyclinicError("Public key already in use", "see the log")
        return {}

    monkeypatch.setattr(module, "flower", flower)
    home.change("north", public_key="key", patients=10)
    home.want(home.path / "runs" / "s-1")
    look(Supervisor(home))
    assert [call[0] for call in calls] == ["supernode", "run"]


def test_stopping_without_superlink_can_be_repeated(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise PolyclinicError("no answer", "see the log")

    monkeypatch.setattr(module, "flower", fails)
    run = home.path / "runs" / "s-1"
    home.want(run)
    with pytest.raises(PolyclinicError):
        module.stop_run(home, run)
    assert home.wanted is None  # it is not submitted again
    assert home.launched == run  # and may be asked to stop again


def test_a_stopped_run_is_not_submitted_and_flowers_own_are_ended(home: Home, asked: list[tuple[str, ...]]) -> None:
    run = home.path / "runs" / "s-1"
    home.want(run)
    module.stop_run(home, run)
    look(Supervisor(home))
    assert asked == [("list", "coordinator"), ("stop", "3", "coordinator")]
    assert home.wanted is None
