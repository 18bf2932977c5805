"""The commands beside `simulate`: what they print and leave, and what they refuse."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from polyclinic.artifacts import load_encoder
from polyclinic.study import load_study
from polyclinic_simulations.phantom import write_site

from .conftest import polyclinic


def refusal(*arguments: object) -> str:
    """What a command says that refuses."""
    done = polyclinic(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_compare_puts_runs_side_by_side(finished: Path, tmp_path: Path) -> None:
    expected = {}
    for name in ("first", "second"):
        shutil.copytree(finished, tmp_path / name)
        rows = json.loads((finished / "summary.json").read_text())["comparison"]
        expected |= {f"{name} {row}": scores for row, scores in rows.items()}
    printed = polyclinic("compare", "first", "second", "--json", cwd=tmp_path).stdout
    assert json.loads(printed) == {"comparison": expected, "classifier": {}}
    done = polyclinic("compare", "first", "second", cwd=tmp_path)
    for name, scores in expected.items():
        assert re.search(rf"{name} .*{scores['auc']:.3f}", done.stdout)
    assert done.stderr == ""

    summary = json.loads((finished / "summary.json").read_text())
    (tmp_path / "second" / "summary.json").write_text(json.dumps({**summary, "test_patients": "others"}))
    assert "different test patients" in polyclinic("compare", "first", "second", cwd=tmp_path).stderr


def test_evaluate_reads_the_encoder_on_another_cohort(finished: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "delta", "delta", 40, seed=6)
    arguments = ("evaluate", finished, "--cohort", tmp_path / "delta", "--state", tmp_path / "state", "--json")
    done = polyclinic(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert list(rows) == ["pixels", "random", "federated"]
    assert all(0 <= row["auc_low"] <= row["auc"] <= row["auc_high"] <= 1 for row in rows.values())
    assert len({row["auc"] for row in rows.values()}) > 1
    assert "flatters" not in done.stderr


def test_evaluate_warns_of_images_that_the_run_learnt_from(finished: Path, patients: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "delta", "delta", 40, seed=6)
    ours, theirs = (sorted(folder.rglob("*.dcm"))[0] for folder in (patients / "alpha", tmp_path / "delta"))
    theirs.write_bytes(ours.read_bytes())
    done = polyclinic("evaluate", finished, "--cohort", tmp_path / "delta", "--state", tmp_path / "state")
    assert "warning: 1 of these images" in done.stderr
    assert re.search(r"probes learnt on \d+ images and measured on \d+ other patients of delta", done.stdout)


def test_evaluate_refuses_a_cohort_that_is_not_there(finished: Path, tmp_path: Path) -> None:
    assert "the cohort is not there" in refusal("evaluate", finished, "--cohort", tmp_path / "none")


def test_export_copies_what_others_need_and_nothing_of_this_machine(finished: Path, tmp_path: Path) -> None:
    to = tmp_path / "given" / "away"
    done = polyclinic("export", finished, "--to", to)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(to)
    assert {path.name for path in to.iterdir()} == {
        "encoder.safetensors", "MODEL_CARD.md", "report.html", "study.toml",
    }  # fmt: skip
    assert load_encoder(to)(torch.rand(1, 1, 32, 32)).shape == (1, 192)
    text = (to / "study.toml").read_text()
    assert "simulation" in tomllib.loads((finished / "study.toml").read_text())
    assert "simulation" not in tomllib.loads(text)
    assert "/" not in text
    own, given = ((folder / "report.html").read_text() for folder in (finished, to))
    assert "data:image/png" in own
    assert "data:image/png" not in given  # pictures of patients stay with the run
    assert "Photometric" in own or "photometric" in own
    assert "hotometric" not in given  # as do the sites' cards
    assert "What the encoder is worth" in given
    assert load_study(to / "study.toml").hash == load_study(finished / "study.toml").hash

    (to / "encoder.safetensors").write_bytes(b"theirs")
    assert "exists already" in refusal("export", finished, "--to", to)
    assert (to / "encoder.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "command", ["compare {run}", "export {run} --to {run}-exported", "evaluate {run} --cohort {run}"]
)
def test_what_is_not_a_finished_run_is_refused(command: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert str(run) in refusal(*command.format(run=run).split())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


QUICK = """
from polyclinic_simulations import demo
whole = demo.demo_study
def quick(seed):
    study = whole(seed)
    stages = [stage.model_copy(update={"rounds": 2, "local_epochs": 1}) for stage in study.stages]
    few = [site.model_copy(update={"phantom": 12}) for site in study.simulation.site]
    return study.model_copy(
        update={"stages": stages, "simulation": study.simulation.model_copy(update={"site": few})}
    )
demo.demo_study = quick
"""
"""The demo with a fifth of its patients, and a few steps; with fewer still, some class could not be measured."""


def test_the_demo_leaves_one_run_and_ends_with_its_table_and_report(tmp_path: Path) -> None:
    done = polyclinic("demo", cwd=tmp_path, code=QUICK)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]
    alone = [f"alone:{site}" for site in ("north", "south", "east", "west")]
    assert re.findall(r"^│ (\S+)", done.stdout, re.MULTILINE) == ["pixels", "random", "federated", *alone, "pooled"]
    assert done.stdout.splitlines()[-1] == "report: runs/demo-1/report.html"
    assert (tmp_path / "runs" / "demo-1" / "report.html").is_file()
