"""The rows: only the encoder differs between them, and no two patients become one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.cohort import build_cohort
from polyclinic.encoders import ENCODERS
from polyclinic.evaluation import Scores, pixel_features
from polyclinic.model import initial_tensors
from polyclinic.stages import Finetune
from polyclinic.study import Study
from polyclinic_client.site import Site, open_site, write_site
from polyclinic_simulations import compare
from polyclinic_simulations.compare import (
    classify,
    encode_sites,
    probe,
    row,
    row_names,
    train_one,
    train_row,
    without_pretraining,
)
from polyclinic_simulations.consortium import pool

from ..tiny import SIMCLR, SITES, TinyEncoder, in_memory, same_bits, tiny_study, write_cohort


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    yield


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Site]:
    """Three sites whose patients are all numbered from 0."""
    cohorts = {name: in_memory(10 + 2 * k, seed=k + 1) for k, name in enumerate(SITES)}
    return {name: Site(name, cohort, tmp_path / "sites" / name) for name, cohort in cohorts.items()}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every probe: features, classes, patients of training, then of test."""
    calls: list[tuple[Any, ...]] = []

    class Noting:
        classes, strength = ["clear", "spot"], 1.0

        def __init__(self, *args: Any, seed: int) -> None:
            self._args = args[:3]

        def score(self, *args: Any, seed: int) -> Scores:
            calls.append((*self._args, *args, seed))
            return Scores(0.5, 0.4, 0.6, 0.5, 1, 1)

        def auc(self, *args: Any) -> float:
            return 0.5

    monkeypatch.setattr(compare, "learn_probe", Noting)
    return calls


def everything(study: Study) -> Study:
    return study.model_copy(
        update={"evaluation": study.evaluation.model_copy(update={"rows": ["pixels", "random", "alone", "pooled"]})}
    )


def test_rows_are_those_that_the_study_asks_for(sites: dict[str, Site]) -> None:
    study = tiny_study()
    assert row_names(study, sites) == ["federated"]
    assert row_names(everything(study), sites) == [
        "pixels", "random", "federated", "alone:east", "alone:north", "alone:west", "pooled",
    ]  # fmt: skip


def test_all_rows_have_the_same_patients_and_only_the_features_differ(
    sites: dict[str, Site], probes: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    study = everything(tiny_study(stages=[{**SIMCLR, "rounds": 1}]))
    federated = {name: value + 1 for name, value in initial_tensors(study, 0, None).items()}
    for name in row_names(study, sites):
        row(name, study, sites, tmp_path / "run", federated)
    assert len(probes) == 7
    for other in probes[1:]:
        for place in (1, 2, 4, 5):
            assert np.array_equal(probes[0][place], other[place])
        assert probes[0][6] == other[6]
    encoders = {call[0].tobytes() + call[3].tobytes() for call in probes}
    assert len(encoders) == 7


def test_patients_of_two_sites_are_never_one_and_none_is_on_both_sides(
    sites: dict[str, Site], probes: list[tuple[Any, ...]]
) -> None:
    study = tiny_study()

    def first_pixels(cohort: Any) -> Any:
        return cohort.pixels(np.arange(len(cohort))).numpy().reshape(len(cohort), -1)[:, :64].astype(np.float32)

    probe(encode_sites(first_pixels, study, sites), study)
    train_x, train_y, train_patients, test_x, test_y, test_patients, _ = probes[0]
    splits = [site.split(study) for site in sites.values()]
    assert len(np.unique(train_patients)) == sum(train.n_patients for train, _ in splits)
    assert len(np.unique(test_patients)) == sum(test.n_patients for _, test in splits)
    for x, y, patients, half in ((train_x, train_y, train_patients, 0), (test_x, test_y, test_patients, 1)):
        assert np.array_equal(y, np.concatenate([split[half].labels for split in splits]))
        images = {p: {row.tobytes() for row in x[patients == p]} for p in np.unique(patients)}
        assert all(len(own) == 2 for own in images.values())  # two images a patient, as every site's
    seen = {row.tobytes() for row in train_x}
    assert not seen & {row.tobytes() for row in test_x}
    assert len(seen) == len(train_x)


def test_pooled_trains_on_the_sites_training_patients_and_on_no_test_patient(
    sites: dict[str, Site], tmp_path: Path
) -> None:
    study = tiny_study()
    train, test = pool(sites, tmp_path).split(study)
    splits = [site.split(study) for site in sites.values()]
    for half, together in enumerate((train, test)):
        assert together.n_patients == sum(split[half].n_patients for split in splits)
        separate = np.concatenate([split[half].pixels(np.arange(len(split[half]))).numpy() for split in splits])
        assert np.array_equal(together.pixels(np.arange(len(together))).numpy(), separate)


def test_a_row_that_was_finished_is_read_back(
    sites: dict[str, Site], probes: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 1}])
    first = row("alone:north", study, sites, tmp_path, {})
    assert row("alone:north", study, sites, tmp_path, {}) == first
    assert len(probes) == 1
    assert json.loads((tmp_path / "rows" / "alone-north" / "scores.json").read_text())[0]["auc"] == 0.5


def test_alone_goes_on_where_it_was_stopped(sites: dict[str, Site], tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 3}])
    whole = train_one(study, sites["north"], tmp_path / "whole")

    class Stop(BaseException):
        pass

    def listen(line: dict[str, Any]) -> None:
        if line["event"] == "update_accepted" and line["round"] == 2:
            raise Stop

    fresh = replace(sites["north"], state=tmp_path / "fresh")
    with pytest.raises(Stop):
        train_one(study, fresh, tmp_path / "stopped", listen)
    assert same_bits(train_one(study, fresh, tmp_path / "stopped"), whole)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_alone_has_the_same_bits_though_the_federation_used_the_same_state(
    rounds: int, sites: dict[str, Site], tmp_path: Path
) -> None:
    # With min_sites = 1 the study of one site is the study of all, so its stored rounds are found.
    from polyclinic_client.app import make_app
    from polyclinic_server.rounds import run_study
    from polyclinic_simulations.engines.local import LocalGrid

    from ..tiny import open_run

    study = tiny_study(aggregation={"min_sites": 1}, stages=[{**SIMCLR, "rounds": rounds}])
    expected = train_one(study, replace(sites["north"], state=tmp_path / "fresh"), tmp_path / "expected")
    apps = {name: make_app(lambda _, site=site: site) for name, site in sites.items()}
    run = open_run(tmp_path / "run", study)
    run_study(LocalGrid(apps), study, run, {name: site.cohort.n_patients for name, site in sites.items()})
    assert same_bits(train_one(study, sites["north"], tmp_path / "alone"), expected)


def test_a_row_whose_checkpoints_are_gone_is_trained_again(sites: dict[str, Site], tmp_path: Path) -> None:
    study = tiny_study()
    whole = train_one(study, sites["north"], tmp_path / "row")
    shutil.rmtree(tmp_path / "row")
    assert same_bits(train_one(study, sites["north"], tmp_path / "row"), whole)


def test_fine_tuning_learns_the_classes_and_scratch_is_the_same_without_pretraining(
    sites: dict[str, Site], tmp_path: Path
) -> None:
    tune = {"kind": "finetune", "rounds": 8, "local_epochs": 4, "batch_size": 8, "learning_rate": 0.02}
    gentle = {"views": {"flip": False, "crop": [0.9, 1.0]}, "probe_rounds": 1}
    labels = {"spot": ["spot"], "clear": ["clear"]}  # in another order than in the study's canonical form
    study = tiny_study(stages=[{**SIMCLR, "rounds": 1}, {**tune, **gentle}], evaluation={"labels": labels})
    scratch = without_pretraining(study, keep_init=False)
    assert [stage.method for stage in scratch.stages] == ["supervised"]
    for name, wanted in (("whole", study), ("scratch", scratch)):
        tensors = train_row(wanted, sites, tmp_path / name, None, None)
        swapped = np.where(sites["north"].cohort.labels == "spot", "clear", "spot")
        away = Site("away", replace(sites["north"].cohort, labels=swapped), tmp_path / "away")
        scores = classify(wanted, tensors, sites, {"away": away})
        assert scores is not None
        assert scores.auc > 0.9
        assert scores.accuracy > 0.7
        assert set(scores.at_sites) == {*sites, "away"}
        assert scores.at_sites["north"] > 0.8
        assert scores.at_sites["away"] < 0.2  # where every label is wrong; it moves no other figure
        assert replace(scores, at_sites={}) == replace(classify(wanted, tensors, sites), at_sites={})


def test_pooled_learns_from_the_labels_that_the_sites_have(sites: dict[str, Site], tmp_path: Path) -> None:
    tune = {"kind": "finetune", "rounds": 8, "label_fraction": 0.3, "patience": 2}
    study = tiny_study(stages=[tune], evaluation={"labels": {"spot": ["spot"], "clear": ["clear"]}})
    stage = study.stages[0]
    assert isinstance(stage, Finetune)

    def pixels(halves: Any) -> list[set[bytes]]:
        return [{cohort.pixels([k]).numpy().tobytes() for k in range(len(cohort))} for cohort in halves]

    own = [pixels(site.labelled(study, stage)) for site in sites.values()]
    together = pixels(pool(sites, tmp_path).labelled(study, stage))
    assert together == [set.union(*(halves[side] for halves in own)) for side in (0, 1)]


def test_scratch_is_not_held_back_by_what_spares_a_trained_encoder() -> None:
    labels = {"labels": {"spot": ["spot"], "clear": ["clear"]}}
    study = tiny_study(stages=[SIMCLR, {"kind": "finetune", "rounds": 4}], evaluation=labels)
    (stage,) = without_pretraining(study, keep_init=False).stages
    assert isinstance(stage, Finetune)
    assert (stage.probe_rounds, stage.layer_decay) == (0, 1.0)


def test_rows_are_read_by_the_labels_as_they_were(tmp_path: Path) -> None:
    """A site whose labels are all wrong spoils what is learnt from it, not the ruler."""
    built = build_cohort(write_cohort(tmp_path / "data", 10), tiny_study().images, tmp_path / "state")
    wrong = ["clear" if label == "spot" else "spot" for label in built.labels.tolist()]
    write_site(tmp_path / "site", "east", built.folder, None, wrong)
    site, study = open_site(tmp_path / "site"), tiny_study()
    assert site.cohort.labels.tolist() == wrong
    train, test = encode_sites(pixel_features, study, {"east": site})["east"]
    for half, own in zip((train, test), site.split(study), strict=True):
        assert (half.classes != own.labels).all()
        assert half.classes.tolist() == [built.labels[built.rows == row][0] for row in own.rows]
