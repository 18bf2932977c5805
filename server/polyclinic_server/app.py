"""The Flower ServerApp: thin, since the round loop stands in `rounds`.

Its run configuration names the run directory, which holds the study and `seats.json`, the enrolled sites.
"""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyclinic.artifacts import save_encoder
from polyclinic.model import encoder_of
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Lead the study of the run directory to its end, and leave its encoder there."""
    lead(grid, RunDir(Path(str(context.run_config["run"]))))


def lead(grid: Grid, run: RunDir) -> None:
    """As `main`, for a run directory that someone listens to."""
    study = run.study
    seats = json.loads((run.path / "seats.json").read_text())
    tensors = run_study(grid, study, run, seats)
    save_encoder(run.path / "encoder.safetensors", encoder_of(study, tensors), study)
    run.event("run_finished", rounds=study.rounds)
