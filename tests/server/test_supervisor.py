"""What the coordinator sees to between: sites registered, runs submitted once, and again where they have died."""

import time
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import PolyclinicError
from polyclinic.files import locked
from polyclinic_server import supervisor as module
from polyclinic_server.home import Enrolled, Home, Settings, make_home
from polyclinic_server.rundir import RunDir
from polyclinic_server.supervisor import Supervisor

from ..tiny import tiny_study


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


def look(at: Supervisor) -> None:
    at._looked = 0.0
    at.look()


def test_a_site_is_registered_once_and_unregistered_when_revoked(home: Home, asked: list[tuple[str, ...]]) -> None:
    home.keep(Enrolled("north", "key", 10))
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
    with locked(run):
        for _ in range(3):
            look(supervisor)
    assert len(asked) == 1  # it was at work
    look(supervisor)
    assert len(asked) == 2  # it is not any more
    monkeypatch.setattr(module, "STARTING_S", 0.01)
    time.sleep(0.02)
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


def test_a_stopped_run_is_not_submitted_and_flowers_own_are_ended(home: Home, asked: list[tuple[str, ...]]) -> None:
    run = home.path / "runs" / "s-1"
    home.want(run)
    module.stop_run(home, run)
    look(Supervisor(home))
    assert asked == [("list", "coordinator"), ("stop", "3", "coordinator")]
    assert home.wanted is None
