"""The papers' tables on datasets of a few images: rows, resumption, documents, the command."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import save_file
from torchvision.models import resnet18  # type: ignore[import-untyped]

from polyclinic import cli
from polyclinic.errors import CheckpointError, CohortError, Collapsed, Refused
from polyclinic.study import Study, Weights, resolve
from polyclinic.wire import Tensors
from polyclinic_client.site import Site
from polyclinic_server import rounds
from polyclinic_simulations.papers import run as module
from polyclinic_simulations.papers.datasets import dataset, document
from polyclinic_simulations.papers.plans import HOSPITALS, SEEDS, TIERS, Plan
from polyclinic_simulations.papers.run import run_plan
from polyclinic_simulations.papers.workshop import METRICS, Workshop, as_table, finished, take_back

from ...tiny import tiny_study
from .conftest import PLAN, TINY, row_of, run

COLUMNS = [
    "table",
    "dataset",
    "split",
    "regime",
    "method",
    "init",
    "label_fraction",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "seconds",
    "machine",
]


@pytest.mark.parametrize(
    ("method", "init", "name"),
    [
        ("scratch", "random", "covid-ct"),
        ("scratch", "random", "covid-ct-border"),
        ("mae", "outside", "covid-ct"),
        ("vicreg", "random", "covid-ct"),
    ],
)
def test_a_row_is_trained_scored_and_not_made_twice(
    method: str, init: str, name: str, data: Path, tmp_path: Path
) -> None:
    plan = replace(PLAN, method=method, init=init, dataset=name)
    result = run(plan, data, tmp_path / "work")
    found = as_table({plan: result})
    assert list(found.columns) == COLUMNS
    assert found["metric"].tolist() == ["auc", "accuracy", "balanced_accuracy", "ece"]
    assert found["value"].between(0, 1).all()
    assert found["low"][0] <= found["value"][0] <= found["high"][0]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert run(plan, data, tmp_path / "work") == result
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("half", ["rows/{row}", "pretrained/0-{shared}"])
def test_what_another_version_left_half_made_is_made_anew(
    half: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"row": PLAN.name, "shared": PLAN.name.partition("-")[2]}
    expected = run(PLAN, data, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "rows")
    if half.startswith("pretrained"):
        shutil.rmtree(tmp_path / "work" / "pretrained")
    train = module.train_row

    def other(study: Study, *rest: Any, **more: Any) -> Tensors:
        train(resolve({**study.model_dump(mode="json"), "study": {"name": "other", "seed": 0}}), *rest, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train_row", other)
        run(PLAN, data, tmp_path / "work")
    assert (tmp_path / "work" / half.format(**names) / "central" / "checkpoints").exists()
    said: list[Mapping[str, Any]] = []
    found = run_plan(PLAN, Workshop(TINY, data, tmp_path / "work", row_of([])["machine"], listen=said.append))
    assert found is not None
    assert found["metrics"] == expected["metrics"]
    assert any("made anew" in str(event.get("text")) for event in said)


def test_a_row_whose_pretraining_collapses_has_no_figures_and_is_not_tried_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Mapping[str, Any]] = []
    at = Workshop(TINY, data, tmp_path / "work", row_of([])["machine"], listen=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "collapsed", lambda found: True)
        found = run_plan(PLAN, at)
    assert found is not None
    assert found["metrics"] == {}
    assert any("has no figures: the encoder has collapsed" in str(event.get("text")) for event in said)
    assert run_plan(PLAN, at) == found
    assert as_table({PLAN: found}).empty


def test_a_row_that_is_made_anew_may_collapse_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, tried = Workshop(TINY, data, tmp_path / "work", row_of([])["machine"]), [CheckpointError, Collapsed]

    def train(*_: object, **__: object) -> Tensors:
        raise tried.pop(0)("it has collapsed", "")

    monkeypatch.setattr(module, "train_row", train)
    found = run_plan(PLAN, at)
    assert found is not None
    assert (found["metrics"], tried) == ({}, [])


def test_an_encoder_of_other_settings_is_not_fine_tuned(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(PLAN, data, tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(module, "pretraining", lambda *_: [{"kind": "pretrain", "method": "mae", "rounds": 1}])
        other = run(PLAN, data, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "rows")
    assert run(PLAN, data, tmp_path / "work")["metrics"] == expected["metrics"] != other["metrics"]


def test_a_damaged_encoder_is_trained_again(data: Path, tmp_path: Path) -> None:
    expected = run(PLAN, data, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "rows")
    [encoder] = (tmp_path / "work" / "pretrained").rglob("encoder.safetensors")
    whole = encoder.read_bytes()
    encoder.write_bytes(whole[:-4] + bytes(4))
    assert run(PLAN, data, tmp_path / "work")["metrics"] == expected["metrics"]
    assert encoder.read_bytes() == whole


def test_every_seed_is_pretrained_for_itself(data: Path, tmp_path: Path) -> None:
    results = [run(replace(PLAN, seed=seed), data, tmp_path / "work") for seed in (0, 1)]
    studies = sorted((tmp_path / "work" / "pretrained").glob("*/central/study.toml"))
    assert len(studies) == 2
    assert results[0]["metrics"] != results[1]["metrics"]


def test_processes_on_one_folder_make_different_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Workshop(TINY, tmp_path, tmp_path / "work", row_of([])["machine"])
    kin = replace(PLAN, label_fraction=0.5)
    other, made = replace(PLAN, method="scratch"), row_of([0.5, None, None])

    def measured(plan: Plan, at: Workshop) -> dict[str, Any]:
        if plan == PLAN:  # meanwhile, as other processes would:
            assert run_plan(PLAN, at) is run_plan(kin, at) is None  # they share a pretraining
            assert run_plan(other, at) == made
        return made

    monkeypatch.setattr(module, "_measured", measured)
    assert finished(PLAN, at) is None
    assert run_plan(PLAN, at) == finished(PLAN, at) == run_plan(kin, at) == made


def test_the_command_makes_what_is_left_and_shows_all(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [replace(PLAN, method="scratch", seed=seed) for seed in SEEDS]
    for user in ("plans", "workshop"):
        monkeypatch.setattr(f"polyclinic_simulations.papers.{user}.plans", lambda: iter(every))
    other = replace(TINY, batch_size=12)
    monkeypatch.setitem(TIERS, "cpu", {**dict.fromkeys(range(1, 6), TINY), 5: other})
    work, out = tmp_path / "work", tmp_path / "out"

    def papers(*options: str) -> pd.DataFrame:
        arguments = ["papers", "--data", data, "--work", work, "--out", out, *options]
        assert cli.run([str(argument) for argument in arguments]) == 0
        return pd.read_csv(out / "papers.csv")

    assert papers("--minutes", "0").empty
    assert "Not run (3)" in (out / "papers.html").read_text()
    run(every[1], data, work / f"cpu-{TINY.digest}")  # by another process
    assert papers("--minutes", "0")["seed"].unique().tolist() == [1]
    made = papers()
    assert made["seed"].unique().tolist() == list(SEEDS)
    shutil.rmtree(work)
    every.append(replace(every[0], table=5))
    assert papers("--minutes", "0", "--table", "3").equals(made)  # nothing is made, nothing is lost
    both = papers("--table", "5")
    assert both["table"].unique().tolist() == [1, 5]
    assert all(both.query("table == @k")["machine"].str.contains(t.digest).all() for k, t in ((1, TINY), (5, other)))
    shutil.rmtree(work)
    every.append(replace(every[0], table=3))
    (out / "papers.csv").unlink()
    made.query("seed == 2").to_csv(out / "papers.csv", index=False)  # by a process that works in another folder
    assert papers("--table", "3")[["table", "seed"]].drop_duplicates().to_numpy().tolist() == [[1, 2], [3, 0]]


WHOLE = [f"1,covid-ct,published,central,mae,random,1.0,0,{metric},1,,,1,cpu tier" for metric in METRICS]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["a,b", "1,2"],
        ["seed", "1"],
        [",".join(COLUMNS), *WHOLE],  # of other settings
        [",".join(COLUMNS), *(line.replace("tier", f"tier {TIERS['cpu'][1].digest}") for line in WHOLE[:1])],
        [
            ",".join(COLUMNS),
            *(line.replace("tier", f"tier {TIERS['cpu'][1].digest}").replace("mae", "") for line in WHOLE),
        ],
        [
            ",".join(COLUMNS),
            *(line.replace("tier", f"tier {TIERS['cpu'][1].digest}").replace(",,1", ",,x") for line in WHOLE),
        ],
        [",".join(COLUMNS), *(line.replace(",cpu tier", ",") for line in WHOLE)],
    ],
)
def test_a_table_of_other_rows_is_not_written_over(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "papers.csv"
    path.write_text(text := "\n".join(lines))
    arguments = ["papers", "--data", tmp_path, "--work", tmp_path / "work", "--out", tmp_path, "--minutes", "0"]
    assert cli.run([str(argument) for argument in arguments]) == 2
    assert path.read_text() == text
    assert "papers.csv" in capsys.readouterr().err


def test_rows_come_back_from_their_table_as_they_were(tmp_path: Path) -> None:
    at = Workshop(TINY, tmp_path, tmp_path / "work", f"cpu tier {TINY.digest}, another machine")
    figures = ([0.1 + 0.2, 0.1, 1 / 3], [0.5, None, None])
    made = {replace(PLAN, seed=k): {**row_of([]), "metrics": dict.fromkeys(METRICS, figures[k])} for k in (0, 1)}
    as_table(made).to_csv(tmp_path / "papers.csv", index=False)
    take_back(tmp_path / "papers.csv", {1: at})
    assert {plan: finished(plan, at) for plan in made} == made


STUDY = tiny_study(stages=[{"kind": "pretrain", "method": "simclr", "rounds": 1}])


def test_documents_become_patients_whose_slices_stay_together(data: Path, tmp_path: Path) -> None:
    cohort = dataset("covid-ct", "document", STUDY, Workshop(TINY, data, tmp_path / "work"))
    assert cohort.n_patients == 8  # nine documents, two of which one patient shares
    assert len(cohort) == 36
    assert document("a-b-p12-3%1.png") == "a-b"


def test_the_border_control_sees_nothing_but_the_rim(data: Path, tmp_path: Path) -> None:
    whole, rim = (
        dataset(name, "published", STUDY, Workshop(TINY, data, tmp_path / "work")).pixels(slice(None))
        for name in ("covid-ct", "covid-ct-border")
    )
    assert (rim[:, :, 2:-2, 2:-2] == 0).all()
    assert (rim[:, :, :2] == whole[:, :, :2]).all()


@pytest.mark.parametrize(
    ("regime", "method", "trained"),
    [
        ("federated", "simclr+micle", [["site-1", "site-2", "site-3", "site-4", "site-5"]] * 2),
        ("pooled", "scratch", [["pooled"]]),
        ("alone", "scratch", [["site-1"], ["site-2"], ["site-3"], ["site-4"], ["site-5"]]),
    ],
)
def test_who_trains_in_each_regime(
    regime: str, method: str, trained: list[list[str]], colour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    passes: list[int] = []
    train = module.train_row

    def noting(study: Study, sites: Mapping[str, Site], *rest: Any, **more: Any) -> Tensors:
        made.append(sorted(sites))
        passes.append(study.stages[-1].local_epochs)
        return train(study, sites, *rest, **more)

    monkeypatch.setattr(module, "train_row", noting)
    plan = Plan(5, "ham10000-subset", "patient", regime, method, "random", 0.5, 0)
    result = run(plan, colour, tmp_path / "work")
    assert made == trained
    assert passes[-1] == 2  # of half of the labels
    value, low, high = result["metrics"]["auc"]
    assert 0 <= value <= 1
    assert (low is None) == (high is None) == (regime == "alone")  # a mean of five classifiers has no bootstrap
    weights = [path.name for path in (tmp_path / "work").rglob("*.safetensors")]
    assert weights == ["encoder.safetensors"] * (method != "scratch")


def test_rows_of_a_left_out_hospital_come_from_one_run_of_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {f"{name}{end}": 0.7 for name in METRICS for end in ("", "_low", "_high")}
    rows = [
        {"held_out": HOSPITALS[0], "start": "joined", "scope": scope, "label_fraction": fraction, **figures, "auc": auc}
        for scope, fraction, auc in (("in-distribution", 0.0, 0.6), ("held-out", 0.0, 0.8), ("held-out", 0.1, 0.9))
    ]
    resumed = []

    def protocol(study: Study, out: Path, *_: object, resume: bool, **__: object) -> None:
        resumed.append(resume)
        out.mkdir(parents=True, exist_ok=True)
        (out / "study.toml").write_text(study.to_toml())
        pd.DataFrame([{**row, "seconds": 3.0} for row in rows]).to_csv(out / "holdout.csv")

    monkeypatch.setattr(module, "leave_one_site_out", protocol)
    plan = Plan(4, HOSPITALS[0], "site", "federated", "simclr joined", "random", 0.1, 0)
    assert run(plan, tmp_path, tmp_path)["metrics"]["auc"] == [0.9, 0.7, 0.7]
    there = replace(plan, dataset=f"without {HOSPITALS[0]}", split="patient", label_fraction=1.0)
    assert run(there, tmp_path, tmp_path)["metrics"]["auc"][0] == 0.6
    assert run(replace(plan, method="scratch"), tmp_path, tmp_path)["metrics"] == {}
    assert resumed == [False, True, True]


def test_supervised_weights_start_the_protocol_and_without_them_its_rows_are_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Plan(4, HOSPITALS[0], "site", "federated", "simclr", "random", 1.0, 0)
    every = [own, replace(own, init="supervised")]
    for user in ("plans", "workshop"):
        monkeypatch.setattr(f"polyclinic_simulations.papers.{user}.plans", lambda: iter(every))
    residual = replace(TINY, images={"size": 24}, encoder={"name": "resnet18"})
    monkeypatch.setitem(TIERS, "cpu", dict.fromkeys(range(1, 6), residual))
    started = {}

    def protocol(study: Study, out: Path, *_: object, **__: object) -> None:
        started[out.name] = study.encoder.init
        out.mkdir(parents=True)
        figures = {f"{name}{end}": 0.7 for name in METRICS for end in ("", "_low", "_high")}
        row = {"held_out": HOSPITALS[0], "start": "pretrained", "scope": "held-out", "label_fraction": 1.0, **figures}
        pd.DataFrame([{**row, "seconds": 3.0}]).to_csv(out / "holdout.csv")

    monkeypatch.setattr(module, "leave_one_site_out", protocol)

    def papers(*options: object) -> int:
        arguments = ["papers", "--data", data, "--work", tmp_path / "work", "--out", tmp_path / "out", *options]
        return cli.run([str(argument) for argument in arguments])

    assert papers() == 0
    assert pd.read_csv(tmp_path / "out" / "papers.csv")["init"].unique().tolist() == ["random"]
    assert every[1].name.partition("-")[2] in (tmp_path / "out" / "papers.html").read_text()
    weights, file = resnet18().state_dict(), tmp_path / "theirs.safetensors"
    save_file({name: value for name, value in weights.items() if name != "conv1.weight"}, file)
    assert papers("--init", file) == 2  # before anything is trained
    save_file(weights, file)
    assert papers("--init", file) == 0
    table = pd.read_csv(tmp_path / "out" / "papers.csv")
    assert table["init"].unique().tolist() == ["random", "supervised"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert started["random-0"] == "random"
    theirs = started[f"supervised-{digest[:8]}-0"]
    assert (theirs.family, theirs.sha256) == ("torchvision", digest)
    assert table.query("init == 'supervised'")["machine"].str.endswith(f", from weights {digest[:8]}").all()
    assert papers() == 0, "rows of weights that are not at hand are kept"
    assert pd.read_csv(tmp_path / "out" / "papers.csv").equals(table)
    save_file({name: value + 1 for name, value in weights.items()}, file)
    assert papers("--init", file) == 2, "rows that start from other weights are other rows"
    others = tmp_path / "others"
    assert papers("--init", file, "--out", others) == 0
    assert len(started) == 3
    assert papers("--out", tmp_path / "none") == 0
    assert set(pd.read_csv(tmp_path / "none" / "papers.csv")["init"]) == {"random"}, "they are of no table but theirs"
    theirs_too = pd.read_csv(others / "papers.csv")
    assert papers("--out", others) == 0
    assert pd.read_csv(others / "papers.csv").equals(theirs_too), "nor are those of one table another's"
    assert papers("--init", tmp_path) == 2
    with pytest.raises(Refused, match="supervised weights"):
        run_plan(replace(every[1], seed=1), Workshop(residual, data, tmp_path / "work"))


@pytest.mark.parametrize("found", ["", "images.size = 24\n"])
def test_a_protocol_of_other_settings_is_run_anew_and_a_damaged_one_is_kept(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "holdout" / "random-0"
    (out / "holdout").mkdir(parents=True)
    (out / "study.toml").write_text(found)
    begun = []

    def protocol(study: Study, out: Path, *_: object, resume: bool, **__: object) -> None:
        begun.append((resume, out.exists()))
        out.mkdir(exist_ok=True)
        (out / "study.toml").write_text(study.to_toml())
        raise CheckpointError("a checkpoint is damaged", "copy it again")

    monkeypatch.setattr(module, "leave_one_site_out", protocol)
    plan = Plan(4, HOSPITALS[0], "site", "federated", "scratch", "random", 1.0, 0)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            run(plan, tmp_path, tmp_path)
        assert str(out) in caught.value.fix
    assert begun == [(False, False), (True, True)]


def test_weights_that_have_moved_are_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = []

    def protocol(study: Study, out: Path, *_: object, resume: bool, **__: object) -> None:
        resumed.append(resume)
        out.mkdir(exist_ok=True, parents=True)
        (out / "study.toml").write_text(study.to_toml())
        raise CheckpointError("a checkpoint is damaged", "copy it again")

    monkeypatch.setattr(module, "leave_one_site_out", protocol)
    plan = Plan(4, HOSPITALS[0], "site", "federated", "scratch", "supervised", 1.0, 0)
    for folder, digest in (("here", "a"), ("there", "a"), ("there", "b")):
        weights = Weights(file=str(tmp_path / folder), family="torchvision", sha256=digest * 64)
        residual = replace(TINY, images={"size": 24}, encoder={"name": "resnet18"})
        with pytest.raises(CheckpointError):
            run_plan(plan, Workshop(residual, tmp_path, tmp_path, weights=weights))
    assert resumed == [False, True, False]


def test_a_missing_dataset_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="nih-chestxray8-subset"):
        run(replace(PLAN, dataset="nih-chestxray8-subset", split="patient"), data, tmp_path / "work")


def test_the_command_makes_rows_of_another_size(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [PLAN, replace(PLAN, method="scratch")]
    for user in ("plans", "workshop"):
        monkeypatch.setattr(f"polyclinic_simulations.papers.{user}.plans", lambda: iter(every))
    settings = replace(TINY, images={"size": 24})
    monkeypatch.setitem(TIERS, "cpu", dict.fromkeys(range(1, 6), settings))
    arguments = ["papers", "--data", data, "--work", tmp_path / "work", "--out", tmp_path / "out"]
    assert cli.run([*map(str, arguments), "--encoder", "resnet18"]) == 0
    made = pd.read_csv(tmp_path / "out" / "papers.csv")
    assert set(made["method"]) == {"scratch"}  # a masked method is not for it
    own = replace(settings, encoder={"name": "resnet18"})
    assert made["machine"].str.contains(own.digest).all()
    assert cli.run([*map(str, arguments)]) == 2  # rows of two encoders are no comparison
