"""The Flower ServerApp: thin, since the round loop stands in `rounds`.

Its run configuration names the run directory, which holds the study and `seats.json`, the enrolled sites.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyclinic.artifacts import CLASSIFIER, ENCODER, save_classifier, save_encoder, write_model_card
from polyclinic.errors import CheckpointError, Collapsed, PolyclinicError, Refused
from polyclinic.files import locked, write_atomic
from polyclinic.model import build_stage, encoder_of, load_tensors
from polyclinic.report import read_run, render_report
from polyclinic.stages import Finetune
from polyclinic_server import checkpoints, heads
from polyclinic_server.aggregation.private import EpsilonSpent
from polyclinic_server.heads import Heads
from polyclinic_server.mail import Clock
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import ENDED, REGISTERED, RunDir, last_event

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Lead the study of the run directory to its end, and leave its encoder and report there.

    Flower may start it twice for one run directory; the second leaves at once. What no repetition would mend ends the
    run; anything else leaves it to be started again, from its newest checkpoint.
    """
    run = RunDir(Path(str(context.run_config["run"])))
    with locked(run.path, patience_s=5.0) as free:
        if not free or last_event(run.path) in ENDED:
            return
        try:
            home = run.path.parent.parent  # coordinator/runs/NAME
            lead(grid, run, json.loads((run.path / REGISTERED).read_text()), Heads(home / heads.NAME))
            conclude(run)
        except EpsilonSpent as error:
            run.event("run_failed", problem=error.problem, fix=error.fix)
            conclude(run)
        except (Refused, Collapsed, CheckpointError) as error:
            run.event("run_failed", problem=error.problem, fix=error.fix)
        except PolyclinicError as error:
            run.event("run_interrupted", problem=error.problem, fix=error.fix)
            raise
        except Exception as error:
            run.event("run_interrupted", problem=f"unexpected {type(error).__name__}", fix="see logs/superlink.log")
            raise


def lead(
    grid: Grid,
    run: RunDir,
    registered: dict[str, int] | None = None,
    heads: Heads | None = None,
    clock: Clock | None = None,
) -> None:
    """As `main`, for a run directory that someone listens to; `registered`, `heads`, `clock` are those of `run_study`.

    Raises:
        EpsilonSpent: the study has ended before its last round; the encoder of those that it could afford is there.
    """
    study = run.study
    seats = json.loads((run.path / "seats.json").read_text())
    try:
        tensors = run_study(grid, study, run, seats, registered=registered, heads=heads, clock=clock)
    except EpsilonSpent:
        if found := checkpoints.newest(run.checkpoints, study.hash, lambda text: run.event("warning", text=text)):
            save_encoder(run.path / ENCODER, encoder_of(study, found[1]), study)
        raise
    save_encoder(run.path / ENCODER, encoder_of(study, tensors), study)
    if isinstance(stage := study.stages[-1], Finetune):
        _, classifier = build_stage(study, len(study.stages) - 1)
        load_tensors(classifier, tensors)
        save_classifier(run.path / CLASSIFIER, classifier, study, stage)
    run.event("run_finished", rounds=study.rounds)


def conclude(run: RunDir) -> None:
    """Summary, model card and report of a run across a network, whose images nobody has in one place.

    `federated` in the comparison is what the sites measured on their own test patients with their own probes, weighted
    by patients; it has no interval, since nobody sees all answers. `patients` are those that a site has trained on, as
    far as the gate let it claim them. Under differential privacy no site says either.
    """
    study = run.study
    table = pd.read_csv(run.path / "metrics.csv", keep_default_na=False)
    own = table[table["site"] != ""]
    found = read_run(run.path)
    accepted = {event["site"]: event.get("patients") for event in found.happened("update_accepted")}
    told = {site: patients for site, patients in accepted.items() if patients is not None}
    trained = pd.Series(told, name="weight", dtype=float)
    last = own[own["round"] == study.rounds].pivot(index="site", columns="metric", values="value")
    comparison, notes = {}, []
    probes = ["probe_auc", "probe_balanced_accuracy"]
    probed = last.reindex(columns=probes).dropna().join(trained, how="inner")
    if len(probed):
        areas, balanced = (float(np.average(probed[name], weights=probed["weight"])) for name in probes)
        figures = {"auc": areas, "auc_low": None, "auc_high": None}
        comparison["federated"] = {**figures, "balanced_accuracy": balanced}
        notes.append(f"the sites' own probes: AUC {figures['auc']:.3f}, their mean weighted by patients, no interval")
    classified = last.reindex(columns=["classifier_auc"]).dropna().join(trained, how="inner")
    if len(classified):
        area = np.average(classified["classifier_auc"], weights=classified["weight"])
        notes.append(f"the classifier on the sites' own test patients: AUC {area:.3f}, weighted alike, no interval")
    summary = {
        "study": study.name,
        "hash": study.hash,
        "engine": "deployed",
        "sites": {name: {"patients": told[name]} if name in told else {} for name in accepted},
        "rounds": found.rounds_done,
        "wall_s": round(found.seconds, 1),
        "comparison": comparison,
        "classifier": {},
        "operating": [],
        "notes": notes,
        "warnings": [],
        "bytes_sent": int(table.loc[table["metric"] == "bytes_up", "value"].sum()),
        "epsilon": found.epsilon,
        "versions": {package: version(package) for package in ("polyclinic", "torch", "flwr")},
    }
    write_atomic(run.path / "summary.json", json.dumps(summary, indent=2))
    write_model_card(run.path)
    render_report(run.path)
    run.event("run_reported")
