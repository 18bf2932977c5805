"""Leaving one site out: who trains where, what is compared, and what the numbers say."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from polyclinic.encoders import ENCODERS
from polyclinic.errors import QuorumLost, StudyError
from polyclinic.study import Study
from polyclinic.wire import Tensors
from polyclinic_simulations import holdout
from polyclinic_simulations.display import labels_needed
from polyclinic_simulations.holdout import STARTS, leave_one_site_out
from polyclinic_simulations.holdout_page import render_holdout

from ..tiny import SIMCLR, SITES, TinyEncoder, tiny_study, write_cohort

TUNE = {"kind": "finetune", "rounds": 2, "batch_size": 8, "learning_rate": 0.02, "views": {"flip": False}}
LABELS = {"labels": {"spot": ["spot"], "clear": ["clear"]}}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """Three fractions instead of nine."""
    monkeypatch.setattr(holdout, "FRACTIONS", (0.0, 0.5, 1.0))
    return holdout.FRACTIONS


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three hospitals of twelve patients; one round of SimCLR, two of fine-tuning."""
    for number, name in enumerate(SITES):
        write_cohort(tmp_path / "data" / name, 12, seed=number)
    return tiny_study(
        stages=[{**SIMCLR, "rounds": 1}, TUNE],
        evaluation=LABELS,
        simulation={"site": [{"name": name, "cohort": name} for name in SITES]},
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str], float | None]]:
    """(methods, sites, label fraction) of everything that is trained, in order."""
    made: list[tuple[list[str], list[str], float | None]] = []
    train = holdout.train_row

    def noting(study: Study, sites: Any, *rest: Any) -> Tensors:
        fraction = getattr(study.stages[-1], "label_fraction", None)
        made.append(([stage.method for stage in study.stages], sorted(sites), fraction))
        return train(study, sites, *rest)

    monkeypatch.setattr(holdout, "train_row", noting)
    return made


def test_the_held_out_site_trains_only_where_it_may(
    few: tuple[float, ...], study: Study, trainings: list[Any], tmp_path: Path
) -> None:
    summary = leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state")
    assert list(summary["leave_one_site_out"]) == list(SITES)
    for number, held in enumerate(SITES):
        others = [name for name in SITES if name != held]
        tuning = [(["supervised"], others, 1.0), (["supervised"], [held], 0.5), (["supervised"], [held], 1.0)]
        expected = [
            (["simclr"], others, None), *tuning,
            (["simclr"], list(SITES), None), *tuning,
            *tuning,
        ]  # fmt: skip
        assert trainings[number * 11 : (number + 1) * 11] == expected
    rows = pd.read_csv(tmp_path / "run" / "holdout.csv")
    assert len(rows) == 3 * len(STARTS) * 4
    assert rows.groupby(["held_out", "start", "scope", "label_fraction"]).size().eq(1).all()
    assert rows["auc"].between(0, 1).all()
    for name, found in summary["leave_one_site_out"].items():
        own = rows[(rows["held_out"] == name) & (rows["scope"] == "held-out")].set_index(["start", "label_fraction"])
        goal = own.loc[("supervised", 1.0), "auc"]
        assert found["supervised_at_100"] == goal
        for start, needed in found["labels_needed"].items():
            reached = [f for f in few if own.loc[(start, f), "auc"] >= goal]
            assert needed == (reached[0] if reached else None)
    page = (tmp_path / "run" / "holdout.html").read_text()
    assert page.count('aria-label="AUC by fraction of the labels"') == len(SITES)
    assert all(f"<h2>{name}</h2>" in page for name in SITES)
    made = len(trainings)
    again = leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state", resume=True)
    assert json.dumps(again) == json.dumps(summary)
    assert len(trainings) == made  # what is finished is finished, and nothing that only going on would need is kept
    assert not list((tmp_path / "run").rglob("moments-*")) + list((tmp_path / "run").rglob("checkpoints"))


def test_interrupted_and_resumed_is_as_undisturbed(few: tuple[float, ...], study: Study, tmp_path: Path) -> None:
    def impatient(event: Mapping[str, Any]) -> None:
        if "supervised, in-distribution" in str(event.get("row")):
            raise KeyboardInterrupt

    where = tmp_path / "data", tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, tmp_path / "run", *where, listen=impatient)
    sites = tmp_path / "run" / "sites"
    kept = {path.relative_to(sites).parts[1] for path in sites.rglob("moments-*")}
    assert len(kept) == 1, "sites keep what the study in hand has made of them, and nothing of those that are made"
    resumed = leave_one_site_out(study, tmp_path / "run", *where, resume=True)
    whole = leave_one_site_out(study, tmp_path / "whole", *where)
    assert json.dumps(resumed) == json.dumps(whole)
    one, other = (pd.read_csv(tmp_path / name / "holdout.csv").drop(columns="seconds") for name in ("run", "whole"))
    pd.testing.assert_frame_equal(one, other)


def test_seconds_are_those_of_a_rows_first_making(
    few: tuple[float, ...], study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, pace = [0.0], [10.0]
    train = holdout.train_row

    def timed(*arguments: Any) -> Tensors:
        clock[0] += pace[0]
        return train(*arguments)

    def impatient(event: Mapping[str, Any]) -> None:
        if "north, pretrained, held-out, 50%" in str(event.get("row")):
            raise KeyboardInterrupt

    monkeypatch.setattr(holdout, "train_row", timed)
    monkeypatch.setattr(holdout, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    where = tmp_path / "run", tmp_path / "data", tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, *where, listen=impatient)
    pace[0] = 1.0
    leave_one_site_out(study, *where, resume=True)
    rows = pd.read_csv(tmp_path / "run" / "holdout.csv")
    assert rows[rows["held_out"] == "east"]["seconds"].tolist() == [20.0, 0.0, 10.0, 10.0] * 2 + [10.0, 0.0, 10.0, 10.0]
    north = rows[rows["held_out"] == "north"]["seconds"].tolist()
    assert north == [20.0, 0.0, 10.0, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("min_sites", [1, 2])
def test_a_site_without_labels_costs_only_the_rows_that_need_them(
    min_sites: int, few: tuple[float, ...], study: Study, tmp_path: Path
) -> None:
    labels = tmp_path / "data" / "west" / "labels.csv"
    labels.write_text(labels.read_text().replace("spot", "").replace("clear", ""))
    some = tiny_study(**{**study.model_dump(mode="json"), "aggregation": {"min_sites": min_sites}})
    told: list[str] = []
    where = tmp_path / "run", tmp_path / "data", tmp_path / "state"
    found = leave_one_site_out(some, *where, listen=lambda event: told.append(event.get("text", "")))
    rows = pd.read_csv(tmp_path / "run" / "holdout.csv")
    made = rows.groupby("held_out").size().to_dict()
    assert made == ({"east": 12, "north": 12, "west": 3} if min_sites == 1 else {"west": 3})
    facts = found["leave_one_site_out"]
    note = facts["west"]["note"]
    assert "pretrained, held-out, could not be fine-tuned: only 0 of at least 1 sites" in note
    assert "(with 50%, 100% of the site's labels)" in note
    assert "west: no training patient has a label" in note  # the site's own reason
    assert "pretrained, held-out, could not be measured on the test patients (with 0% of the site's labels)" in note
    assert any(text.startswith("west held out: pretrained, held-out, could not be fine-tuned") for text in told)
    if min_sites == 2:
        assert "in-distribution, could not be fine-tuned: only 1 of at least 2 sites" in facts["east"]["note"]
    else:
        assert "could not be" not in facts["east"].get("note", "")
    assert labels_needed(facts["west"], "supervised") == labels_needed(facts["west"], "joined") == "not measurable"
    page = (tmp_path / "run" / "holdout.html").read_text()
    assert "could not be fine-tuned" in page
    assert "not measurable" in page


def test_what_fails_for_another_reason_than_labels_is_not_taken_for_that(
    few: tuple[float, ...], study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = holdout.train_row

    def failing(study: Study, sites: Any, folder: Path, *rest: Any) -> Tensors:
        if folder.name == "labels-0.5":
            raise QuorumLost("only 0 of at least 1 sites were found", "bring them back")
        return train(study, sites, folder, *rest)

    monkeypatch.setattr(holdout, "train_row", failing)
    with pytest.raises(QuorumLost):
        leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state")


@pytest.mark.parametrize("stages", [[SIMCLR], [TUNE]])
def test_a_study_that_compares_nothing_is_refused(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    study = tiny_study(stages=stages, evaluation=LABELS)
    with pytest.raises(StudyError, match="compares pretraining"):
        leave_one_site_out(study, tmp_path / "run", tmp_path, tmp_path / "state")
    assert not (tmp_path / "run").exists()


def test_too_few_sites_are_refused(study: Study, tmp_path: Path) -> None:
    plain = study.model_dump(mode="json")
    three = tiny_study(**{**plain, "aggregation": {"min_sites": 3}})
    with pytest.raises(StudyError, match="3 sites leave 2 when one is held out"):
        leave_one_site_out(three, tmp_path / "run", tmp_path / "data", tmp_path / "state")


def test_the_page_says_so_where_nothing_could_be_measured() -> None:
    page = render_holdout("<b>s</b>", pd.DataFrame([]), {"north": {"note": "too few labelled test patients"}})
    assert "too few labelled test patients" in page
    assert "<svg" not in page
    assert "<b>" not in page
