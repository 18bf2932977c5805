"""The deployed ServerApp: leads the study of the run directory that its configuration names."""

import json
import tomllib
from pathlib import Path

from flwr.app import Context, RecordDict

from polyclinic.artifacts import load_tensors
from polyclinic_server.app import app
from polyclinic_simulations.engines.local import LocalGrid

from ..tiny import SITES, events, honest, open_run, tiny_study

BUNDLE = Path(__file__).parents[2] / "deploy" / "app" / "pyproject.toml"


def test_leads_the_study_and_leaves_its_encoder(tmp_path: Path) -> None:
    study = tiny_study()
    run = open_run(tmp_path, study)
    (tmp_path / "seats.json").write_text(json.dumps(dict.fromkeys(SITES, 10)))
    context = Context(1, 1, {}, RecordDict(), {"run": str(tmp_path)})
    app(LocalGrid({name: honest(name) for name in SITES}), context)
    assert [event["event"] for event in events(run)][-2:] == ["run_finished", "run_reported"]
    assert (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["engine"] == "deployed"
    encoder, metadata = load_tensors(tmp_path / "encoder.safetensors")
    last, _ = load_tensors(run.checkpoints / f"round-{study.rounds:04d}.safetensors")
    assert metadata["hash"] == study.hash
    assert set(encoder) == {name.removeprefix("encoder.") for name in last if name.startswith("encoder.")}
    assert all((value == last[f"encoder.{name}"]).all() for name, value in encoder.items())


def test_the_bundle_names_this_app_and_the_sites() -> None:
    components = tomllib.loads(BUNDLE.read_text())["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "polyclinic_server.app:app", "clientapp": "polyclinic_client.app:app"}
