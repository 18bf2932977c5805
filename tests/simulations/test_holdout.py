"""Leaving one site out: who trains where, what is compared, and what the numbers say."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import save_file

from polyclinic.encoders import ENCODERS
from polyclinic.errors import QuorumLost, StudyError
from polyclinic.report import read_run
from polyclinic.study import Study, load_study, with_weights
from polyclinic.wire import Tensors
from polyclinic_client.site import Site
from polyclinic_server import rounds
from polyclinic_simulations import holdout
from polyclinic_simulations.display import labels_needed
from polyclinic_simulations.holdout import STARTS, _train, leave_one_site_out
from polyclinic_simulations.holdout_page import render_holdout
from polyclinic_simulations.simulate import HOLDOUT
from polyclinic_simulations.tidy import tidy

from ..tiny import SIMCLR, SITES, TinyEncoder, in_memory, tiny_study, write_cohort

TUNE = {"kind": "finetune", "rounds": 2, "batch_size": 8, "learning_rate": 0.02, "views": {"flip": False}}
LABELS = {"labels": {"spot": ["spot"], "clear": ["clear"]}}
FEW = (0.0, 0.5, 1.0)
Training = tuple[list[str], list[str], float | None, float | None]
"""(methods, sites, label fraction, decay of the rate by layer) of something that is trained."""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three fractions instead of nine."""
    monkeypatch.setattr(holdout, "FRACTIONS", FEW)


def consortium(folder: Path) -> Study:
    """Three hospitals of twelve patients; one round of SimCLR, two of fine-tuning."""
    for number, name in enumerate(SITES):
        write_cohort(folder / "data" / name, 12, seed=number)
    return tiny_study(
        stages=[{**SIMCLR, "rounds": 1}, TUNE],
        evaluation=LABELS,
        simulation={"site": [{"name": name, "cohort": name} for name in SITES]},
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return consortium(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Training]]:
    """The protocol as nobody disturbs it: its folder, its summary, and everything that it has trained, in order."""
    folder, made, train = tmp_path_factory.mktemp("whole"), list[Training](), holdout.train_row

    def noting(study: Study, sites: Any, *rest: Any) -> Tensors:
        fraction, decay = (getattr(study.stages[-1], name, None) for name in ("label_fraction", "layer_decay"))
        made.append(([stage.method for stage in study.stages], sorted(sites), fraction, decay))
        return train(study, sites, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
        patch.setattr(holdout, "FRACTIONS", FEW)
        patch.setattr(holdout, "train_row", noting)
        summary = leave_one_site_out(consortium(folder), folder / "run", folder / "data", folder / "state")
    return folder, summary, made


def test_labels_are_read_in_nine_fractions() -> None:
    assert holdout.FRACTIONS == (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 1)


def test_the_held_out_site_trains_only_where_it_may(
    whole: tuple[Path, dict[str, Any], list[Training]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary, trainings = whole
    assert list(summary["leave_one_site_out"]) == list(SITES)
    for number, held in enumerate(SITES):
        others = [name for name in SITES if name != held]
        here = [(["supervised"], [held], 0.5, 0.75), (["supervised"], [held], 1.0, 0.75)]
        spared, random = ((["supervised"], others, 1.0, decay) for decay in (0.75, 1.0))
        expected = [
            (["simclr"], others, None, None), spared, *here,
            (["simclr"], list(SITES), None, None), spared, *here,
            random, *here,
        ]  # fmt: skip
        assert trainings[number * 11 : (number + 1) * 11] == expected
    rows = pd.read_csv(folder / "run" / "holdout.csv")
    assert len(rows) == 3 * len(STARTS) * 4
    assert rows.groupby(["held_out", "start", "scope", "label_fraction"]).size().eq(1).all()
    assert rows["auc"].between(0, 1).all()
    for name, found in summary["leave_one_site_out"].items():
        own = rows[(rows["held_out"] == name) & (rows["scope"] == "held-out")].set_index(["start", "label_fraction"])
        goal = own.loc[("supervised", 1.0), "auc"]
        assert found["supervised_at_100"] == goal
        for start, needed in found["labels_needed"].items():
            reached = [f for f in FEW if own.loc[(start, f), "auc"] >= goal]
            assert needed == (reached[0] if reached else None)
    page = (folder / "run" / "holdout.html").read_text()
    assert page.count('aria-label="AUC by fraction of the labels"') == len(SITES)
    assert all(f"<h2>{name}</h2>" in page for name in SITES)
    monkeypatch.setattr(holdout, "train_row", lambda *arguments: pytest.fail("what is finished is finished"))
    study = load_study(folder / "run" / "study.toml")
    again = leave_one_site_out(study, folder / "run", folder / "data", folder / "state", resume=True)
    assert json.dumps(again) == json.dumps(summary)
    left = [*(folder / "run").rglob("moments-*"), *(folder / "run").rglob("checkpoints")]
    assert not left, "nothing that only going on would need is kept"


def test_supervised_weights_start_pretraining_and_fine_tuning_alike(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REMEDIS: supervised weights, contrastive pretraining, fine-tuning, beside the same weights fine-tuned alone."""
    study = consortium(tmp_path)
    given = {name: value + 1 for name, value in TinyEncoder(1).state_dict().items()}
    save_file(given, tmp_path / "theirs.safetensors")
    init = {"init": {"file": "theirs.safetensors", "family": "torchvision"}}
    study = with_weights(tiny_study(**{**study.model_dump(mode="json"), "encoder": init}), tmp_path / "study.toml")
    started: list[tuple[str, Tensors]] = []
    first = rounds.first_tensors

    def noting(study: Study) -> Tensors:
        started.append((study.stages[0].method, first(study)))
        if len(started) == 9:  # two starts with pretraining, each fine-tuned thrice, and the one without
            raise KeyboardInterrupt
        return started[-1][1]

    monkeypatch.setattr(rounds, "first_tensors", noting)
    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state")
    theirs = [
        all((tensors[f"encoder.{name}"] == value.numpy()).all() for name, value in given.items())
        for _, tensors in started
    ]
    assert [method for method, _ in started] == [*["simclr", *["supervised"] * 3] * 2, "supervised"]
    assert theirs == [*[True, False, False, False] * 2, True]


def test_a_site_without_pairs_is_warned_of(few: None, tmp_path: Path) -> None:
    for number, name in enumerate(SITES):
        write_cohort(tmp_path / "data" / name, 12, seed=number, images=1 if name == "east" else 2)
    sites = {"site": [{"name": name, "cohort": name} for name in SITES]}
    stages = [{**SIMCLR, "method": "micle", "rounds": 1}, {**TUNE, "rounds": 1, "probe_rounds": 0}]
    study = tiny_study(stages=stages, evaluation=LABELS, simulation=sites)
    said: list[Mapping[str, Any]] = []

    def listen(event: Mapping[str, Any]) -> None:
        said.append(event)
        if event["event"] == "row_finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state", listen=listen)
    [text] = [str(event["text"]) for event in said if "two images" in str(event.get("text"))]
    assert text == "east: no patient to train on has two images: micle trains as simclr"


def test_killed_inside_a_round_and_resumed_is_as_undisturbed(
    few: None, study: Study, whole: tuple[Path, dict[str, Any], list[Training]], tmp_path: Path
) -> None:
    run, start = tmp_path / "run", Path(HOLDOUT, "east", "joined")

    def impatient(done: int, total: int) -> None:
        if (run / start / "finetuning" / "checkpoints" / "round-0001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_one_site_out(study, run, tmp_path / "data", tmp_path / "state", progress=impatient)
    kept = [path.relative_to(run) for path in run.rglob("moments-*")]
    assert kept, "or the round that is made again would start from nothing"
    assert all(path.is_relative_to(start) for path in kept), "of a start that is finished, no site keeps anything"
    resumed = leave_one_site_out(study, run, tmp_path / "data", tmp_path / "state", resume=True)
    assert json.dumps(resumed) == json.dumps(whole[1])
    one, other = (pd.read_csv(out / "holdout.csv").drop(columns="seconds") for out in (run, whole[0] / "run"))
    pd.testing.assert_frame_equal(one, other)
    encoders = [path.relative_to(run) for path in run.rglob("encoder.safetensors")]
    assert len(encoders) == len(SITES) * 5  # of three starts, two of which are pretrained
    assert all((run / path).read_bytes() == (whole[0] / "run" / path).read_bytes() for path in encoders)


def test_each_training_has_the_whole_epsilon_to_spend(tmp_path: Path) -> None:
    """The starts pretrain by one study, of which the epsilon here allows a site one round and no second."""
    study = tiny_study(
        stages=[{**TUNE, "rounds": 1, "batch_size": 4}],
        evaluation=LABELS,
        privacy={"mode": "patient", "noise": 2.0, "epsilon": 1.55, "delta": 1e-3},
    )
    sites = {name: Site(name, in_memory(16, seed, images=1), tmp_path / name) for seed, name in enumerate(SITES)}
    for start in STARTS[:2]:
        _train(study, sites, tmp_path / start, None)
        run = read_run(tmp_path / start)
        assert run.epsilon.keys() == set(SITES)
        assert all(1.55 / 2 < spent <= 1.55 for spent in run.epsilon.values())
        tidy(tmp_path)  # as after a start: a site that still has its update trains nothing


def test_seconds_are_those_of_a_rows_first_making(
    few: None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    min_sites: int, few: None, study: Study, tmp_path: Path
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
        assert "every row, could not be fine-tuned: only 1 of at least 2 sites" in facts["east"]["note"]
    else:
        assert "could not be" not in facts["east"].get("note", "")
    assert labels_needed(facts["west"], "supervised") == labels_needed(facts["west"], "joined") == "not measurable"
    page = (tmp_path / "run" / "holdout.html").read_text()
    assert "could not be fine-tuned" in page
    assert "not measurable" in page


def test_what_fails_for_another_reason_than_labels_is_not_taken_for_that(
    few: None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = holdout.train_row

    def failing(study: Study, sites: Any, folder: Path, *rest: Any) -> Tensors:
        if folder.name == "labels-0.5":
            raise QuorumLost("only 0 of at least 1 sites were found", "bring them back")
        return train(study, sites, folder, *rest)

    monkeypatch.setattr(holdout, "train_row", failing)
    with pytest.raises(QuorumLost):
        leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state")


def test_a_start_whose_encoder_collapses_costs_its_own_rows_only(
    few: None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "collapsed", lambda found: True)
    summary = leave_one_site_out(study, tmp_path / "run", tmp_path / "data", tmp_path / "state")
    assert set(pd.read_csv(tmp_path / "run" / "holdout.csv")["start"]) == {"supervised"}
    for found in summary["leave_one_site_out"].values():
        assert found["labels_needed"] == {"pretrained": None, "joined": None}
        assert found["supervised_at_100"] is not None
        for start in ("pretrained", "joined"):
            assert f"{start}, every row, could not be pretrained: the encoder has collapsed" in found["note"]
        assert "of the site's labels)" not in found["note"]


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
