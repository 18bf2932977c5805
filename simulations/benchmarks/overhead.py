"""What federation costs: a study on the `local` engine against the bare training loops of its sites.

Both train the same sites, batches and rounds in one process. They take turns round by round, so that whatever else
the machine does falls on both: whenever the engine closes a round, the same round is trained bare. An engine's round is
timed from one close to the next and so holds one checkpoint; the totals also hold what comes before the first round
and after the last. Seconds of the processor stand beside those of the clock: neighbours disturb them less, but they
leave out waiting for the disk.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
from flwr.app import Context
from machine import RESULTS, describe, keep
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.model import build_stage
from polyclinic.seeding import seed_for
from polyclinic.study import Study, resolve
from polyclinic.training import train, use_threads
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.consortium import gather, settle
from polyclinic_simulations.engines.local import LocalGrid
from polyclinic_simulations.phantom import write_consortium


def make_study(sites: list[str], rounds: int, threads: int) -> Study:
    """SimCLR of a ResNet-18 at 96 px, without evaluation."""
    return resolve(
        {
            "study": {"name": "overhead"},
            "stages": [{"kind": "pretrain", "method": "simclr", "rounds": rounds}],
            "compute": {"threads": threads},
            "simulation": {"site": [{"name": name, "cohort": name} for name in sites]},
        }
    )


class Bare:
    """The training loops of all sites on one module: nothing is sent, averaged, checked or stored."""

    def __init__(self, study: Study, sites: Mapping[str, Site]) -> None:
        self._study = study
        self._method, self._module = build_stage(study, 0)
        self._cohorts = {name: site.split(study)[0] for name, site in sites.items()}
        self._moments: dict[str, dict[str, Tensor]] = {}

    def round(self, number: int) -> int:
        """Train a round at every site; returns the images read."""
        images = 0
        with use_threads(self._study.compute):
            for name, cohort in self._cohorts.items():
                trained, self._moments[name] = train(
                    self._module,
                    self._method,
                    cohort,
                    self._study.stages[0],
                    self._study.compute,
                    stage_round=number - 1,
                    seed=seed_for(self._study.seed, "round", site=name, stage=0, round=number),
                    optimizer_state=self._moments.get(name),
                )
                images += trained.images
        return images


def clock() -> NDArray[np.float64]:
    """Seconds of the clock, and of the processor in this process."""
    return np.array([perf_counter(), process_time()])


class Turns:
    """Listens to the engine; each time it closes a round, trains that round bare.

    Attributes:
        engine, bare: what each round took, by `clock`; the engine's last entry is what it took after its last round.
        images: read in each bare round.
    """

    def __init__(self, bare: Bare) -> None:
        self._bare = bare
        self.engine: list[NDArray[np.float64]] = []
        self.bare: list[NDArray[np.float64]] = []
        self.images: list[int] = []
        self._since = clock()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "round_closed":
            return
        closed = clock()
        self.engine.append(closed - self._since)
        self.images.append(self._bare.round(event["round"]))
        self._since = clock()
        self.bare.append(self._since - closed)

    def end(self) -> None:
        """The engine is done."""
        self.engine.append(clock() - self._since)


def measure(folder: Path, sites: int, patients: int, rounds: int, threads: int) -> dict[str, Any]:
    """Generate the sites' archives in `folder`, read them, run the study."""
    images = write_consortium(folder / "archives", sites, patients, seed=0)
    study = make_study(list(images), rounds, threads)
    members = gather(study, folder / "archives", folder / "state", lambda *_: None)
    RunDir(folder / "run").create(study)
    seats = settle(members, study, RunDir(folder / "run"))
    bare = Bare(study, seats)
    bare.round(1)  # torch loads and plans at its first steps; neither side shall pay for that
    turns = Turns(Bare(study, seats))
    run = RunDir(folder / "run", turns)
    grid = LocalGrid({name: make_app(partial(_given, site)) for name, site in seats.items()})
    run_study(grid, study, run, {name: site.cohort.n_patients for name, site in seats.items()}, evaluate=False)
    turns.end()
    rows = [float(line.rsplit(",", 1)[1]) for line in _metrics(folder / "run", "images")]
    assert sum(rows) == sum(turns.images), "both sides must have trained on the same images"
    return figures(turns, sites)


def _given(site: Site, context: Context) -> Site:
    return site


def _metrics(run: Path, metric: str) -> list[str]:
    return [line for line in (run / "metrics.csv").read_text().splitlines() if f",{metric}," in line]


def figures(turns: Turns, sites: int) -> dict[str, Any]:
    """The rounds of both sides, and their ratios."""
    engine, bare = np.array(turns.engine), np.array(turns.bare)  # (rounds + 1, 2), (rounds, 2)
    extra_s = (engine.sum(axis=0) - bare.sum(axis=0)) / len(bare) / sites
    ratios = engine.sum(axis=0) / bare.sum(axis=0)
    return {
        "images_a_site_and_round": round(turns.images[0] / sites),
        "bare_images_per_s": round(sum(turns.images) / bare[:, 0].sum(), 1),
        "engine_s": engine[:, 0].round(2).tolist(),
        "bare_s": bare[:, 0].round(2).tolist(),
        "ratio_median_of_rounds": round(median((engine[1:-1, 0] / bare[1:, 0]).tolist()), 4),
        "ratio_of_totals": round(float(ratios[0]), 4),
        "ratio_of_processor_totals": round(float(ratios[1]), 4),
        "extra_s_a_site_and_round": round(float(extra_s[0]), 3),
        "extra_processor_s_a_site_and_round": round(float(extra_s[1]), 3),
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--patients", type=int, default=400, help="of each site, 1 to 4 images each, 30 %% held out")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is a study's default")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    wanted = parser.parse_args()
    machine = describe()
    size = {name: getattr(wanted, name) for name in ("sites", "patients", "rounds", "threads")}
    with TemporaryDirectory() as folder:
        keep(wanted.out, machine, {**size, **measure(Path(folder), **size)})


if __name__ == "__main__":
    main()
