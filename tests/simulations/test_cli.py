"""The commands in this process: what they leave when they refuse, and what they say of runs side by side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polyclinic import cli
from polyclinic.encoders import ENCODERS
from polyclinic_server import rounds

from ..tiny import TinyEncoder, write_cohort

ROW = {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9, "balanced_accuracy": 0.7}
LEFT_OUT = {
    "supervised_at_100": 0.8,
    "labels_needed": {"pretrained": 0.1, "joined": None},
    "in_distribution": {"pretrained": 0.91, "joined": 0.92, "supervised": 0.9},
    "zero_shot": {"pretrained": 0.71, "joined": 0.72, "supervised": None},
}
STUDY = """
[study]
name = "tiny"
[[stages]]
kind = "pretrain"
method = "simclr"
rounds = 1
[[simulation.site]]
name = "north"
cohort = "mistyped"
[[simulation.site]]
name = "south"
cohort = "south"
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)


def finished(name: str, **summary: Any) -> Path:
    """A folder with a summary."""
    run = Path(name)
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"comparison": {}, "classifier": {}, "notes": [], **summary}))
    return run


@pytest.mark.parametrize(
    "more", [[], ["--leave-one-site-out"], ["--out", "runs/mine"], ["--out", "runs/a", "--resume"]]
)
def test_what_is_refused_leaves_no_folder(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for there in ([], ["runs"]):
        for name in there:
            Path(name).mkdir()
        assert cli.run(["simulate", "study.toml", *more]) == 2
        assert "fix:" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [*there, "study.toml"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", "the cohort of 'north' is not there: mistyped"),
        ("--leave-one-site-out", "compares pretraining"),
        ("--data elsewhere", "elsewhere/mistyped"),
    ],
)
def test_what_the_study_alone_tells_is_refused_before_torch_is_loaded(more: str, said: str) -> None:
    code = "import sys\nfrom polyclinic.cli import run\ncode = run(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "simulate", "study.toml", *more.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 False\n"
    assert said in done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make one")
@pytest.mark.parametrize(
    "command", ["simulate there.toml --out /proc/y", "simulate there.toml --state /proc/y", "phantom /proc/y"]
)
def test_a_folder_that_cannot_be_made_is_named_whole(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("north", "south")):
        write_cohort(Path(name), 4, number)
    Path("there.toml").write_text(STUDY.replace("mistyped", "north"))
    assert cli.run(command.split()) == 1
    error = capsys.readouterr().err
    assert "cannot make the directory /proc/y" in error
    assert "fix: give another directory" in error
    assert not Path("runs").exists()


def test_tables_of_other_classes_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    of = {"classes": ["a", "b"], "patients": 48, "images": 96}
    finished("one", comparison={"federated": ROW}, test_patients="x", measured={"comparison": of})
    finished("two", comparison={"federated": ROW}, test_patients="x", measured={"comparison": of})
    finished("other", comparison={"federated": ROW}, test_patients="x", measured={"comparison": {**of, "images": 9}})
    assert cli.run(["compare", "one", "two"]) == 0
    printed = capsys.readouterr()
    assert "a, b: 48 test patients, 96 images" in printed.out
    assert printed.err == ""
    assert cli.run(["compare", "one", "other"]) == 0
    printed = capsys.readouterr()
    assert "test patients" not in printed.out
    assert "not all of the same classes" in printed.err


def test_a_run_that_is_refused_leaves_those_before_it(tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    assert cli.run(["simulate", "study.toml"]) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-1"]


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        (["a", "a"], ""),
        (["a", "b"], "were measured on different test patients"),
        ([None, None], "may have been measured on different test patients"),
        (["a", None], "may have been measured on different test patients"),
        (["a", "b", None], "were measured on different test patients"),
        ([None], ""),
    ],
)
def test_runs_whose_test_patients_differ_or_are_not_known_are_told(
    digests: list[str | None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [{} if digest is None else {"test_patients": digest} for digest in digests]  # a deployed run has none
    runs = [finished(f"run-{k}", comparison={"federated": ROW}, **more) for k, more in enumerate(known)]
    assert cli.run(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("warning") == bool(said)
    assert said in printed.err


def test_compare_shows_runs_that_left_one_site_out(capsys: pytest.CaptureFixture[str]) -> None:
    finished("one", leave_one_site_out={"north": LEFT_OUT}, test_patients="a")
    finished("two", leave_one_site_out={"north": LEFT_OUT}, test_patients="a")
    assert cli.run(["compare", "one", "two"]) == 0
    printed = capsys.readouterr()
    assert "one north" in printed.out
    assert "two north" in printed.out
    assert "10%" in printed.out
    assert printed.err == ""
    assert cli.run(["compare", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leave_one_site_out"] == {"one north": LEFT_OUT}


def test_compare_says_of_a_run_without_rows_that_it_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    finished("empty", notes=["no comparison: all labelled patients are of one class, 'x'"])
    assert cli.run(["compare", "empty"]) == 0
    assert "empty has no rows: no comparison: all labelled patients are of one class" in capsys.readouterr().err


def test_evaluate_warns_of_a_probe_that_gives_one_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {**ROW, "n_train": 9, "n_test": 9, "one_answer": False, "classes": ["a", "b"], "test_images": 9}
    rows = {"random": scores, "federated": {**scores, "one_answer": True}}
    monkeypatch.setattr("polyclinic_simulations.outside.evaluate_outside", lambda *_: (rows, 0))
    assert cli.run(["evaluate", "run", "--cohort", "images"]) == 0
    assert capsys.readouterr().err == "warning: row federated: the probe gives every test image the same answer\n"


@pytest.mark.parametrize(
    ("stage", "encoder", "said"),
    [
        ('method = "mae"\nmask = 0', "vit_tiny", "stages.0.mask is 0"),
        ('method = "mae"\nmask = 1', "vit_tiny", "stages.0.mask is 1"),
        ('method = "sssd"\nmask = 0', "vit_tiny", "stages.0.mask is 0"),
        ('method = "sssd"\nmask = 1', "vit_tiny", "stages.0.mask is 1"),
        ('method = "sssd"', "resnet18", "encoder.name is 'resnet18'"),
        ('method = "sssd"', "resnet50", "encoder.name is 'resnet50'"),
        ('method = "mae"', "bit_resnet50", "encoder.name is 'bit_resnet50'"),
    ],
)
def test_what_a_masked_method_cannot_do_is_refused(
    stage: str, encoder: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STUDY.replace('method = "simclr"', stage) + f'[encoder]\nname = "{encoder}"\n'
    (tmp_path / "study.toml").write_text(text)
    assert cli.run(["simulate", "study.toml"]) == 2
    assert said in capsys.readouterr().err


def test_weights_of_another_shape_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    weights = TinyEncoder(1).state_dict()
    save_file({**weights, "out.weight": torch.zeros(3, 36)}, tmp_path / "weights.safetensors")
    for name in ("mistyped", "south"):
        write_cohort(tmp_path / name, 6)
    init = '[encoder]\ninit = { file = "weights.safetensors", family = "polyclinic" }\n[images]\nsize = 24\n'
    (tmp_path / "study.toml").write_text(STUDY + init)
    assert cli.run(["simulate", "study.toml", "--out", "run"]) == 2
    assert "differ in shape: out.weight is (3, 36) and not (8, 36)" in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()
    (tmp_path / "grid.toml").write_text(f"{STUDY}{init}[grid]\nseed = [0]\n")
    assert cli.run(["sweep", "grid.toml", "--out", "sweep", "--engine", "local"]) == 2
    assert "differ in shape: out.weight is (3, 36) and not (8, 36)" in " ".join(capsys.readouterr().err.split())
    assert not Path("sweep").exists()


def test_who_is_told_of_a_collapse_is_not_told_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    monkeypatch.setattr(rounds, "collapsed", lambda found: True)
    for seed, name in enumerate(("mistyped", "south")):
        write_cohort(Path(name), 12, seed)
    Path("study.toml").write_text(
        STUDY.replace("rounds = 1", "rounds = 1\nbatch_size = 4")
        + "[images]\nsize = 16\n[compute]\nprecision = 'fp32'\n"
    )
    assert cli.run(["simulate", "study.toml", "--out", "run"]) == 1
    said = capsys.readouterr().err
    assert "the encoder has collapsed: at 2 of 2 sites" in said
    assert "lower the stage's learning_rate" in said
    assert "--resume" not in said
