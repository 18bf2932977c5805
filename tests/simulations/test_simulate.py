"""A whole study in this process: what a run directory keeps, who is tested, and what is warned of."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from polyclinic.artifacts import load_tensors
from polyclinic.cohort import build_cohort
from polyclinic.encoders import ENCODERS
from polyclinic.errors import CohortError, Refused
from polyclinic.evaluation import Scores
from polyclinic.study import Study
from polyclinic_client.site import Site, open_site
from polyclinic_server import rundir
from polyclinic_server.rundir import RunDir
from polyclinic_simulations import simulate as module
from polyclinic_simulations.holdout import _unlabelled, leave_one_site_out
from polyclinic_simulations.simulate import claimed, simulate, who_is_tested

from ..tiny import SIMCLR, SITES, TinyEncoder, draw, events, in_memory, tiny_study, write_cohort

TUNE = {"kind": "finetune", "rounds": 1, "batch_size": 8, "views": {"flip": False}}
LABELS = {"labels": {"spot": ["spot"], "clear": ["clear"]}}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    yield


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three hospitals of ten patients; one round of SimCLR, one of fine-tuning."""
    for number, name in enumerate(SITES):
        write_cohort(tmp_path / "data" / name, 10, seed=number)
    return tiny_study(
        stages=[{**SIMCLR, "rounds": 1}, TUNE],
        evaluation=LABELS,
        simulation={"site": [{"name": name, "cohort": name} for name in SITES]},
    )


def kept(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(study: Study, at: Path, **options: Any) -> dict[str, Any]:
    return simulate(study, at / "run", at / "data", at / "state", **options)


def stopped(event: Mapping[str, Any]) -> None:
    """Ctrl-C after the first round of anything, or the first row."""
    if event["event"] in ("round_closed", "row_finished"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("protocol", [simulate, leave_one_site_out])
def test_what_is_refused_when_resumed_removes_nothing(protocol: Any, study: Study, tmp_path: Path) -> None:
    out, state = tmp_path / "run", tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        protocol(study, out, tmp_path / "data", state, listen=stopped)
    before = kept(out)
    assert any(path.name.startswith("round-") for path in before)
    with pytest.raises(CohortError, match="is not there"):
        protocol(study, out, tmp_path / "date", state, resume=True)
    assert kept(out) == before


def test_a_run_that_never_trained_is_not_removed_either_when_it_is_resumed(study: Study, tmp_path: Path) -> None:
    RunDir(tmp_path / "run").create(study)
    with pytest.raises(CohortError, match="is not there"):
        simulate(study, tmp_path / "run", tmp_path / "date", tmp_path / "state", resume=True)
    assert (tmp_path / "run" / "study.toml").exists()


def test_a_new_run_that_is_refused_leaves_nothing_but_what_was_there(study: Study, tmp_path: Path) -> None:
    (tmp_path / "there" / "empty").mkdir(parents=True)
    for out in ("new", "newer/run", "there/empty", "there/new"):
        with pytest.raises(CohortError):
            simulate(study, tmp_path / out, tmp_path / "date", tmp_path / "state")
    assert {path.name for path in tmp_path.iterdir()} - {"state"} == {"data", "there"}
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["empty"]
    assert list((tmp_path / "there" / "empty").iterdir()) == []


@pytest.mark.parametrize("trained", ["checkpoints", "holdout"])
def test_what_a_new_run_has_trained_stays_whatever_then_is_refused(trained: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(CohortError), claimed(RunDir(tmp_path / "run"), study, resume=False):
        (tmp_path / "run" / trained).mkdir()
        raise CohortError("a site has no labels", "give it some")
    assert (tmp_path / "run" / trained).exists()


def test_a_folder_that_another_process_fills_meanwhile_is_left_alone(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins and ends between the first look and the lock."""
    lock = module.locked

    def late(path: Path) -> Any:
        path.mkdir(exist_ok=True)
        (path / "study.toml").write_text("theirs")
        return lock(path)

    monkeypatch.setattr(module, "locked", late)
    with pytest.raises(Refused, match="is not empty"):
        run(study, tmp_path)
    assert (tmp_path / "run" / "study.toml").read_text() == "theirs"


def test_a_run_of_the_other_kind_is_not_resumed(study: Study, tmp_path: Path) -> None:
    where = tmp_path / "data", tmp_path / "state"
    run(study, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, tmp_path / "left", *where, listen=stopped)
    before = kept(tmp_path / "run") | kept(tmp_path / "left")
    with pytest.raises(Refused, match="a run that leaves no site out"):
        leave_one_site_out(study, tmp_path / "run", *where, resume=True)
    with pytest.raises(Refused, match="a run that leaves one site out") as caught:
        simulate(study, tmp_path / "left", *where, resume=True)
    assert "--leave-one-site-out" in caught.value.fix
    assert kept(tmp_path / "run") | kept(tmp_path / "left") == before


def test_what_only_going_on_would_need_goes_and_nothing_else(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = [out / "another" / "checkpoints" / "round-0001.safetensors", elsewhere / "theirs", out / "notes" / "mine"]

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "run_started" and "row" not in event:
            for path in theirs:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("theirs")
            (out / "rows").mkdir()
            for link in (out / "checkpoints-elsewhere", out / "rows" / "checkpoints"):
                link.symlink_to(elsewhere)

    plain = {**study.model_dump(mode="json"), "evaluation": {**LABELS, "rows": ["scratch"]}}
    some = tiny_study(**{**plain, "stages": [{**SIMCLR, "rounds": 1}, {**TUNE, "rounds": 6, "patience": 3}]})
    run(some, tmp_path, listen=listen)
    assert all(path.read_text() == "theirs" for path in theirs)
    weights = {path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")}
    mine = {"encoder.safetensors", "classifier.safetensors", "checkpoints/round-0007.safetensors"}
    assert weights == {*mine, "another/checkpoints/round-0001.safetensors"}
    assert run(some, tmp_path, resume=True)["comparison"]


def test_both_tables_say_on_what_they_were_measured(study: Study, tmp_path: Path) -> None:
    for name in SITES:  # a third word, which the study does not name: a class to the probe alone
        path = tmp_path / "data" / name / "labels.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line.replace("spot", "odd") if k % 12 == 3 else line for k, line in enumerate(lines)))
    summary = run(study, tmp_path)
    probe, classifier = summary["measured"]["comparison"], summary["measured"]["classifier"]
    sites = {name: open_site(tmp_path / "run" / "sites" / name) for name in SITES}
    tests = [site.split(study)[1] for site in sites.values()]
    words = [str(word) for test in tests for word in test.labels]
    assert probe["classes"] == ["clear", "odd", "spot"]
    assert classifier["classes"] == ["clear", "spot"]
    assert probe["images"] == len(words)
    assert classifier["images"] == len(words) - words.count("odd") < probe["images"]
    assert probe["patients"] == sum(test.n_patients for test in tests)
    for table, measured in (("comparison", probe), ("classifier", classifier)):
        assert {row["n_test"] for row in summary[table].values()} == {measured["patients"]}
    whole = [str(word) for site in sites.values() for word in site.cohort.labels]
    assert any(
        text.startswith(f"the classifier leaves out {whole.count('odd')} of {len(whole)} labelled images")
        for text in summary["warnings"]
    )
    assert any("3 classes apart and the classifier 2" in note for note in summary["notes"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Classes: clear, odd and spot" in page
    assert "Classes: clear and spot" in page
    assert "the classifier leaves out" in page


@pytest.mark.parametrize(
    ("ours", "other", "said"),
    [
        ((0.9, 0.85), 0.8, []),
        ((0.9, 0.75), 0.8, ["not surely better than"]),
        ((0.8, 0.75), 0.8, ["no better than"]),
        ((0.7, 0.65), 0.8, ["no better than"]),
    ],
)
def test_pretraining_that_has_not_helped_is_noted(ours: tuple[float, float], other: float, said: list[str]) -> None:
    rows = {"federated": {"auc": ours[0], "auc_low": ours[1], "auc_high": 0.95}, "scratch": {"auc": other}}
    notes = module._cautions(rows, {})
    assert len(notes) == len(said)
    assert all(words in note and f"against {other:.3f}" in note for words, note in zip(said, notes, strict=True))
    assert module._cautions({"federated": rows["federated"]}, {}) == []


def test_words_that_no_classifier_is_for_are_not_counted_where_it_takes_several(study: Study) -> None:
    several = tiny_study(stages=[{**TUNE, "multi_label": True}], evaluation=LABELS)
    assert module._left_out(several, ["spot", "odd"]) == []
    assert module._left_out(tiny_study(), ["spot", "odd"]) == []
    [text] = module._left_out(study, ["spot", "odd", "", "clear", "odd"])
    assert "leaves out 2 of 4 labelled images" in text


def test_seconds_are_those_of_all_attempts(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(rundir, "datetime", SimpleNamespace(now=lambda zone: datetime.fromtimestamp(clock[0], zone)))
    gather = module.gather

    def reading(*arguments: Any) -> Any:
        clock[0] += 5.0
        return gather(*arguments)

    monkeypatch.setattr(module, "gather", reading)

    def ticking(event: Mapping[str, Any]) -> None:
        clock[0] += 1.0 if event["event"] == "update_accepted" and "row" not in event else 0.0

    def stop(event: Mapping[str, Any]) -> None:
        ticking(event)
        stopped(event)

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path, listen=stop)  # 5 s of reading, 3 updates
    clock[0] += 1000.0
    assert run(study, tmp_path, resume=True, listen=ticking)["wall_s"] == 8.0 + 5.0 + 6.0  # a round was made again
    clock[0] += 1000.0
    assert run(study, tmp_path, resume=True, listen=ticking)["wall_s"] == 19.0 + 5.0
    assert "24 s in 3 attempts" in (tmp_path / "run" / "report.html").read_text()


def test_one_answer_for_all_is_noted(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module.row

    def constant(name: str, *rest: Any) -> Any:
        probed, classified, profiled = made(name, *rest)
        return replace(probed, one_answer=True), replace(classified, one_answer=name != "federated"), profiled

    monkeypatch.setattr(module, "row", constant)
    summary = run(study, tmp_path)
    notes = summary["notes"]
    [note] = [note for note in notes if "same answer" in note]
    assert note.startswith("row federated: the probe gives every test image the same answer")
    assert note in (tmp_path / "run" / "report.html").read_text()
    assert module._constant("pooled", None, Scores(1, 1, 1, 1, 9, 9)) == []
    sites = {name: open_site(tmp_path / "run" / "sites" / name) for name in SITES}
    assert summary["test_patients"] == who_is_tested(sites, study)


def test_copies_in_training_and_test_are_warned_of(study: Study, tmp_path: Path) -> None:
    north = tmp_path / "data" / "north"
    for number in range(20):  # all the same but for one corner
        image = draw(1, "clear")
        image[0, 0] = number
        Image.fromarray(image).save(north / f"{number}.png")
    told: list[str] = []
    summary = run(
        study, tmp_path, listen=lambda event: told.append(event["text"]) if event["event"] == "warning" else None
    )
    [warning] = [text for text in summary["warnings"] if "in training and in test" in text]
    assert warning in told
    assert warning in (tmp_path / "run" / "report.html").read_text()
    train, test = open_site(tmp_path / "run" / "sites" / "north").split(study)
    assert warning.startswith(f"north: {len(train) * len(test)} pairs of nearly equal images stand")
    for name in ("seats.json", "summary.json", "events.jsonl"):  # as if it had been killed while it read the images
        (tmp_path / "run" / name).unlink()
    assert warning in run(study, tmp_path, resume=True)["warnings"]
    again = (tmp_path / "run" / "events.jsonl").read_text().count("pairs of nearly equal images stand")
    assert run(study, tmp_path, resume=True)["warnings"] == summary["warnings"]
    assert (tmp_path / "run" / "events.jsonl").read_text().count("pairs of nearly equal images stand") == again


def write_split(folder: Path, test: int) -> Path:
    """Twelve patients, of whom the first `test` are tested by their own split column."""
    write_cohort(folder, 12)
    rows = list(csv.reader((folder / "labels.csv").read_text().splitlines()))
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*rows[0], "split"])
        table.writerows([[*row, "test" if k // 2 < test else "train"] for k, row in enumerate(rows[1:])])
    return folder


def test_runs_have_the_same_test_patients_where_their_digests_agree(tmp_path: Path) -> None:
    """Whatever made them: seed, fraction, labels, split column, names of sites, where the cohort is kept."""
    found: list[tuple[str, frozenset[bytes]]] = []

    def look(study: Study, folder: Path, dealt: bool = False, state: str = "state") -> None:
        cohort = build_cohort(folder, study.images, tmp_path / state, workers=1)
        tested = np.unique(cohort.patients[cohort.splits == "test"])
        trained = np.setdiff1d(np.arange(cohort.n_patients), tested)
        parts = [[*tested[::2], *trained[::2]], [*tested[1::2], *trained[1::2]]]
        chosen = [cohort.select(part) for part in parts] if dealt else [cohort]
        sites = {f"site-{k}": Site(f"site-{k}", part, tmp_path) for k, part in enumerate(chosen)}
        tests = [site.split(study)[1] for site in sites.values()]
        images = {test.pixels([k]).numpy().tobytes() for test in tests for k in range(len(test))}
        found.append((who_is_tested(sites, study), frozenset(images)))

    drawn, column = write_cohort(tmp_path / "drawn", 12, seed=1), write_split(tmp_path / "column", 4)
    labels = [LABELS["labels"], {"all": ["spot", "clear"]}, {"spot": ["spot"], "ignore": ["clear"]}]
    for seed in (1, 2):
        for fraction in (0.3, 0.5):
            for mapping in labels:
                rule = {"labels": mapping, "test_fraction": fraction}
                look(tiny_study(study={"seed": seed}, evaluation=rule), drawn)
                look(tiny_study(study={"seed": seed}, evaluation={**rule, "split": "column"}), column)
    by_column = tiny_study(evaluation={"split": "column"})
    look(by_column, column, dealt=True)
    look(by_column, column, state="elsewhere")
    look(by_column, write_split(tmp_path / "fewer", 3))
    assert 4 < len({images for _, images in found}) < len(found) - 8
    for one, images in found:
        for other, others in found:
            assert (one == other) == (images == others)


def private(folder: Path, epsilon: float) -> Study:
    """Three hospitals of thirty patients fine-tune under a promise to patients."""
    for number, name in enumerate(SITES):
        if not (folder / "data" / name).exists():
            write_cohort(folder / "data" / name, 30, seed=number)
    return tiny_study(
        stages=[{**TUNE, "rounds": 3, "batch_size": 4}],
        evaluation={**LABELS, "rows": ["random", "alone", "pooled"]},
        privacy={"mode": "patient", "noise": 2.0, "epsilon": epsilon, "delta": 1e-3},
        simulation={"site": [{"name": name, "cohort": name} for name in SITES]},
    )


def test_a_private_study_is_compared_and_says_what_it_spent(tmp_path: Path) -> None:
    found = run(private(tmp_path, 100.0), tmp_path)
    assert found["epsilon"].keys() == set(SITES)
    assert found["comparison"].keys() == {"random", "federated", "pooled", *(f"alone:{name}" for name in SITES)}
    assert not any("loss" in line for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines())


def test_a_study_whose_epsilon_is_spent_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    whole = run(private(tmp_path, 100.0), tmp_path)
    found = simulate(
        private(tmp_path, min(whole["epsilon"].values()) * 0.85),
        tmp_path / "short",
        tmp_path / "data",
        tmp_path / "state",
    )
    assert 0 < found["rounds"] < 3
    assert any("ended after round" in text for text in found["warnings"])
    assert "federated" in found["comparison"]
    assert not [row for row in found["comparison"] if row.startswith("alone")]
    assert any("no row alone:north" in note for note in found["notes"])
    assert {path.name for path in (tmp_path / "short").iterdir()} >= {"report.html", "MODEL_CARD.md", "summary.json"}


def test_where_too_few_are_left_for_a_step_a_fraction_of_the_labels_is_noted(tmp_path: Path) -> None:
    """When a site is left out of a private study: it used to end the run."""
    study = private(tmp_path, 100.0)
    sites = {name: Site(name, in_memory(patients), tmp_path / name) for name, patients in (("a", 30), ("b", 4))}
    assert _unlabelled(study, {"a": sites["a"]}) == ""
    assert "only 0 of at least 1 sites can be trained on (b: " in _unlabelled(study, {"b": sites["b"]})


def test_a_site_that_is_held_out_trains_nothing_and_is_measured(study: Study, tmp_path: Path) -> None:
    away = study.model_copy(update={"simulation": study.simulation.model_copy(update={"held_out": ["west"]})})
    asked = away.model_copy(update={"evaluation": away.evaluation.model_copy(update={"rows": ["random", "alone"]})})
    summary = run(asked, tmp_path)
    assert set(summary["sites"]) == {"east", "north"}
    assert set(summary["profiles"]) == {"random", "federated", "alone:east", "alone:north"}
    for found in summary["profiles"].values():
        assert set(found["at_sites"]) == set(SITES)
    assert set(summary["classifier_at_sites"]) == {"federated", "alone:east", "alone:north"}
    assert all(set(areas) == set(SITES) for areas in summary["classifier_at_sites"].values())
    assert summary["profiles"]["federated"]["own"] == {}
    assert set(summary["profiles"]["alone:east"]["own"]) == set(SITES)
    without = study.model_copy(
        update={"simulation": study.simulation.model_copy(update={"site": study.simulation.site[:2]})}
    )
    simulate(without, tmp_path / "without", tmp_path / "data", tmp_path / "state")
    ours, theirs = (load_tensors(tmp_path / name / "encoder.safetensors")[0] for name in ("run", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sites_may_be_invented(tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 1}], simulation={"sites": 2, "phantom": 8})
    for again in ("run", "again"):
        summary = simulate(study, tmp_path / again, tmp_path, tmp_path / "state")
        assert sum(site["patients"] for site in summary["sites"].values()) == 8
    assert len(list((tmp_path / "state").glob("phantom-*"))) == 1


LEARNING = {**TUNE, "rounds": 4, "local_epochs": 4, "learning_rate": 0.02}


def relabel(site: Path, words: Mapping[str, str]) -> None:
    """Other words for the labels of a site."""
    table = pd.read_csv(site / "labels.csv")
    table["label"] = table["label"].map(words)
    table.to_csv(site / "labels.csv", index=False)


def trained_to_the_end(out: Path) -> bool:
    """Has every site's update been taken in each of the rounds?"""
    return len(events(out, "update_accepted")) == 3 * len(events(out, "round_closed")) == 3 * LEARNING["rounds"]


def test_a_class_that_one_site_lacks_is_learnt_from_the_others(study: Study, tmp_path: Path) -> None:
    relabel(tmp_path / "data" / "west", {"clear": "clear"})  # and the others have no label
    some = tiny_study(**{**study.model_dump(mode="json"), "stages": [LEARNING]})
    summary = run(some, tmp_path)
    assert trained_to_the_end(tmp_path / "run")
    assert summary["classifier"]["federated"]["auc"] > 0.9
    assert summary["classifier_at_sites"]["federated"].keys() == {"east", "north"}  # one class has no AUC


def test_images_of_several_classes_are_learnt(study: Study, tmp_path: Path) -> None:
    words = {"spot": "bright|spot", "clear": "clear"}
    for name in SITES:
        relabel(tmp_path / "data" / name, words)
    labels = {name: [name] for name in ("bright", "clear", "spot")}
    plain = {**study.model_dump(mode="json"), "evaluation": {"labels": labels}}
    summary = run(tiny_study(**{**plain, "stages": [{**LEARNING, "multi_label": True}]}), tmp_path)
    assert trained_to_the_end(tmp_path / "run")
    assert summary["measured"]["classifier"]["classes"] == ["bright", "clear", "spot"]
    assert summary["classifier"]["federated"]["auc"] > 0.9
    assert summary["classifier"]["federated"]["balanced_accuracy"] > 0.75
