"""What a simulator costs when the sites do nothing: five rounds of FedAvg, local work that adds 1 to one tensor.

    bare     a Python loop over numpy arrays: what the arithmetic alone takes
    local    Polyclinic's round loop, gate, fold and checkpoints on its `local` engine
    flower   Flower's FedAvg on its simulation runtime, which runs on Ray

Each contender runs in processes of its own. The first time it is timed from command to end, imports included. Then the
memory of its whole process tree is sampled, which takes time: the sum of proportional set sizes, in which a page that
several processes share is counted once (so nothing else on the machine should have the same libraries in memory). How
much of its libraries the kernel keeps there differs by tens of megabytes from run to run: it is the median of several,
and `peaks_mb` has them all. It needs Linux.

Both simulators send every message through a ClientApp of Flower's. Polyclinic's is its own, with `answer` replaced by
one that adds 1, since there is no model to train; and because a study's tensors come from its encoder, so is
`first_tensors`, by one that gives tensors of the wanted size. So a real run pays on top: importing its encoder's
library (torchvision or timm), opening the cohorts, and at each site and round building the model, hashing the tensors
that came, and keeping the update and the optimizer's moments on disk; then the training and the evaluation.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median_low
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from machine import RESULTS, describe, keep

SIZES = ["8x4", "64x4", "8x100"]
"""Sites x megabytes of the model."""
TENSOR = 250_000
"""Values of a float32 tensor of one megabyte."""
SAMPLE_S = 0.05
PR_SET_CHILD_SUBREAPER = 36
"""Linux: processes that lose their parent become this one's children, and stay in sight."""

Times = dict[str, float]


def bare(sites: int, megabytes: int, rounds: int) -> Times:
    """The running mean of every site's result."""
    import numpy as np

    imported = time.monotonic()
    model = dict(_model(megabytes))
    first = model["t0"].copy()
    for _ in range(rounds):
        mean = {name: np.zeros_like(value) for name, value in model.items()}
        for _ in range(sites):
            for name, value in ({**model, "t0": model["t0"] + 1}).items():
                mean[name] += value / np.float32(sites)
        model = mean
    _check(model["t0"], first, rounds)
    return {"imported": imported, "first_round": imported}


def local(sites: int, megabytes: int, rounds: int) -> Times:
    """Polyclinic's round loop on LocalGrid, its ClientApp at every site."""
    import numpy as np

    from polyclinic.study import resolve
    from polyclinic.wire import Order, Reply, Tensors
    from polyclinic_client.app import make_app
    from polyclinic_client.site import Site
    from polyclinic_server.rounds import run_study
    from polyclinic_server.rundir import RunDir
    from polyclinic_simulations.engines.local import LocalGrid

    imported = time.monotonic()
    stages = [{"kind": "pretrain", "method": "simclr", "rounds": rounds}]
    study = resolve({"study": {"name": "empty"}, "stages": stages})
    model = dict(_model(megabytes))

    nobody = SimpleNamespace()  # a cohort that is never looked at

    def add_one(order: Order, tensors: Tensors, *_: object) -> tuple[Reply, Tensors]:
        update = {n: np.full_like(v, 1 if n == "t0" else 0) for n, v in tensors.items()}
        return Reply(study.hash, order.stage, order.round, order.site, 1, {"loss": 0.0}, {}), update

    names = [f"site-{k}" for k in range(sites)]
    grid = LocalGrid({name: make_app(lambda _, name=name: Site(name, nobody, Path(name))) for name in names})
    given = patch("polyclinic_server.rounds.first_tensors", return_value=model)
    with TemporaryDirectory() as folder, given, patch("polyclinic_client.app.answer", add_one):
        run = RunDir(Path(folder))
        run.create(study)
        first_round = time.monotonic()
        result = run_study(grid, study, run, dict.fromkeys(names, 1), evaluate=False)
    _check(result["t0"], model["t0"], rounds)
    return {"imported": imported, "first_round": first_round}


def flower(sites: int, megabytes: int, rounds: int) -> Times:
    """Flower's FedAvg on `run_simulation`, one processor a site."""
    from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    imported = time.monotonic()
    times = {"imported": imported}
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        arrays["t0"] = arrays["t0"] + 1
        record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        model = dict(_model(megabytes))
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        times["first_round"] = time.monotonic()
        result = strategy.start(grid, ArrayRecord({n: Array(v) for n, v in model.items()}), num_rounds=rounds)
        _check(result.arrays["t0"].numpy(), model["t0"], rounds)

    run_simulation(server, client, sites, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return times


CONTENDERS: dict[str, Callable[[int, int, int], Times]] = {"bare": bare, "local": local, "flower": flower}


def _model(megabytes: int) -> Iterator[tuple[str, Any]]:
    """Named tensors of a megabyte each; large, for an update of 1 to pass the gate."""
    import numpy as np

    generator = np.random.default_rng(0)
    return ((f"t{k}", 2 * generator.standard_normal(TENSOR, np.float32)) for k in range(megabytes))


def _check(result: Any, first: Any, rounds: int) -> None:
    """Every round must have added 1."""
    if not abs(result - first - rounds).max() < 1e-4:
        raise SystemExit("the rounds have not added up")


def run_one(contender: str, sites: int, megabytes: int, rounds: int, watched: int) -> dict[str, Any]:
    """A contender's wall time with its parts, and its peak memory in `watched` runs."""
    options = ["--contender", contender, "--sizes", f"{sites}x{megabytes}", "--rounds", str(rounds)]
    started, ended, times, _ = run(options, watch=False)
    peaks = [round(run(options, watch=True)[3] / 1e6) for _ in range(watched)]
    return {
        "contender": contender,
        "sites": sites,
        "model_mb": megabytes,
        "wall_s": round(ended - started, 2),
        "imports_s": round(times["imported"] - started, 2),
        "before_rounds_s": round(times["first_round"] - times["imported"], 2),
        "rounds_s": round(ended - times["first_round"], 2),
        "peak_mb": median_low(peaks),
        "peaks_mb": peaks,
    }


def run(options: list[str], watch: bool) -> tuple[float, float, Times, int]:
    """Run this file with `options` in a process of its own.

    Returns:
        Its start, its end, the times it noted itself (all of CLOCK_MONOTONIC, the same in all processes), and the peak
        memory of its process tree in bytes, if watched.
    """
    adopt()
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    others, peak = family(), 0
    with TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *options, "--out", str(Path(folder) / "times.json")]
        started = time.monotonic()
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            while watch and process.poll() is None:
                peak = max(peak, sum(proportional(pid) for pid in family() - others))
                time.sleep(SAMPLE_S)
            code = process.wait()
        ended = time.monotonic()
        end(others)
        if code:
            raise SystemExit(f"a contender failed; run it by itself to see why: {' '.join(command)}")
        return started, ended, json.loads((Path(folder) / "times.json").read_text()), peak


def adopt() -> None:
    """Become the parent of descendants that lose theirs."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def family() -> set[int]:
    """All descendants of this process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    family = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    return family - {os.getpid()}


def end(others: set[int]) -> None:
    """End what a contender has left running (Ray's daemons): it would count as the next one's memory."""
    while left := family() - others:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def proportional(pid: int) -> int:
    """Proportional set size of a process, bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    """Measure and keep; or, with --contender, be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="SITESxMB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--watched", type=int, default=5, help="runs in which memory is sampled")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "empty_work.json")
    wanted = parser.parse_args()
    sizes = [(int(sites), int(megabytes)) for sites, megabytes in (size.split("x") for size in wanted.sizes)]
    if wanted.contender:
        (sites, megabytes), *_ = sizes
        wanted.out.write_text(json.dumps(CONTENDERS[wanted.contender](sites, megabytes, wanted.rounds)))
        return
    machine = describe()
    runs = [run_one(name, *size, wanted.rounds, wanted.watched) for size in sizes for name in wanted.contenders]
    keep(wanted.out, machine, {"rounds": wanted.rounds, "runs": runs})


if __name__ == "__main__":
    main()
