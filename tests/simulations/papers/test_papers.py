"""The papers' tables on a dataset of a few images: rows, resumption, documents, the page."""

import csv
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from PIL import Image

from polyclinic import cli
from polyclinic.errors import CohortError, StudyError
from polyclinic.study import Study, resolve
from polyclinic.wire import Tensors
from polyclinic_client.site import Site
from polyclinic_simulations.holdout import FRACTIONS
from polyclinic_simulations.papers import run as module
from polyclinic_simulations.papers.goals import verdicts
from polyclinic_simulations.papers.page import curves, plot, render_page
from polyclinic_simulations.papers.plans import (
    HOSPITALS,
    SEEDS,
    STARTS,
    TIERS,
    Plan,
    Tier,
    plans,
    pretraining,
    settings_of,
    trainable,
)
from polyclinic_simulations.papers.run import Workshop, as_table, dataset, document, finished, run_plan, take_back

from ...tiny import draw, tiny_study

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
TINY = Tier(
    images={"size": 16},
    encoder={"name": "vit_tiny", "patch": 8},
    epochs=dict.fromkeys(("mae", "sssd", "simclr", "mlvicx", "vicreg"), 6),
    batch_size=16,
    finetune={"rounds": 2, "batch_size": 16},
    threads=1,
)
PLAN = Plan(1, "covid-ct", "published", "central", "mae", "random", 1.0, 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """covid-ct and luna16-slices in miniature."""
    for name, images, label in (("covid-ct", 36, True), ("luna16-slices", 8, False)):
        folder = tmp_path / "data" / name
        (folder / "images").mkdir(parents=True)
        with (folder / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "label", "patient", "split", "source_file"])
            for k in range(images):
                word = ("COVID", "NonCOVID")[k % 2] if label else ""
                Image.fromarray(draw(k, "spot" if word == "COVID" else "clear")).save(folder / "images" / f"{k}.png")
                split = ("train", "train", "test")[k // 2 % 3] if label else ""
                table.writerow([f"images/{k}.png", word, f"patient {max(k, 4)}", split, f"document {k // 4}-p{k}.png"])
    return tmp_path / "data"


def row_of(value: list[float | None], metric: str = "auc") -> dict[str, Any]:
    return {"metrics": {metric: value}, "seconds": 1.0, "machine": f"cpu tier {TINY.digest}, paper"}


def run(plan: Plan, data: Path, work: Path) -> dict[str, Any]:
    result = run_plan(plan, Workshop(TINY, data, work, row_of([])["machine"]))
    assert result is not None
    return result


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

    def other(study: Study, *rest: Any) -> Tensors:
        train(resolve({**study.model_dump(mode="json"), "study": {"name": "other", "seed": 0}}), *rest)
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


def test_a_protocol_of_another_version_is_run_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(4, HOSPITALS[0], "site", "federated", "scratch", "random", 1.0, 0)
    old = tmp_path / "holdout" / "seed-0" / "study.toml"
    old.parent.mkdir(parents=True)
    old.write_text("")
    made = row_of([0.5, None, None])

    def protocol(plan: Plan, at: Workshop) -> dict[str, Any]:
        if old.exists():
            raise StudyError("it holds another study", "resume that one")
        return made

    monkeypatch.setattr(module, "_held_out", protocol)
    assert run(plan, tmp_path, tmp_path) == made


def test_every_seed_is_pretrained_for_itself(data: Path, tmp_path: Path) -> None:
    results = [run(replace(PLAN, seed=seed), data, tmp_path / "work") for seed in (0, 1)]
    studies = sorted((tmp_path / "work" / "pretrained").glob("*/central/study.toml"))
    assert len(studies) == 2
    assert results[0]["metrics"] != results[1]["metrics"]


def test_processes_on_one_folder_make_different_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Workshop(TINY, tmp_path, tmp_path / "work", row_of([])["machine"])
    kin = replace(PLAN, label_fraction=0.5)
    other, made = replace(PLAN, method="scratch"), row_of([0.5, None, None])

    def measured(plan: Plan, at: Workshop, folder: Path) -> dict[str, Any]:
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
    for user in ("plans", "run"):
        monkeypatch.setattr(f"polyclinic_simulations.papers.{user}.plans", lambda: iter(every))
    other = replace(TINY, batch_size=12)
    monkeypatch.setitem(TIERS, "cpu", {1: TINY, 3: TINY, 5: other})
    work, out = tmp_path / "work", tmp_path / "out"
    run(every[1], data, work / f"cpu-{TINY.digest}")  # by another process

    def papers(*options: str) -> pd.DataFrame:
        arguments = ["papers", "--data", data, "--work", work, "--out", out, *options]
        assert cli.run([str(argument) for argument in arguments]) == 0
        return pd.read_csv(out / "papers.csv")

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


WHOLE = [f"1,covid-ct,published,central,mae,random,1.0,0,{metric},1,,,1,cpu tier" for metric in module.METRICS]


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
    made = {replace(PLAN, seed=k): {**row_of([]), "metrics": dict.fromkeys(module.METRICS, figures[k])} for k in (0, 1)}
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


@pytest.fixture
def colour(tmp_path: Path) -> Path:
    """ham10000-subset in miniature: seven classes, pairs of photographs."""
    folder = tmp_path / "data" / "ham10000-subset"
    folder.mkdir(parents=True)
    words = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "patient"])
        for k in range(7 * 24):
            grey = Image.fromarray(draw(k, "spot" if k // 2 % 7 % 2 else "clear"))
            grey.convert("RGB").save(folder / f"{k}.png")
            table.writerow([f"{k}.png", words[k // 2 % 7], f"lesion {k // 2}"])
    return tmp_path / "data"


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

    def noting(study: Study, sites: Mapping[str, Site], *rest: Any) -> Tensors:
        made.append(sorted(sites))
        passes.append(study.stages[-1].local_epochs)
        return train(study, sites, *rest)

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


def test_goals_are_met_missed_or_not_measured() -> None:
    def row(method: str, metric: str, *values: float) -> list[dict[str, Any]]:
        plan = Plan(1, "covid-ct", "published", "central", method, "random", 1.0, 0)
        rows = [as_table({replace(plan, seed=k): done(metric, value)}) for k, value in enumerate(values)]
        return pd.concat(rows).to_dict("records")

    def done(metric: str, value: float) -> dict[str, Any]:
        return row_of([value, None, None], metric)

    rows = [*row("sssd", "accuracy", 0.80, 0.82, 0.84), *row("sssd", "auc", 0.7, 0.8, 0.9)]
    assert verdicts(pd.DataFrame([*rows, *row("mae", "auc", 0.85)]))[1][1].endswith("not measured")  # one seed of three
    rows += row("mae", "auc", 0.85, 0.85, 0.85)
    said = verdicts(pd.DataFrame(rows))
    assert said[1] == [
        "accuracy of SSSD from these images alone, at least 0.8176: met: 0.820",
        "AUC of SSSD over that of the masked autoencoder, at least 0: missed: -0.050",
    ]
    assert all(text.endswith("not measured") for number in (2, 3, 4, 5) for text in said[number])
    assert set(verdicts(pd.DataFrame())) == {1, 2, 3, 4, 5}


def test_labels_spared_are_those_beyond_the_first_that_do_as_well() -> None:
    def at(hospital: str, method: str, fraction: float, value: float) -> pd.DataFrame:
        plan = Plan(4, hospital, "site", "federated", method, "random", fraction, 0)
        result = row_of([value, None, None])
        return as_table({replace(plan, seed=seed): result for seed in SEEDS})

    for reached, expected in (
        (0.2, "met: 0.800"),
        (0.33, "met: 0.670"),
        (0.5, "missed: 0.500"),
        (2.0, "missed: -1.000"),
    ):
        rows = [at(HOSPITALS[0], "scratch", 1.0, 0.9)]
        rows += [at(HOSPITALS[0], "simclr", f, 0.9 if f >= reached else 0.8) for f in FRACTIONS]
        assert verdicts(pd.concat(rows))[4][0].endswith(expected)


def test_stages_of_a_row_share_its_epochs() -> None:
    tier = TIERS["cpu"][2]
    plan = Plan(2, "ham10000-subset", "patient", "federated", "simclr+micle", "random", 1.0, 0)
    first, second = pretraining(plan, tier)
    assert [first["method"], second["method"]] == ["simclr", "micle"]
    assert sum(stage["rounds"] * stage["local_epochs"] for stage in (first, second)) == tier.epochs["simclr"]
    [central] = pretraining(replace(plan, regime="central", method="mae"), tier)
    assert central["rounds"] * central["local_epochs"] == tier.epochs["mae"]


def test_rows_of_a_left_out_hospital_come_from_one_run_of_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {f"{name}{end}": 0.7 for name in module.METRICS for end in ("", "_low", "_high")}
    rows = [
        {"held_out": HOSPITALS[0], "start": "joined", "scope": scope, "label_fraction": fraction, **figures, "auc": auc}
        for scope, fraction, auc in (("in-distribution", 0.0, 0.6), ("held-out", 0.0, 0.8), ("held-out", 0.1, 0.9))
    ]
    resumed = []

    def protocol(study: object, out: Path, *_: object, resume: bool, **__: object) -> None:
        resumed.append(resume)
        out.mkdir(parents=True, exist_ok=True)
        (out / "study.toml").write_text("")
        pd.DataFrame([{**row, "seconds": 3.0} for row in rows]).to_csv(out / "holdout.csv")

    monkeypatch.setattr(module, "leave_one_site_out", protocol)
    plan = Plan(4, HOSPITALS[0], "site", "federated", "simclr joined", "random", 0.1, 0)
    assert run(plan, tmp_path, tmp_path)["metrics"]["auc"] == [0.9, 0.7, 0.7]
    there = replace(plan, dataset=f"without {HOSPITALS[0]}", split="patient", label_fraction=1.0)
    assert run(there, tmp_path, tmp_path)["metrics"]["auc"][0] == 0.6
    assert run(replace(plan, method="scratch"), tmp_path, tmp_path)["metrics"] == {}
    assert resumed == [False, True, True]


def test_a_missing_dataset_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="nih-chestxray8-subset"):
        run(replace(PLAN, dataset="nih-chestxray8-subset", split="patient"), data, tmp_path / "work")


def test_the_page_shows_what_was_run_and_lists_what_was_not() -> None:
    every = list(plans())
    assert len({plan.name for plan in every}) == len(every)
    assert {plan.table for plan in every} == {1, 2, 3, 4, 5}
    metrics = {"auc": [0.812, 0.7, 0.9], "accuracy": [0.75, 0.6, 0.8], "balanced_accuracy": [0.74, None, None]}
    done = {plan: {"metrics": metrics, "seconds": 60.0, "machine": "<b>machine</b>"} for plan in every[:2]}
    page = render_page(as_table(done), every[2:])
    assert "0.812 (0.812 – 0.812)" in page
    assert "0.8176" in page  # the paper's
    assert f"Not run, or not measurable ({len([p for p in every[2:] if p.table == 1])})" in page
    assert "<b>machine</b>" not in page
    assert render_page(as_table({}), every)


@pytest.mark.parametrize("known", [[], [0], [0, 1, 2]])
def test_the_plot_draws_rows_without_an_interval(known: list[int]) -> None:
    ends = {seed: [0.6 + seed / 10, 0.9] if seed in known else [None, None] for seed in SEEDS}
    done = {
        replace(PLAN, seed=seed): row_of([0.8, *ends[seed]]) for seed in SEEDS
    }  # as of a mean over sites that train alone
    picture = plot(as_table(done))
    assert not re.search(r"nan|inf", picture, re.IGNORECASE)
    marks = [mark.get("class") for mark in ElementTree.fromstring(picture).iter()]
    assert (marks.count("strip"), marks.count("whisker")) == (3, len(known))
    assert "<svg" in render_page(as_table(done), [])


def test_a_left_out_hospital_has_a_curve_of_every_start() -> None:
    done = {
        Plan(4, hospital, "site", "federated", method, "random", fraction, seed): row_of([0.6 + seed / 10, 0.1, 0.9])
        for hospital in HOSPITALS[:2]
        for method in STARTS
        for fraction in (0.0, 1.0)
        for seed in (0, 1)
    }
    drawn = curves(as_table(done))
    assert [hospital for hospital, _ in drawn] == list(HOSPITALS[:2])
    for _, picture in drawn:
        marks = [mark.get("class") for mark in ElementTree.fromstring(picture).iter()]
        assert (marks.count("whisker"), marks.count("line")) == (6, 3)
    page = render_page(as_table(done), [])
    assert all(f"<h3>{hospital}</h3>" in page for hospital in HOSPITALS[:2])
    assert curves(as_table({PLAN: row_of([0.5, None, None])})) == []


def test_tiers_know_every_method_and_dataset_of_their_rows() -> None:
    for plan in plans():
        if plan.method != "scratch" and plan.table != 4:
            assert all(pretraining(plan, tiers[plan.table]) for tiers in TIERS.values())


def test_tables_of_another_size_have_the_rows_that_its_encoder_can_train() -> None:
    small, residual = settings_of("cpu", "vit_small"), settings_of("cpu", "resnet50")
    assert [small[table].encoder for table in (1, 3)] == [{"name": "vit_small", "patch": patch} for patch in (12, 16)]
    assert all(at.encoder == {"name": "resnet50"} for at in residual.values())
    assert replace(small[1], encoder=TIERS["cpu"][1].encoder) == TIERS["cpu"][1]  # all else is the tier's
    assert settings_of("cpu") == TIERS["cpu"]
    assert all(trainable(plan, small[plan.table]) for plan in plans())
    left_out = {plan.method for plan in plans() if not trainable(plan, residual[plan.table])}
    assert left_out == {"mae", "sssd"}


def test_the_command_makes_rows_of_another_size(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [PLAN, replace(PLAN, method="scratch")]
    for user in ("plans", "run"):
        monkeypatch.setattr(f"polyclinic_simulations.papers.{user}.plans", lambda: iter(every))
    settings = replace(TINY, images={"size": 24})
    monkeypatch.setitem(TIERS, "cpu", {1: settings, 5: settings})
    arguments = ["papers", "--data", data, "--work", tmp_path / "work", "--out", tmp_path / "out"]
    assert cli.run([*map(str, arguments), "--encoder", "resnet18"]) == 0
    made = pd.read_csv(tmp_path / "out" / "papers.csv")
    assert set(made["method"]) == {"scratch"}  # a masked method is not for it
    own = replace(settings, encoder={"name": "resnet18"})
    assert made["machine"].str.contains(own.digest).all()
    assert cli.run([*map(str, arguments)]) == 2  # rows of two encoders are no comparison


def test_the_page_says_of_each_table_with_what_encoder_it_was_made() -> None:
    table = replace(PLAN, table=3)
    machine = f"cpu tier {TIERS['cpu'][3].digest}, x86_64"
    page = render_page(as_table({table: {**row_of([0.8, 0.7, 0.9]), "machine": machine}}), [])
    assert f"resnet18, images of 64 px; {machine}" in page
    machine = f"cpu tier {TIERS['cpu'][1].digest}, x86_64"
    page = render_page(as_table({PLAN: {**row_of([0.8, 0.7, 0.9]), "machine": machine}}), [])
    assert f"vit_tiny with patches of 12 px, images of 96 px; {machine}" in page
