"""Memory that a round takes at the coordinator, by number of sites: Polyclinic's fold against Flower's FedAvg.

Each side runs a whole round with its own code, `run_study` and `FedAvg.start`, over the same stand-in for a network:
what is sent stays in memory as long as a message holds it, and a reply comes to be when it is asked for, so that no
site's memory is counted. The global weights are loaded first; the figure is the largest resident set of the round
(VmHWM, reset as it starts) above what stood then. Every figure comes from a process of its own, which has made a round
of a tiny model before, so that no code is loaded for the first time meanwhile. It needs Linux.

As in empty_work.py, `first_tensors` is replaced by one that gives tensors of the wanted size.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from machine import RESULTS, describe, keep
from numpy.typing import NDArray

from polyclinic import wire
from polyclinic.study import resolve
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid

VALUES = 1_000_000
"""Of a float32 tensor of 4 MB."""


class Memory:
    """The largest resident set between `start` and `stop` above that at `start`, bytes."""

    def start(self) -> None:
        """Forget the largest resident set so far (5 to clear_refs, see proc(5)), and note the present one."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def stop(self) -> None:
        """Note the largest since."""
        self.taken = self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def polyclinic(sites: int, model: Mapping[str, NDArray[np.float32]], memory: Memory) -> Mapping[str, Any]:
    """A round of `run_study`, measured from its first event to its last; returns the new weights."""
    study = resolve({"study": {"name": "fold"}, "stages": [{"kind": "pretrain", "method": "simclr", "rounds": 1}]})
    ones = np.ones_like(next(iter(model.values())))

    def answer(message: Message, context: Context) -> Message:
        name = str(context.node_config["site"])
        if message.metadata.message_type == MessageType.QUERY:
            return Message(wire.pack_presence(wire.Presence(name, "0", True, time.time())), reply_to=message)
        content = wire.pack_reply(wire.Reply(study.hash, 0, 1, name, 1, {"loss": 0.0}, {}), None)
        content["update"] = wire.pack_tensors(dict.fromkeys(model, ones))
        return Message(content, reply_to=message)

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "round_started":
            memory.start()
        elif event["event"] == "round_closed":
            memory.stop()

    names = [f"site-{k}" for k in range(sites)]
    with TemporaryDirectory() as folder, patch("polyclinic_server.rounds.first_tensors", return_value=model):
        run = RunDir(Path(folder), listen)
        run.create(study)
        grid = LocalGrid(dict.fromkeys(names, answer))
        return run_study(grid, study, run, dict.fromkeys(names, 1), evaluate=False)


def flower(sites: int, model: Mapping[str, NDArray[np.float32]], memory: Memory) -> Mapping[str, Any]:
    """A round of `FedAvg.start`, from its start to its end; returns the new weights."""

    def answer(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({n: Array(value + np.float32(1)) for n, value in model.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    grid = LocalGrid({f"site-{k}": answer for k in range(sites)})
    weights = ArrayRecord({name: Array(value) for name, value in model.items()})
    memory.start()
    result = strategy.start(grid, weights, num_rounds=1)
    memory.stop()
    return {name: array.numpy() for name, array in result.arrays.items()}


CONTENDERS = {"polyclinic": polyclinic, "flower": flower}


def measure(contender: str, sites: int, tensors: int) -> float:
    """Memory above the global weights, in models; the round must have added 1."""
    CONTENDERS[contender](2, {"t": 2 * np.ones(9, np.float32)}, Memory())
    drawn = (np.random.default_rng(k).standard_normal(VALUES, np.float32) for k in range(tensors))
    model = {f"t{k:02d}": 2 * value for k, value in enumerate(drawn)}  # adding 1 to smaller ones is no honest update
    memory = Memory()
    result = CONTENDERS[contender](sites, model, memory)
    if not all(abs(result[name] - model[name] - 1).max() < 1e-4 for name in model):
        raise SystemExit("the round has not added up")
    return memory.taken / sum(value.nbytes for value in model.values())


def run_one(contender: str, sites: int, tensors: int) -> dict[str, Any]:
    """A figure from a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--sites", str(sites), "--tensors", str(tensors)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    models = float(json.loads(done.stdout))
    taken = round(models * tensors * VALUES * 4 / 1e6)
    return {"contender": contender, "sites": sites, "taken_mb": taken, "taken_models": round(models, 2)}


def main() -> None:
    """Measure and keep; or, with --contender, be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--tensors", type=int, default=25, help="of 4 MB each")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "fold_memory.json")
    wanted = parser.parse_args()
    if wanted.contender:
        print(json.dumps(measure(wanted.contender, wanted.sites[0], wanted.tensors)))
        return
    machine = describe()
    runs = [run_one(name, sites, wanted.tensors) for sites in wanted.sites for name in wanted.contenders]
    keep(wanted.out, machine, {"model_mb": wanted.tensors * VALUES * 4 / 1e6, "runs": runs})


if __name__ == "__main__":
    main()
