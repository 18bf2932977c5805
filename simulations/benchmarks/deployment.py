"""What a round costs in deployment when the sites do nothing: Polyclinic's consortium beside plain Flower's.

Real processes on loopback, three sites, the tensors of the same encoder. Plain Flower is SuperLink and SuperNodes as
they start by default, its FedAvg, and the app in `plain_flower/`; without TLS, node authentication, gateway, database,
checkpoints and checks, all of which Polyclinic's side has. Polyclinic's sites have no work either: `without_work/`.

Of each round but the first: seconds from the end of one to the end of the next; processes that are started, found by
looking a hundred times a second; bytes between sites and coordinator, both ways, counted by relays on their way.
It needs Linux and nginx.
"""

import argparse
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from empty_work import adopt, end, family
from machine import RESULTS, describe, keep

from polyclinic.enrolment import Request, read_file
from polyclinic.model import initial_tensors
from polyclinic.study import load_study
from polyclinic_simulations.phantom import write_consortium

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
STUDY = """
[study]
name = "without-work"

[images]
size = 32

[encoder]
name = "vit_tiny"

[[stages]]
kind = "pretrain"
method = "mae"
rounds = {rounds}

[evaluation]
rows = []
every = 0
"""
SAMPLE_S = 0.01
PATIENCE_S = 600.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PATH = os.pathsep.join([str(BIN), os.environ["PATH"]])
"""On which Flower finds the programs that it starts for messages."""

Relay: Any = runpy.run_path(str(HERE.parents[1] / "tests" / "deployment" / "relay.py"))["Relay"]


class Watch:
    """What is counted while the rounds pass: (seconds since 1970, processes seen so far, bytes relayed so far)."""

    def __init__(self, relay: Any) -> None:
        self._relay, self._seen, self._going = relay, family(), True
        self.samples: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._going:
            self._seen |= family()
            self.samples.append((time.time(), len(self._seen), self._relay.passed))
            time.sleep(SAMPLE_S)

    def rounds(self, ends: list[float]) -> list[dict[str, float]]:
        """What each round but the first took, by the times at which rounds ended."""
        self._going = False
        self._thread.join()
        at = [next(sample for sample in self.samples if sample[0] >= end) for end in ends]
        return [
            {
                "seconds": round(ends[k] - ends[k - 1], 2),
                "processes": at[k][1] - at[k - 1][1],
                "megabytes": round((at[k][2] - at[k - 1][2]) / 1e6, 2),
            }
            for k in range(1, len(ends))
        ]


@contextmanager
def started(folder: Path, name: str, command: list[Any], **environment: str) -> Iterator[None]:
    """A program in the background, its output in a file."""
    with (folder / f"{name}.log").open("wb") as log:
        words = list(map(str, command))
        process = subprocess.Popen(
            words, cwd=folder, stdout=log, stderr=log, env={**os.environ, **QUIET, **environment}
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def polyclinic(folder: Path, sites: list[str], rounds: int) -> list[dict[str, float]]:
    """A consortium as its users set it up."""
    port, superlink, web = (free_port() for _ in range(3))

    def do(*words: object) -> str:
        command = [sys.executable, "-m", "polyclinic", *map(str, words)]
        return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    ports = ("--listen", f"127.0.0.1:{port}", "--superlink-port", superlink, "--web-port", web)
    relay = Relay(port)
    do("coordinator", "init", "--address", f"127.0.0.1:{relay.port}", *ports)
    for name in sites:
        do("site", "init", "--name", name, "--data", folder / "images" / name, "--home", name)
        fingerprint = read_file(folder / name / "request.json", Request).fingerprint
        do("coordinator", "enrol", f"{name}/request.json", "--fingerprint", fingerprint)
        do("site", "join", f"join-{name}.json", "--home", name)
        do("site", "approve", "study.toml", "--yes", "--home", name)
    with ExitStack() as running:
        start = [sys.executable, "-m", "polyclinic"]
        running.enter_context(started(folder, "coordinator", [*start, "coordinator", "start"]))
        for name in sites:
            idle = {"PYTHONPATH": os.pathsep.join([str(HERE / "without_work"), os.environ.get("PYTHONPATH", "")])}
            running.enter_context(started(folder, name, [*start, "site", "start", "--home", name], **idle))
        watch = Watch(relay)
        run = (
            folder
            / do("coordinator", "launch", "study.toml", "--yes", "--no-follow").rpartition("launched: ")[2].strip()
        )

        def ends() -> list[float]:
            lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
            events = [json.loads(line) for line in lines if line.endswith("}")]
            closed = [event for event in events if event["event"] == "round_closed"]
            assert all(event["accepted"] == len(sites) for event in closed), closed
            return [datetime.fromisoformat(event["time"]).timestamp() for event in closed]

        return watch.rounds(until(ends, rounds))


def flower(folder: Path, sites: list[str], rounds: int) -> list[dict[str, float]]:
    """SuperLink and SuperNodes as they start by default, over the tensors that Polyclinic sends."""
    port, marks = free_port(), folder / "marks"
    np.savez(folder / "model.npz", allow_pickle=False, **initial_tensors(load_study(folder / "study.toml"), 0, None))
    relay = Relay(port)
    (folder / "config.toml").write_text(f'[superlink.plain]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    with ExitStack() as running:
        link = [BIN / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
        link += ["--host", "127.0.0.1", "--port", port, "--health-server-address", f"127.0.0.1:{free_port()}"]
        running.enter_context(started(folder, "superlink", link, PATH=PATH, FLWR_HOME=str(folder / "flwr")))
        until_open(port)
        for name in sites:
            node = [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{relay.port}"]
            node += ["--host", "127.0.0.1", "--port", free_port()]
            running.enter_context(started(folder, name, node, PATH=PATH, FLWR_HOME=str(folder / f"flwr-{name}")))
        watch = Watch(relay)
        config = f'model="{folder / "model.npz"}" marks="{marks}" sites={len(sites)} rounds={rounds}'
        submit = [BIN / "flwr", "run", HERE / "plain_flower", "plain", "--run-config", config]
        environment = {**os.environ, **QUIET, "PATH": PATH, "FLWR_HOME": str(folder)}
        subprocess.run(
            [str(word) for word in submit], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        return watch.rounds(until(lambda: [*map(float, marks.read_text().split())] if marks.exists() else [], rounds))


CONTENDERS: dict[str, Callable[[Path, list[str], int], list[dict[str, float]]]] = {
    "polyclinic": polyclinic,
    "flower": flower,
}


def until(ends: Callable[[], list[float]], rounds: int) -> list[float]:
    """When the rounds ended, once they all have."""
    patience = time.monotonic() + PATIENCE_S
    while len(found := ends()) < rounds:
        if time.monotonic() > patience:
            raise SystemExit(f"only {len(found)} rounds of {rounds} in {PATIENCE_S:.0f} s")
        time.sleep(0.2)
    time.sleep(2 * SAMPLE_S)
    return found


def until_open(port: int) -> None:
    """Wait for a server on loopback."""
    patience = time.monotonic() + 60
    while time.monotonic() < patience:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise SystemExit("SuperLink does not start")


def free_port() -> int:
    """On loopback."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def measure(contender: str, sites: int, rounds: int) -> dict[str, Any]:
    """A contender's rounds."""
    adopt()
    others = family()
    with TemporaryDirectory() as folder:
        path = Path(folder)
        names = list(write_consortium(path / "images", sites, 10, seed=0))
        (path / "study.toml").write_text(STUDY.format(rounds=rounds))
        try:
            found = CONTENDERS[contender](path, names, rounds)
        finally:
            end(others)
    medians = {name: median(taken[name] for taken in found) for name in found[0]}
    return {"contender": contender, **medians, "rounds": found}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "deployment.json")
    wanted = parser.parse_args()
    machine = describe()
    found = [measure(name, wanted.sites, wanted.rounds) for name in wanted.contenders]
    keep(wanted.out, machine, {"sites": wanted.sites, "contenders": found})


if __name__ == "__main__":
    main()
