"""A dry run: what it measures, that it leaves nothing behind, and that it stays within the site's caps."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError, PolyclinicError
from polyclinic.study import Study, resolve
from polyclinic_client import caps, rehearsal
from polyclinic_client.hospital import SETTINGS, Hospital, make_hospital, what_leaves
from polyclinic_client.preview import Preview, preview
from polyclinic_client.rehearsal import Pace, Rehearsal, measure, rehearse
from polyclinic_client.site import Site

from ..tiny import SIMCLR, in_memory, tiny_study, write_cohort

FINETUNE = {"kind": "finetune", "rounds": 3, "batch_size": 4}
LABELS = {"labels": {"ill": ["spot"], "well": ["clear"]}, "rows": []}
MAE = resolve(
    {
        "study": {"name": "mae"},
        "images": {"size": 16},
        "encoder": {"name": "vit_tiny"},
        "stages": [{"kind": "pretrain", "method": "mae", "rounds": 2, "batch_size": 4}],
    }
)
"""For a process of its own, to which the tiny encoder is not known."""


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    make_hospital(tmp_path / "site", "north", write_cohort(tmp_path / "images", 6))
    return Hospital(tmp_path / "site")


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "__pycache__"}


def found(study: Study, cohort: Cohort, folder: Path) -> Rehearsal:
    return measure(study, Site("north", cohort, folder), time.time())


def test_every_kind_of_stage_is_timed_and_nothing_is_written(tmp_path: Path) -> None:
    stages = [{**SIMCLR, "batch_size": 4}, {**SIMCLR, "method": "micle", "batch_size": 4}, FINETUNE]
    result = found(tiny_study(stages=stages, evaluation=LABELS), in_memory(40), tmp_path)
    assert [(stage.method, stage.rounds) for stage in result.stages] == [("simclr", 2), ("micle", 2), ("supervised", 3)]
    assert all(stage.images_s > 0 and stage.round_s > 0 for stage in result.stages)
    assert result.total_s == pytest.approx(sum(stage.rounds * stage.round_s for stage in result.stages))
    assert result.memory_mb > 50
    assert files(tmp_path) == set()


def test_a_round_is_reckoned_from_a_few_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which every batch takes a second, the first one ten; and no time for the rest."""
    ticks = iter([0.0, 10.0, *(11.0 + k for k in range(100))])
    monkeypatch.setattr(rehearsal, "_encoding_s", lambda *_: 0.0)
    monkeypatch.setattr(rehearsal, "perf_counter", lambda: next(ticks))
    study = tiny_study(stages=[{**SIMCLR, "batch_size": 4, "local_epochs": 3}])
    cohort = in_memory(60)
    training, _ = Site("north", cohort, tmp_path).split(study)
    (pace,) = found(study, cohort, tmp_path).stages
    steps = 3 * -(-len(training) // 4)
    assert pace.images_s == pytest.approx(3 * len(training) / steps)
    assert steps <= pace.round_s < steps + 1.0
    assert next(ticks) == 11.0 + rehearsal.BATCHES  # no more batches than that


def test_a_cohort_of_one_batch_is_timed_too(tmp_path: Path) -> None:
    (pace,) = found(tiny_study(), in_memory(3), tmp_path).stages
    assert pace.images_s > 0


def test_a_study_that_cannot_be_trained_here_says_why(tmp_path: Path) -> None:
    elsewhere = {"labels": {"a": ["x"], "b": ["y"]}, "rows": []}
    with pytest.raises(CohortError, match="no training patient has a label"):
        found(tiny_study(stages=[FINETUNE], evaluation=elsewhere), in_memory(10), tmp_path)


def test_a_stage_without_labels_here_takes_no_time(tmp_path: Path) -> None:
    elsewhere = {"labels": {"a": ["x"], "b": ["y"]}, "rows": []}
    study = tiny_study(stages=[{**SIMCLR, "rounds": 2}, FINETUNE], evaluation=elsewhere)
    simclr, supervised = found(study, in_memory(10), tmp_path).stages
    assert simclr.images_s > 0 and simclr.round_s > 0
    assert (supervised.method, supervised.images_s, supervised.round_s) == ("supervised", 0.0, 0.0)


def test_a_stage_that_learns_nothing_here_is_no_stage_without_labels(tmp_path: Path) -> None:
    plain = MAE.model_dump(mode="json")
    study = resolve({**plain, "stages": [*plain["stages"], {**SIMCLR, "rounds": 2}]})
    with pytest.raises(CohortError, match="no batch teaches anything"):
        found(study, in_memory(2), tmp_path)  # of which one is trained on


def test_says_which_stage_has_no_labels_here(hospital: Hospital) -> None:
    elsewhere = {"labels": {"a": ["x"], "b": ["y"]}, "rows": []}
    study = tiny_study(stages=[{**SIMCLR, "rounds": 2}, FINETUNE], evaluation=elsewhere)
    cohort = hospital.cohort_for(study)
    trains_on = hospital.trains_on(study, cohort)
    pace = Rehearsal([Pace("simclr", 2, 20.0, 30.0), Pace("supervised", 2, 0.0, 0.0)], 100.0, "cpu")
    seen = Preview(study, hospital.settings.policy, cohort, trains_on, what_leaves(study), pace)
    text = "\n".join(seen.words())
    assert " rounds of supervised on nothing: no patient to train on has its labels here" in text
    assert [stage["patients"] for stage in seen.plain()["stages"]] == [trains_on[0].n_patients, 0]  # type: ignore[union-attr]


def test_what_takes_longer_than_the_coordinator_waits_is_said() -> None:
    study = tiny_study(aggregation={"round_deadline_s": 60.0})
    slow = Rehearsal([Pace("simclr", 2, 1.0, 90.0)], 100.0, "cpu")
    assert slow.later_than(study) == "a round takes about 1.5 min and the coordinator waits 1.0 min for it"
    assert not replace(slow, stages=[Pace("simclr", 2, 1.0, 59.0)]).later_than(study)


def test_in_a_process_of_its_own_under_the_sites_caps(hospital: Hospital) -> None:
    cohort = hospital.cohort_for(MAE)
    before = files(hospital.path)
    seen = preview(hospital, MAE, cohort)
    assert files(hospital.path) == before
    text = "\n".join(seen.words())
    for said in (
        "trains 2 rounds of mae on 8 images of 4 patients",
        "of the 12 images of 6 patients here, some patients are for measuring only",
        "a round of mae",
        "an estimate from a few batches just now on the processor",
        "each round of mae lets out",
        "with it the number of patients, and the figures alignment, ",
        "no differential privacy",
        "26 orders",
    ):
        assert said in text
    plain = seen.plain()
    (stage,) = plain["stages"]
    assert stage["bytes_a_round"] > 1e6 and "encoder.pos_embed" not in stage["tensors"]
    assert plain["estimate"]["seconds"] == pytest.approx(2 * stage["round_s"])
    assert plain["estimate"]["memory_mb"] < 2000
    path = hospital.path / SETTINGS
    path.write_text(path.read_text().replace("memory_gb = 0.0", "memory_gb = 0.15"))
    with pytest.raises(PolyclinicError, match="dry run"):
        rehearse(Hospital(hospital.path), MAE, cohort)


def test_the_peak_is_of_this_process() -> None:
    assert 20 < caps.peak_mb() < 100_000
