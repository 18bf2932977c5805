"""The deployed ServerApp: leads the study of the run directory that its configuration names."""

import json
import tomllib
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, RecordDict

from polyclinic.artifacts import load_tensors
from polyclinic_server import rundir
from polyclinic_server.app import app, conclude
from polyclinic_server.mail import Mail
from polyclinic_simulations.engines.local import LocalGrid

from ..tiny import SITES, events, honest, open_run, tiny_study

BUNDLE = Path(__file__).parents[2] / "deploy" / "app" / "pyproject.toml"


def test_leads_the_study_and_leaves_its_encoder(tmp_path: Path) -> None:
    study = tiny_study()
    run = open_run(tmp_path, study)
    (tmp_path / "seats.json").write_text(json.dumps(dict.fromkeys(SITES, 65_536)))
    grid = LocalGrid({name: honest(name) for name in SITES})
    (tmp_path / "registered.json").write_text(json.dumps(dict(zip(SITES, grid.get_node_ids(), strict=True))))
    context = Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)})
    app(grid, context)
    assert [event["event"] for event in events(run)][-2:] == ["run_finished", "run_reported"]
    assert (tmp_path / "report.html").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["engine"] == "deployed"
    assert 0 <= summary["wall_s"] < 60
    assert summary["sites"] == {name: {"patients": 10} for name in SITES}  # not the seats: what trained
    encoder, metadata = load_tensors(tmp_path / "encoder.safetensors")
    last, _ = load_tensors(run.checkpoints / f"round-{study.rounds:04d}.safetensors")
    assert metadata["hash"] == study.hash
    assert set(encoder) == {name.removeprefix("encoder.") for name in last if name.startswith("encoder.")}
    assert all((value == last[f"encoder.{name}"]).all() for name, value in encoder.items())


def test_the_sites_own_probes_are_averaged_by_the_patients_that_they_trained_on(tmp_path: Path) -> None:
    run = open_run(tmp_path, tiny_study())
    run.rewind(0)
    for site, patients, area in (("east", 10.0, 0.6), ("north", 30.0, 0.9)):
        run.event("update_accepted", round=1, site=site, norm=1.0, patients=int(patients))
        run.metrics(0, 1, site, {"patients": 1e9, "bytes_up": 100.0, "probe_auc": 0.1})  # what it says counts nothing
        run.metrics(0, 2, site, {"patients": patients, "bytes_up": 100.0})
        run.metrics(0, 2, site, {"probe_auc": area, "probe_balanced_accuracy": 0.5, "classifier_auc": area - 0.1})
    run.event("update_accepted", round=1, site="west", norm=1.0, patients=20)
    run.metrics(0, 2, "west", {"probe_auc": 1.0})  # half a probe
    conclude(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    row = summary["comparison"]["federated"]
    assert row == {"auc": pytest.approx(0.825), "auc_low": None, "auc_high": None, "balanced_accuracy": 0.5}
    assert summary["bytes_sent"] == 400
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "MODEL_CARD.md").read_text()
    assert "AUC 0.825" in page
    assert "the classifier on the sites&#39; own test patients: AUC 0.725" in page
    assert "What the encoder is worth" in page
    assert "Patient-weighted mean of the sites' own linear probes" in page
    assert "| federated | 0.825 | – | 0.500 |" in card
    assert "Patient-weighted mean of the sites' own probes." in card
    assert "rehearsed" not in page + card


def test_its_seconds_are_those_of_its_attempts_and_not_of_the_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = open_run(tmp_path, tiny_study()), [0.0]
    run.rewind(0)
    monkeypatch.setattr(rundir, "datetime", SimpleNamespace(now=lambda zone: datetime.fromtimestamp(clock[0], zone)))
    told = ["launched", "submitted", "run_started", "round_closed", "run_interrupted", "submitted", "warning"]
    told += ["submitted", "run_failed", "submitted", "run_resumed", "run_finished"]  # one failed before it began
    for event, later in zip(told, (0, 9, 9, 2, 3, 900, 900, 7, 7, 7, 7, 4), strict=True):
        clock[0] += later
        run.event(event)
    conclude(run)
    assert json.loads((tmp_path / "summary.json").read_text())["wall_s"] == 2 + 3 + 4


def test_a_run_without_any_probe_is_concluded(tmp_path: Path) -> None:
    run = open_run(tmp_path, tiny_study())
    run.rewind(0)
    conclude(run)
    assert json.loads((tmp_path / "summary.json").read_text())["comparison"] == {}


def test_a_node_gets_no_other_seat_than_its_keys(tmp_path: Path) -> None:
    run = open_run(tmp_path, tiny_study())
    grid = LocalGrid({"beta": honest("alpha"), "alpha": honest("alpha"), "gamma": honest("gamma")})
    beta, alpha, gamma = grid.get_node_ids()
    registered = {"alpha": alpha, "beta": beta, "gamma": gamma}
    study = tiny_study(aggregation={"round_deadline_s": 0.5})
    mail = Mail(grid, run, study, dict.fromkeys(registered, 10), registered)
    mail.find()
    assert mail.nodes == {"alpha": alpha, "gamma": gamma}
    assert events(run, "warning")[0]["text"] == "a node calls itself 'alpha', a site that has another key"


@pytest.mark.parametrize("end", ["run_stopped", "run_reported"])
def test_a_run_that_has_ended_is_not_led(end: str, tmp_path: Path) -> None:
    run = open_run(tmp_path, tiny_study())
    run.event(end)
    app(LocalGrid({}), Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)}))
    assert [event["event"] for event in events(run)] == [end]


def test_a_run_whose_checkpoints_are_all_damaged_has_failed(tmp_path: Path) -> None:
    study = tiny_study()
    run = open_run(tmp_path, study)
    (tmp_path / "seats.json").write_text(json.dumps(dict.fromkeys(SITES, 10)))
    (tmp_path / "registered.json").write_text("{}")
    run.checkpoints.mkdir()
    for round in (1, 2):
        (run.checkpoints / f"round-000{round}.json").write_text("{")
    app(LocalGrid({}), Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)}))
    last = events(run)[-1]
    assert (last["event"], last["problem"]) == ("run_failed", "every checkpoint of this run is damaged")
    assert "start the study again" in last["fix"]


def test_what_nobody_expected_is_written_down(tmp_path: Path) -> None:
    run = open_run(tmp_path, tiny_study())
    with pytest.raises(FileNotFoundError):  # no registered.json
        app(LocalGrid({}), Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)}))
    assert events(run)[-1]["problem"] == "unexpected FileNotFoundError"


def test_the_bundle_names_this_app_and_the_sites() -> None:
    components = tomllib.loads(BUNDLE.read_text())["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "polyclinic_server.app:app", "clientapp": "polyclinic_client.app:app"}
