"""Whatever is killed, stopped or cut off in a round: the study goes on by itself, to the bits of an undisturbed one.

Each fault strikes in round 2 at a moment that is read from what the parties write. A few run in CI, all in `make
chaos`, which shows how long each recovery took.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from polyclinic_client.hospital import Hospital
from polyclinic_server.rundir import ENDED

from .conftest import RECOVERIES
from .consortium import Consortium
from .processes import kill, processes, until, workers
from .runs import each_round_once, events, finished, same_bits

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:GitWildMatchPattern")]

SITE = "beta"
VICTIMS = {
    "SuperLink": ("polyclinic_server.superlink",),
    "ServerApp": ("flwr-serverapp",),
    "gateway": ("nginx: master",),
    "gateway's worker": ("nginx: worker",),
    "SuperNode": ("polyclinic_client.supernode", f"/{SITE}/"),
    "warm process": ("polyclinic_client.warm", f"/{SITE}/"),
    "agent": ("site", "start", SITE),
    "coordinator": ("coordinator", "start"),
    "launch command": ("coordinator", "launch"),
}
"""Words of a command line by which each is found."""
FINDS: dict[str, Callable[[], list[int]]] = {
    **{victim: partial(processes, *words) for victim, words in VICTIMS.items()},
    "training process": partial(workers, SITE),
}
NUMBERS = count(1)
LAUNCHED: list[Path] = []


def _of(run: Path, event: str) -> bool:
    return any(line["round"] == 2 for line in events(run, event))


MOMENTS: dict[str, Callable[[Path, Consortium], bool]] = {
    "sending": lambda run, _: _of(run, "round_started"),
    "training": lambda run, _: _of(run, "round_started") and bool(workers(SITE)),
    "uploading": lambda run, consortium: any(
        entry.get("round") == 2 and entry["time"] > _launched(run) and "tensors" in entry
        for entry in Hospital(consortium.folder / SITE).ledger.entries()
    ),
    "folding": lambda run, _: _of(run, "update_accepted"),
    "checkpointing": lambda run, _: _of(run, "round_closed"),
}
"""When a fault strikes."""


def _launched(run: Path) -> str:
    return str(events(run, "launched")[0]["time"])


def launch(consortium: Consortium) -> tuple[Path, subprocess.Popen[bytes]]:
    """The honest study once more under a name of its own, and the command that follows it.

    One that a failed test has left running is waited for: only one runs at a time.
    """
    until(lambda: all(events(run)[-1]["event"] in ENDED for run in LAUNCHED), 300, "the end of the study before")
    number = next(NUMBERS)
    study = consortium.folder / f"fault-{number}.toml"
    shutil.copy(consortium.folder / "honest.toml", study)
    runs = consortium.home / "runs"
    before = set(runs.iterdir())
    command = [sys.executable, "-m", "polyclinic", "coordinator", "launch", str(study), "--yes"]
    follower = subprocess.Popen(command, cwd=consortium.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (run,) = until(lambda: set(runs.iterdir()) - before, 60, "the launch")
    LAUNCHED.append(run)
    return run, follower


def recovered(run: Path, fault: str, moment: str, struck: float, seen: int, honest: tuple[Path, Path]) -> None:
    """Wait for the end; note how long it took until a round closed, and hold what is promised."""
    closed = ("round_closed", "run_finished")
    until(lambda: any(line["event"] in closed for line in events(run)[seen:]), 280, "progress")
    seconds = time.monotonic() - struck
    finished(run)
    started = [line["round"] for line in events(run, "round_started")]
    redone, same = len(started) - len(set(started)), same_bits(run, honest[1])
    RECOVERIES.append((fault, moment, seconds, redone, same))
    assert same
    assert each_round_once(run)
    assert redone <= 1


CI = {("ServerApp", "folding"), ("SuperNode", "training")}
KILLS = [
    pytest.param(victim, moment, marks=[] if (victim, moment) in CI else pytest.mark.slow)
    for victim in FINDS
    for moment in MOMENTS
    if victim != "training process" or moment in ("training", "uploading")  # it is there at no other time
]


@pytest.mark.parametrize(("victim", "moment"), KILLS)
def test_killed(victim: str, moment: str, honest: tuple[Path, Path], consortium: Consortium) -> None:
    run, follower = launch(consortium)
    until(lambda: MOMENTS[moment](run, consortium), 180, f"round 2, {moment}")
    seen, struck = len(events(run)), time.monotonic()
    kill(FINDS[victim]())
    if victim in ("agent", "coordinator"):  # nobody starts these again but the system that they run on
        name = SITE if victim == "agent" else "coordinator"
        consortium.processes.pop(name).wait(timeout=30)
        consortium.start(name)
    recovered(run, f"{victim} killed", moment, struck, seen, honest)
    assert follower.wait(timeout=60) == (-signal.SIGKILL if victim == "launch command" else 0)


@pytest.mark.slow
def test_an_agent_is_killed_in_the_middle_of_a_reply(honest: tuple[Path, Path], consortium: Consortium) -> None:
    """The coordinator holds a part of the reply, and nobody is left who would send the rest."""
    run, follower = launch(consortium)
    until(lambda: MOMENTS["uploading"](run, consortium), 180, "round 2, uploading")
    consortium.relay.cut(after=4_000_000)  # of 22 MB
    try:
        until(lambda: not consortium.relay.whole, 60, "the middle of the reply")
        seen, struck = len(events(run)), time.monotonic()
        kill(FINDS["agent"]())
        consortium.processes.pop(SITE).wait(timeout=30)
    finally:
        consortium.relay.mend()
    consortium.start(SITE)
    recovered(run, "agent killed", "half sent", struck, seen, honest)
    assert follower.wait(timeout=60) == 0
    assert "while it was sending a reply: it will be asked again" in consortium.log("coordinator")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["SuperLink", "ServerApp", "gateway's worker", "SuperNode", "training process"])
def test_stopped_for_90_seconds(victim: str, honest: tuple[Path, Path], consortium: Consortium) -> None:
    run, follower = launch(consortium)
    until(lambda: MOMENTS["training"](run, consortium), 180, "round 2")
    seen, struck = len(events(run)), time.monotonic()
    stopped = FINDS[victim]()
    kill(stopped, signal.SIGSTOP)
    time.sleep(90.0)
    kill([pid for pid in stopped if Path(f"/proc/{pid}").exists()], signal.SIGCONT)
    recovered(run, f"{victim} stopped 90 s", "training", struck, seen, honest)
    follower.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sites_network_is_cut_for_two_minutes(moment: str, honest: tuple[Path, Path], consortium: Consortium) -> None:
    run, follower = launch(consortium)
    until(lambda: MOMENTS[moment](run, consortium), 180, f"round 2, {moment}")
    seen, struck = len(events(run)), time.monotonic()
    consortium.relay.cut()
    try:
        time.sleep(120.0)
    finally:
        consortium.relay.mend()
    recovered(run, "network cut 2 min", moment, struck, seen, honest)
    follower.wait(timeout=60)


@pytest.mark.slow
def test_a_sites_disk_is_full_for_a_while(honest: tuple[Path, Path], consortium: Consortium, tmp_path: Path) -> None:
    state = consortium.folder / SITE / "state"
    consortium.stop(SITE)
    shutil.copytree(state, tmp_path / "state")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", state], capture_output=True)
    if mounted.returncode:
        consortium.start(SITE)
        pytest.skip("a small disk cannot be mounted here: it takes root")
    try:
        shutil.copytree(tmp_path / "state", state, dirs_exist_ok=True)
        consortium.start(SITE)
        run, follower = launch(consortium)
        until(lambda: MOMENTS["training"](run, consortium), 180, "round 2")
        seen, struck = len(events(run)), time.monotonic()
        with contextlib.suppress(OSError), (state / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(1 << 20)):
                pass
        until(lambda: any("no space" in line["reason"] for line in events(run, "site_lost")), 120, "a full disk")
        (state / "ballast").unlink()
        recovered(run, "full disk", "training", struck, seen, honest)
        follower.wait(timeout=60)
    finally:
        consortium.stop(SITE)
        subprocess.run(["umount", "--lazy", state], check=True)
        consortium.start(SITE)


LEAVING = f"""
from polyclinic_client import app
work = app.answer
def answer(order, tensors, site, progress=None):
    if site.name == "{SITE}" and order.round >= 2:
        raise RuntimeError("gone")
    return work(order, tensors, site, progress)
app.answer = answer
from polyclinic.cli import main
main()
"""


@pytest.mark.slow
def test_a_site_that_leaves_for_good_is_missed_once_and_the_rest_go_on(consortium: Consortium) -> None:
    study = consortium.study("leaving", deadline=60.0)
    consortium.approve(study)
    run = consortium.launch(study)
    until(lambda: _of(run, "round_started"), 180, "round 2")
    consortium.stop(SITE)
    try:
        finished(run)
    finally:
        consortium.start(SITE)
    assert [(line["round"], line["site"]) for line in events(run, "site_missing")] == [(2, SITE)]
    assert [line["accepted"] for line in events(run, "round_closed")] == [3, 2, 2]
    assert same_bits(run, consortium.simulate(study, python=LEAVING))
