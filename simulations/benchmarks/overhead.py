"""What federation costs: a study on the `local` engine against the bare training loops of its sites.

Both train the same sites, batches and rounds in one process. They take turns round by round, so that whatever else
the machine does falls on both: whenever the engine closes a round, the same round is trained bare. An engine's round is
timed from one close to the next and so holds one checkpoint; the total also holds what comes before the first round
and after the last.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from flwr.app import Context
from machine import RESULTS, describe, keep
from torch import Tensor

from polyclinic.model import build_stage
from polyclinic.seeding import seed_for
from polyclinic.study import Study, resolve
from polyclinic.training import train
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


class Turns:
    """Listens to the engine; each time it closes a round, trains that round bare. Seconds of both, round by round."""

    def __init__(self, bare: Bare) -> None:
        self._bare = bare
        self.engine_s: list[float] = []
        self.bare_s: list[float] = []
        self.images: list[int] = []
        self._since = perf_counter()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "round_closed":
            return
        closed = perf_counter()
        self.engine_s.append(closed - self._since)
        self.images.append(self._bare.round(event["round"]))
        self._since = perf_counter()
        self.bare_s.append(self._since - closed)

    def end(self) -> None:
        """Note the time that the engine took after its last round."""
        self.engine_s.append(perf_counter() - self._since)


def measure(folder: Path, sites: int, patients: int, rounds: int, threads: int) -> dict[str, Any]:
    """Generate the sites' archives in `folder`, read them, run the study."""
    images = write_consortium(folder / "archives", sites, patients, seed=0)
    study = make_study(list(images), rounds, threads)
    seats = settle(gather(study, folder / "archives", folder / "state", lambda *_: None), study, folder / "run")
    bare = Bare(study, seats)
    bare.round(1)  # torch loads and plans at its first steps; neither side shall pay for that
    turns = Turns(Bare(study, seats))
    run = RunDir(folder / "run", turns)
    run.create(study)
    grid = LocalGrid({name: make_app(partial(_given, site)) for name, site in seats.items()})
    run_study(grid, study, run, {name: site.cohort.n_patients for name, site in seats.items()}, evaluate=False)
    turns.end()
    rows = [float(line.rsplit(",", 1)[1]) for line in _metrics(folder / "run", "images")]
    assert sum(rows) == sum(turns.images), "both sides must have trained on the same images"
    return _figures(turns, sites)


def _given(site: Site, context: Context) -> Site:
    return site


def _metrics(run: Path, metric: str) -> list[str]:
    return [line for line in (run / "metrics.csv").read_text().splitlines() if f",{metric}," in line]


def _figures(turns: Turns, sites: int) -> dict[str, Any]:
    ratios = [engine / bare for engine, bare in zip(turns.engine_s[1:-1], turns.bare_s[1:], strict=True)]
    engine, bare, rounds = sum(turns.engine_s), sum(turns.bare_s), len(turns.bare_s)
    return {
        "images_a_site_and_round": round(turns.images[0] / sites),
        "images_per_s": round(sum(turns.images) / bare, 1),
        "engine_s": [round(s, 3) for s in turns.engine_s],
        "bare_s": [round(s, 3) for s in turns.bare_s],
        "overhead_a_site_and_round_s": round((engine - bare) / rounds / sites, 3),
        "ratio_median_of_rounds": round(median(ratios), 4),
        "ratio_of_totals": round(engine / bare, 4),
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
