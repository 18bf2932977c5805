"""A study that promises patients privacy, at a site: what is charged, what leaves, and what never trains."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.errors import CohortError, Refused, StorageError
from polyclinic.model import initial_tensors
from polyclinic.privacy.accounting import Event, epsilon
from polyclinic.privacy.ledger import BudgetSpent, Cap
from polyclinic.study import Study
from polyclinic.wire import Order, Tensors, digest
from polyclinic_client import work
from polyclinic_client.site import Site
from polyclinic_client.work import answer

from ..tiny import in_memory, tiny_study

SUPERVISED = {"kind": "finetune", "rounds": 9, "batch_size": 8}
LABELS = {"clear": ["clear"], "spot": ["spot"]}


def private(**privacy: Any) -> Study:
    return tiny_study(
        stages=[SUPERVISED],
        evaluation={"rows": [], "labels": LABELS},
        privacy={"mode": "patient", "noise": 2.0, "delta": 1e-3, **privacy},
    )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site("north", in_memory(60), tmp_path / "north")


def start(study: Study, round: int = 1, head: str = "") -> tuple[Order, Tensors]:
    tensors = initial_tensors(study, 0, None)
    return Order(study.canonical(), 0, round, "north", digest(tensors), True, True, head), tensors


def events(site: Site, study: Study, rounds: int) -> list[Event]:
    patients = site.labelled(study, study.stages[0])[0].n_patients  # type: ignore[arg-type]
    return [Event(2.0, 8 / patients, -(-patients // 8))] * rounds


def test_a_round_is_charged_and_nothing_leaves_but_the_update_and_what_was_spent(site: Site) -> None:
    study = private()
    reply, update = answer(*start(study), site)
    assert update is not None
    assert any(np.abs(value).max() > 0 for value in update.values())
    assert reply.patients == 1
    assert reply.evaluation == {}
    assert set(reply.train) == {"epsilon"}
    true = epsilon(events(site, study, 1), 1e-3)
    assert site.spending.epsilon(1e-3) == pytest.approx(true)
    assert true <= reply.train["epsilon"] <= 1.1 * true
    assert reply.train["epsilon"] == float(f"{reply.train['epsilon']:.2g}")
    assert reply.head == site.spending.head()


def test_a_round_asked_for_again_is_answered_from_the_store_and_from_other_tensors_charged_again(site: Site) -> None:
    study = private()
    order, tensors = start(study)
    _, first = answer(order, tensors, site)
    _, again = answer(order, tensors, site)
    assert first is not None and again is not None
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert site.spending.epsilon(1e-3) == pytest.approx(epsilon(events(site, study, 1), 1e-3))
    other = {name: value + np.float32(0.1) for name, value in tensors.items()}
    answer(replace(order, model=digest(other)), other, site)
    assert site.spending.epsilon(1e-3) == pytest.approx(epsilon(events(site, study, 2), 1e-3))


def test_two_trainings_from_the_same_tensors_differ(site: Site, tmp_path: Path) -> None:
    """Neither noise nor the sampling of patients comes from the study's seed."""
    study = private()
    _, one = answer(*start(study), site)
    _, other = answer(*start(study), replace(site, state=tmp_path / "elsewhere"))
    assert one is not None and other is not None
    assert not any(np.array_equal(one[name], other[name]) for name in one if "head" in name)


@pytest.mark.parametrize("whose", ["the study's", "the site's"])
def test_when_it_is_spent_the_site_abstains(whose: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[object] = []
    monkeypatch.setattr(work, "train", lambda *args, inner=work.train, **kw: trained.append(kw) or inner(*args, **kw))
    once = epsilon(events(site, private(), 1), 1e-3)
    study = private(epsilon=1.01 * once if whose == "the study's" else 100.0)
    site = replace(site, caps=() if whose == "the study's" else (Cap(1.01 * once, 1e-3),))
    answer(*start(study), site)
    with pytest.raises(BudgetSpent, match=r"round 2 of study 'tiny' would pass what the"):
        answer(*start(study, 2), site)
    assert len(trained) == 1
    if whose == "the site's":
        with pytest.raises(BudgetSpent):
            answer(*start(private(epsilon=99.0)), site)  # another study, the same patients
    else:
        answer(*start(private(epsilon=99.0)), site)


def test_a_site_smaller_than_the_expected_batch_trains_nothing(site: Site) -> None:
    small = replace(site, cohort=in_memory(8))
    with pytest.raises(CohortError, match="batch"):
        answer(*start(private()), small)
    assert small.spending.events() == []


def test_a_delta_that_promises_nothing_is_refused(site: Site) -> None:
    with pytest.raises(Refused, match="1 / patients"):
        answer(*start(private(delta=0.5)), site)
    assert site.spending.events() == []


def test_a_ledger_that_cannot_be_written_stops_the_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "train", lambda *args, **kwargs: pytest.fail("it has trained"))
    (site.state / "privacy").parent.mkdir(parents=True)
    (site.state / "privacy").write_text("a file where the ledger's folder should be")
    with pytest.raises(StorageError):
        answer(*start(private()), site)


def test_a_restored_backup_is_noticed(site: Site, tmp_path: Path) -> None:
    study = private(epsilon=100.0)
    first, _ = answer(*start(study), site)
    kept = {path.name: path.read_bytes() for path in (site.state / "privacy").iterdir()}
    order, tensors = start(study, 2, first.head)
    second, _ = answer(order, tensors, site)
    assert second.head != first.head
    for name, content in kept.items():
        (site.state / "privacy" / name).write_bytes(content)
    with pytest.raises(Refused, match="not the one that the coordinator has last heard of"):
        answer(*start(study, 3, second.head), site)
    answer(*start(study, 3, first.head), site)


def test_killed_in_training_a_round_counts_as_spent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "train", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        try:
            answer(*start(private()), site)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert site.spending.epsilon(1e-3) == pytest.approx(epsilon(events(site, private(), 1), 1e-3))


def test_under_site_level_privacy_no_figure_leaves_and_nothing_is_charged(site: Site) -> None:
    study = tiny_study(privacy={"mode": "site"})
    reply, update = answer(*start(study), site)
    assert update is not None
    assert (reply.patients, reply.train, reply.evaluation, reply.head) == (1, {}, {}, "")
    assert not (site.state / "privacy").exists()
