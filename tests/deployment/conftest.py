"""A consortium of real processes on loopback: SuperLink, nginx, three SuperNodes, TLS and node authentication on."""

import csv
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from polyclinic.processes import PR_SET_PDEATHSIG
from polyclinic_simulations.phantom import write_site

from .relay import Relay

SITES = ("alpha", "beta", "gamma")
ELSEWHERE = "127.1.1.1"
"""An address of the coordinator's that is no site's own loopback address, which is reached without a proxy."""
RELAYED = "beta"
"""The site whose network can be cut."""
MARK, MINE = "POLYCLINIC_TESTED_BY", str(os.getpid())
"""In the environment of all that the tests start, so that they find and kill no process of somebody else's."""
os.environ[MARK] = MINE
SHOWN_LINES = 15
"""Of each of the members' logs, where a test fails."""
STUDY = """
[study]
name = "{name}"
seed = 3

[images]
size = 32

[encoder]
name = "vit_tiny"

[[stages]]
kind = "pretrain"
method = "mae"
rounds = {rounds}
batch_size = 16

[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 1
batch_size = 16

[evaluation]
rows = []

[aggregation]
min_sites = 2
round_deadline_s = {deadline}
"""


class Consortium:
    """Folders of a coordinator and its sites, and the processes that run for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "coordinator"
        self.port, superlink = free_port(), free_port()
        address = f"127.0.0.1:{self.port}"
        self.superlink = f"https://127.0.0.1:{superlink}"
        ports = ("--listen", address, "--superlink-port", superlink, "--web-port", free_port())
        self.command("coordinator", "init", "--address", address, *ports)
        settings = self.home / "coordinator.toml"
        assert 'hosts = [\n    "127.0.0.1",' in settings.read_text()
        settings.write_text(settings.read_text().replace("hosts = [", f'hosts = [\n    "{ELSEWHERE}",'))
        self.command("coordinator", "renew")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.relay = Relay(self.port)
        for number, name in enumerate(SITES):
            write_site(folder / "images" / name, name, 10, 5, number=number)
            self.command("site", "init", "--name", name, "--data", folder / "images" / name, "--home", name)
            settings = folder / name / "site.toml"
            text = settings.read_text()
            assert "max_orders = 0 " in text
            settings.write_text(text.replace("max_orders = 0 ", "max_orders = 10000 "))  # one study, many runs of it
            self.enrol(name)

    def enrol(self, name: str) -> None:
        """As the coordinator and the site do it over the telephone."""
        shown = self.command("coordinator", "enrol", f"{name}/request.json", "--fingerprint", self.fingerprint(name))
        assert f"site {name}" in shown
        self.command("site", "join", f"join-{name}.json", "--home", name)
        if name == RELAYED:
            joined = self.folder / name / "join.json"
            address = f'"127.0.0.1:{self.port}"'
            assert joined.read_text().count(address) == 1
            joined.write_text(joined.read_text().replace(address, f'"127.0.0.1:{self.relay.port}"'))

    def fingerprint(self, name: str) -> str:
        from polyclinic.enrolment import Request, read_file

        return read_file(self.folder / name / "request.json", Request).fingerprint

    def command(self, *words: object, code: int = 0, python: str = "") -> str:
        """What `polyclinic ...` prints, run as its user would; or what a Python text in its stead does."""
        done = subprocess.run(
            [sys.executable, *(("-c", python) if python else ("-m", "polyclinic")), *map(str, words)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *names: str, environment: dict[str, str] | None = None) -> None:
        """The coordinator, or a site's agent, in the background."""
        for name in names:
            words = ["coordinator", "start"] if name == "coordinator" else ["site", "start", "--home", name]
            with (self.folder / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "polyclinic", *words],
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    preexec_fn=_end_with_the_tests,
                )

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=60)

    def study(self, name: str, rounds: int = 2, deadline: float = 240.0) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(STUDY.format(name=name, rounds=rounds, deadline=deadline))
        return path

    def approve(self, study: Path, *names: str) -> None:
        for name in names or SITES:
            said = self.command("site", "approve", study, "--yes", "--home", name)
            assert "rounds of mae on " in said

    def launch(self, study: Path) -> Path:
        """The run directory of a study that has been launched."""
        said = self.command("coordinator", "launch", study, "--yes", "--no-follow")
        return Path(said.rpartition("launched: ")[2].strip())

    def simulate(self, study: Path, python: str = "", sites: Sequence[str] = SITES) -> Path:
        """The run directory of the same study in simulation."""
        text = study.read_text() + "".join(
            f'\n[[simulation.site]]\nname = "{name}"\ncohort = "images/{name}"\n' for name in sites
        )
        rehearsal = study.with_name(f"rehearsal-{study.name}")
        rehearsal.write_text(text)
        out = self.folder / f"rehearsal-{study.stem}"
        told = ("--data", self.folder, "--state", "state", "--out", out)
        self.command("simulate", rehearsal, *told, python=python)
        return out

    def log(self, name: str) -> str:
        """Everything that a member's processes have written."""
        folder = self.folder / name / "logs"
        return "".join(path.read_text(errors="replace") for path in folder.glob("*.log"))

    def close(self) -> None:
        for name in list(self.processes):
            self.stop(name)
        self.relay.close()


def _end_with_the_tests() -> None:
    """In a child: be told to end when the tests' process is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def events(run: Path, name: str = "") -> list[dict[str, Any]]:
    """Those of a run, or those of one name; none before the first is whole."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if not name or event["event"] == name]


def until(true: Callable[[], Any], patience_s: float, what: str) -> Any:
    """What `true` gives, once that is something."""
    end = time.monotonic() + patience_s
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: waited {patience_s:.0f} s in vain"
        time.sleep(0.1)
    return found


def finished(run: Path, patience_s: float = 280.0) -> list[dict[str, Any]]:
    """All events of a run, once it has ended well."""
    until(lambda: events(run, "run_reported") or events(run, "run_failed"), patience_s, "the run's end")
    assert not events(run, "run_failed"), events(run)
    return events(run)


def processes(*words: str) -> list[int]:
    """Those of the consortium whose command line holds all of `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in line for word in words) and _ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _ours(pid: int) -> bool:
    """Whether the tests started it, or one from which it descends: nginx writes its title over its environment."""
    if f"{MARK}={MINE}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        return True
    parent = _parent(pid)
    return parent > 1 and _ours(parent)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers(site: str) -> list[int]:
    """Those that the site's warm process has forked, each for a message."""
    parents = dict[int, int]()
    for pid in processes("polyclinic_client.warm", f"/{site}/"):
        with suppress(OSError):  # it may have ended since
            parents[pid] = _parent(pid)
    return [pid for pid, parent in parents.items() if parent in parents]


def kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)


def get(consortium: Consortium, path: str, length: int = 0, method: str = "POST") -> int:
    """The gateway's answer to a request for exactly this path, with a body that is said to be so long."""
    context = ssl.create_default_context(cafile=str(consortium.home / "authority.crt"))
    with closing(http.client.HTTPSConnection("127.0.0.1", consortium.port, context=context, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", "127.0.0.1")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        with connection.getresponse() as answer:
            return answer.status


def healthy(consortium: Consortium) -> bool:
    """Does SuperLink answer through the gateway?"""
    try:
        return get(consortium, "/health", method="GET") == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


MADE: list[Consortium] = []
"""What the fixture has made, whether or not it started."""


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Enrolled, joined and started. Without nginx it fails: nothing here is shown by leaving the gateway out."""
    assert shutil.which("nginx"), "nginx is not installed"
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    MADE.append(made)
    made.start("coordinator", *SITES)
    try:
        until(lambda: healthy(made), 60, "the gateway")
        yield made
    finally:
        made.close()


def same_bits(one: Path, other: Path) -> bool:
    names = ("encoder.safetensors", "checkpoints/round-0003.safetensors", "checkpoints/round-0003.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def each_round_once(run: Path) -> bool:
    """Every site's and the consortium's figures of each of three rounds, and none twice."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    keys = [(row["stage"], row["round"], row["site"], row["metric"]) for row in rows]
    losses = {(row["round"], row["site"]) for row in rows if row["metric"] == "loss"}
    return len(keys) == len(set(keys)) and losses == {(str(r), s) for r in (1, 2, 3) for s in ("", *SITES)}


@pytest.fixture(scope="session")
def honest(consortium: Consortium) -> tuple[Path, Path]:
    """(deployed, simulated) run directories of a study of two stages that nothing disturbed."""
    study = consortium.study("honest")
    consortium.approve(study)
    run = consortium.launch(study)
    finished(run)
    return run, consortium.simulate(study)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows which members have been stopped, or ended with what code, and what each has told last."""
    report = yield
    for made in MADE if report.failed else []:
        for name in ("coordinator", *SITES):
            process = made.processes.get(name)
            ended = ": stopped" if process is None else "" if process.poll() is None else f": {process.returncode}"
            for path in (made.folder / f"{name}.log", *sorted((made.folder / name / "logs").glob("*.log"))):
                last = path.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
                report.sections.append((f"{name}{ended}, {path.name}", "\n".join(last)))
    return report


RECOVERIES: list[tuple[str, str, float, int, bool]] = []
"""(fault, moment, seconds until the study has got on, rounds redone, whether the bits are those undisturbed)."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What `make chaos` shows: every fault, and how the study got over it."""
    if RECOVERIES:
        terminalreporter.section("faults")
    for fault, moment, seconds, redone, same in RECOVERIES:
        told = f"recovered in {seconds:5.1f} s, {redone} rounds redone, {'same' if same else 'OTHER'} bits"
        terminalreporter.write_line(f"{fault:24} {moment:14} {told}")
