"""What test_ray.py runs in processes of its own: `ray_script.py WHAT FOLDER`."""

import json
import os
import sys
from pathlib import Path

from polyclinic.cohort import build_cohort
from polyclinic.errors import QuorumLost
from polyclinic.files import write_atomic
from polyclinic_client.app import make_app
from polyclinic_client.site import open_site, write_site
from polyclinic_server.app import lead
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid
from polyclinic_simulations.engines.ray import run_ray

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.tiny import SIMCLR, open_run, tiny_study, write_cohort

PATIENCE = {"round_deadline_s": 300.0}


def prepare(folder: Path, engine: str, **changes: object) -> tuple[RunDir, list[Path]]:
    """A run directory with the sites east and north."""
    run = open_run(folder / engine, tiny_study(**changes))
    sites = []
    for number, name in enumerate(("east", "north")):
        source = folder / "data" / name
        if not source.exists():
            write_cohort(source, 12, seed=number)
        cohort = build_cohort(source, run.study.images, folder / "state", workers=1)
        sites.append(run.path / "sites" / name)
        write_site(sites[-1], name, cohort.folder)
    write_atomic(run.path / "seats.json", json.dumps({"east": 12, "north": 12}))
    return run, sites


def both(folder: Path) -> None:
    """The same study with both engines."""
    environment = dict(os.environ)
    local, folders = prepare(folder, "local", aggregation=PATIENCE)
    lead(LocalGrid({path.name: make_app(lambda _, path=path: open_site(path)) for path in folders}), local)
    ray, folders = prepare(folder, "ray", aggregation=PATIENCE)
    run_ray(ray, folders, 1)
    print(*(name for name in ("PYTHONPATH", "FLWR_HOME") if os.environ.get(name) != environment.get(name)))


def quorum(folder: Path) -> None:
    """One of two sites claims more patients than it enrolled with, and both are needed."""
    run, folders = prepare(folder, "quorum", aggregation=PATIENCE)
    write_atomic(run.path / "seats.json", json.dumps({"east": 12, "north": 1}))
    try:
        run_ray(run, folders, 1)
    except QuorumLost as error:
        print(error.problem)


def endless(folder: Path) -> None:
    """Rounds that nobody waits for: the parent sends SIGINT."""
    run, folders = prepare(folder, "ray", aggregation=PATIENCE, stages=[{**SIMCLR, "local_epochs": 1_000}])
    try:
        run_ray(run, folders, 1)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    for what in {"engines": (both, quorum), "endless": (endless,)}[sys.argv[1]]:
        what(Path(sys.argv[2]))
