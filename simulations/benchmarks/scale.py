"""Many sites on one machine: whole studies of 10, 100 and 1,000 sites, and the same ones by plain Flower.

    local, ray   a study by `simulate`, from the files of its cohort to the report
    flower       FedAvg on Flower's simulation runtime (plain_flower/pretrain.py): no gate, checkpoint, resume or report

SimCLR over sites of four patients with one image of 32 px each, three of whom are trained on: one step a round, so that
nearly all that is timed is what a site costs beside its training. `small` is an encoder of 0.2 million weights in place
of ViT-Ti (small_encoder/), whose 5.4 million are `vit_tiny`. Each row runs in a process of its own:

    setup_s           from its start to the first round's: imports, and with `local` and `ray` the cohort and its cards
    rounds_s          of each round
    training_s        that the sites report of a site and round after the first; with `flower` the model is built in it
    overhead_s        the rest of a site and round after the first, in which Flower's runtime starts its processes:
                      rounds_s over the sites, less training_s over those that train abreast
    processor_s       of all processes for a site and round after the first: neighbours disturb it less than the clock
    leader_s          of that, what the one process takes through which every answer goes: it asks, checks and folds
    after_s           from the last round's end: the sites' last measurement and the report
    peak_mb           of the whole process tree, sampled: pages that processes share are counted once (empty_work.py)
    written_mb        to disk by all of them, by the kernel's account; a file that is removed in time is never written
    kept_mb           in the run directory after the last round, before what no longer serves is removed

A row that stands in the file of results is not made again. Needs Linux and the ray extra.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from empty_work import adopt, end, family, proportional
from machine import RESULTS, describe, keep
from PIL import Image

from polyclinic.study import Study, resolve

HERE = Path(__file__).parent
SITES = [10, 100, 1000]
SIZE = 32
PATIENTS, TRAINED = 4, 3
"""Of a site, one image each: by `[evaluation] test_fraction` one of them is held out."""
CONTENDERS = ("local", "ray", "flower")
ENCODERS = ("small", "vit_tiny")
SAMPLE_S = 0.5


def make_study(sites: int, rounds: int) -> Study:
    """SimCLR of a Vision Transformer, without rows to compare with."""
    stage = {"kind": "pretrain", "method": "simclr", "rounds": rounds, "views": {"elastic": 0.0, "equalise": 0.0}}
    return resolve(
        {
            "study": {"name": "scale"},
            "images": {"size": SIZE},
            "encoder": {"name": "vit_tiny"},
            "stages": [stage],
            "compute": {"precision": "fp32"},
            "evaluation": {"rows": [], "every": 0},
            "simulation": {"sites": sites, "cohort": "images"},
        }
    )


def write_images(folder: Path, count: int) -> None:
    """A cohort of blobs in noise, each image a patient of its own; the words in its table are no class."""
    rng = np.random.default_rng(0)
    axis = np.arange(SIZE) - SIZE / 2
    folder.mkdir(parents=True)
    for number in range(count):
        x, y, width = rng.uniform((-8, -8, 4), 8)
        blob = np.exp(-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / width**2)
        grey = 160 * blob + rng.uniform(0, 90, (SIZE, SIZE))
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"{number:05d}.png")
    lines = [f"{number:05d}.png,p{number:05d}" for number in range(count)]
    (folder / "labels.csv").write_text("\n".join(["image,patient", *lines]) + "\n")


def ours(engine: str, sites: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The study on one of the engines: marks, seconds of training by round, megabytes kept."""
    from polyclinic_simulations.display import Display
    from polyclinic_simulations.simulate import simulate

    times: dict[str, Any] = {"imported": time.monotonic(), "marks": []}
    run = folder / "run"

    def listen(event: Mapping[str, Any]) -> None:
        display.event(event)
        if event["event"] == "round_closed" or (event["event"] == "round_started" and not times["marks"]):
            times["marks"].append(time.monotonic())
        if event["event"] == "run_finished":
            times["kept_mb"] = round(sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e6)

    with Display() as display:
        study = make_study(sites, rounds)
        simulate(study, run, folder, folder / "state", engine=engine, listen=listen, reading=display.reading)
    table = pd.read_csv(run / "metrics.csv")
    told = table[(table["metric"] == "seconds") & table["site"].notna()]
    return {**times, "trained_s": told.groupby("round")["value"].sum().tolist()}


def flower(sites: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Plain Flower: marks, and seconds of training by round."""
    sys.path.insert(0, str(HERE / "plain_flower"))
    from pretrain import run  # type: ignore[import-not-found]

    times: dict[str, Any] = {"imported": time.monotonic()}
    times["marks"], times["trained_s"] = run(sites, rounds, folder / "images")
    return times


def run_one(contender: str, encoder: str, sites: int, rounds: int, cores: int) -> dict[str, Any]:
    """A row, from a process of its own whose whole tree is watched."""
    adopt()
    load = round(os.getloadavg()[0], 1)
    others, peak = family(), 0
    written: dict[int, int] = {}
    computed: dict[int, float] = {}
    course: list[tuple[float, float, float]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", sites * PATIENTS)
        paths = [HERE, HERE / "plain_flower", *([HERE / "small_encoder"] if encoder == "small" else [])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        size = ["--sites", str(sites), "--rounds", str(rounds)]
        command = [sys.executable, __file__, "--contender", contender, "--folder", name, *size]
        started = time.monotonic()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                here = family() - others
                peak = max(peak, sum(proportional(pid) for pid in here))
                written |= {pid: count for pid in here if (count := bytes_written(pid)) is not None}
                computed |= {pid: seconds for pid in here if (seconds := processor_seconds(pid)) is not None}
                course.append((time.monotonic(), sum(computed.values()), computed.get(process.pid, 0.0)))
                time.sleep(SAMPLE_S)
            code = process.wait()
        ended = time.monotonic()
        end(others)
        if code:
            raise SystemExit(f"a contender failed: {contender}, {encoder}, {sites} sites")
        times = json.loads((folder / "times.json").read_text())
    abreast = 1 if contender == "local" else cores
    return {
        "contender": contender,
        "encoder": encoder,
        "sites": sites,
        **figures(times, started, ended, course, sites, abreast),
        "peak_mb": round(peak / 1e6),
        "written_mb": round(sum(written.values()) / 1e6),
        "kept_mb": times.get("kept_mb", 0),
        "load": load,
    }


def figures(
    times: Mapping[str, Any],
    started: float,
    ended: float,
    course: list[tuple[float, float, float]],
    sites: int,
    abreast: int,
) -> dict[str, Any]:
    """What the marks of a row come to; `abreast` sites train at once.

    `course` holds seconds of the clock, each with the seconds of the processor that all processes and the leading one
    had used by then.
    """
    marks = times["marks"]
    later = len(marks) - 2
    training_s = sum(times["trained_s"][1:]) / sites / later
    clock, *computed = np.array(course).T
    used = [np.interp([marks[1], marks[-1]], clock, seconds) for seconds in computed]
    processor_s, leader_s = (round(float(last - first) / later / sites, 4) for first, last in used)
    return {
        "setup_s": round(marks[0] - started, 2),
        "imports_s": round(times["imported"] - started, 2),
        "rounds_s": [round(after - before, 2) for before, after in pairwise(marks)],
        "training_s": round(training_s, 4),
        "overhead_s": round((marks[-1] - marks[1]) / later / sites - training_s / abreast, 4),
        "processor_s": processor_s,
        "leader_s": leader_s,
        "after_s": round(ended - marks[-1], 2),
        "wall_s": round(ended - started, 2),
    }


def bytes_written(pid: int) -> int | None:
    """By a process to disk so far, bytes; None once it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)
    return None


def processor_seconds(pid: int) -> float | None:
    """That a process has computed so far, in all its threads; None once it has ended."""
    with suppress(OSError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return None


def main() -> None:
    """Measure and keep; or, with --contender, be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=SITES)
    parser.add_argument("--rounds", type=int, default=3, help="two at least")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=["small"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    wanted = parser.parse_args()
    if wanted.contender:
        size = wanted.sites[0], wanted.rounds, wanted.folder
        times = flower(*size) if wanted.contender == "flower" else ours(wanted.contender, *size)
        (wanted.folder / "times.json").write_text(json.dumps(times))
        return
    machine = describe()
    rows = json.loads(wanted.out.read_text())["rows"] if wanted.out.exists() else []
    for encoder in wanted.encoders:
        for sites in wanted.sites:
            for contender in wanted.contenders:
                key = {"contender": contender, "encoder": encoder, "sites": sites}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(run_one(contender, encoder, sites, wanted.rounds, machine["cores"]))
                keep(wanted.out, machine, {"rows": rows})


if __name__ == "__main__":
    main()
