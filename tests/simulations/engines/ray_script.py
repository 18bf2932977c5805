"""What test_ray.py runs in processes of its own: `ray_script.py WHAT FOLDER`."""

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from tests.tiny import SIMCLR, tiny_study, write_cohort

PATIENTS = {"east": 12, "north": 12}


def prepare(folder: Path, engine: str, **stage: int) -> tuple[RunDir, list[Path]]:
    """A run directory with two sites; after round 2 the second of them cannot store anything any more."""
    sites = [folder / engine / "sites" / name for name in PATIENTS]

    def sabotage(line: dict[str, Any]) -> None:
        if line["event"] == "round_closed" and line["round"] == 2:
            (state,) = (path for path in sites[1].iterdir() if path.is_dir())
            state.rename(folder / f"{engine} aside")
            state.write_text("a file where a folder should be")

    run = RunDir(folder / engine, sabotage)
    patience = {"round_deadline_s": 300.0}
    run.create(
        tiny_study(encoder={"name": "vit_tiny"}, aggregation=patience, stages=[{**SIMCLR, "rounds": 3, **stage}])
    )
    for number, site in enumerate(sites):
        if not (source := folder / "data" / site.name).exists():
            write_cohort(source, PATIENTS[site.name], seed=number)
        write_site(site, site.name, build_cohort(source, run.study.images, folder / "state", workers=1).folder)
    write_atomic(run.path / "seats.json", json.dumps(PATIENTS))
    return run, sites


def local(run: RunDir, folders: list[Path]) -> None:
    lead(LocalGrid({path.name: make_app(lambda _, path=path: open_site(path)) for path in folders}), run)


def engines(folder: Path) -> None:
    """The same study with both engines, until the quorum is lost."""
    leads: dict[str, Callable[[RunDir, list[Path]], None]] = {"local": local, "ray": lambda r, f: run_ray(r, f, 1)}
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "FLWR_HOME")}
    for engine, lead_it in leads.items():
        try:
            lead_it(*prepare(folder, engine))
        except QuorumLost as error:
            print(error.problem)
    print("environment changed:", [name for name, value in before.items() if os.environ.get(name) != value])


def endless(folder: Path) -> None:
    """Rounds that nobody waits for: the parent sends SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs behind ignore it
    run, folders = prepare(folder, "ray", local_epochs=1_000)
    try:
        run_ray(run, folders, 1)
    except KeyboardInterrupt:
        print("stopped")


def sending(*args: Any, **kwargs: Any) -> None:
    print("something was sent to", getattr(args[0], "full_url", args[0]))


if __name__ == "__main__":
    urllib.request.urlopen = sending  # type: ignore[assignment]
    {"engines": engines, "endless": endless}[sys.argv[1]](Path(sys.argv[2]))
