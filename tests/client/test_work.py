"""What a site does with an order: train once, answer again from what it stored, measure, and let nothing else out."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict

from polyclinic import training, wire
from polyclinic.cohort import Cohort
from polyclinic.errors import CohortError, PolyclinicError, Refused, StorageError, StudyError
from polyclinic.model import initial_tensors
from polyclinic.wire import Malformed, Order, Tensors, digest
from polyclinic_client import work
from polyclinic_client.app import make_app
from polyclinic_client.site import Site
from polyclinic_client.work import answer
from polyclinic_simulations.engines.local import LocalGrid

from ..tiny import SIMCLR, in_memory, same_bits, tiny_study

STUDY = tiny_study(stages=[{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 1, "projection": 4}])
HEALTH = {"effective_rank", "feature_spread", "alignment", "uniformity"}
PROBES = {"knn_auc", "probe_auc", "probe_balanced_accuracy"} | HEALTH
"""What a site measures on every encoder; the rest of wire.EVALUATION is about a fine-tuned classifier."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site("north", in_memory(12), tmp_path / "north")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every training that takes place."""
    calls: list[dict[str, Any]] = []
    inner = work.train

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inner(*args, **kwargs)

    monkeypatch.setattr(work, "train", counting)
    return calls


def start(round: int = 1, shift: float = 0.0) -> tuple[Order, Tensors]:
    stage = STUDY.stage_of(round - 1)[0]
    tensors = {name: value + np.float32(shift) for name, value in initial_tensors(STUDY, stage, None).items()}
    return Order(STUDY.canonical(), stage, round, "north", digest(tensors), True, False), tensors


def apply(tensors: Tensors, update: Tensors | None) -> Tensors:
    assert update is not None
    return {name: value + update[name] for name, value in tensors.items()}


def test_trains_and_says_on_whom(site: Site, trainings: list[dict[str, Any]]) -> None:
    order, tensors = start()
    reply, update = answer(order, tensors, site)
    assert (reply.study, reply.stage, reply.round, reply.site) == (STUDY.hash, 0, 1, "north")
    training, testing = site.split(STUDY)
    assert reply.patients == training.n_patients == 12 - testing.n_patients
    assert set(reply.train) == {"loss", "images", "patients", "seconds"}
    assert reply.evaluation == {}
    assert update is not None
    assert update.keys() == tensors.keys()
    assert any(np.abs(value).max() > 0 for value in update.values())
    assert len(trainings) == 1


def test_a_round_that_is_asked_again_is_answered_without_training(site: Site, trainings: list[dict[str, Any]]) -> None:
    order, tensors = start()
    first, update = answer(order, tensors, site)
    again, repeated = answer(order, tensors, site)
    assert len(trainings) == 1
    assert again == first  # even the seconds are those of the training
    assert update is not None
    assert repeated is not None
    assert same_bits(update, repeated)


def test_from_other_tensors_it_is_trained_anew_from_the_moments_before(
    site: Site, trainings: list[dict[str, Any]]
) -> None:
    order, tensors = start()
    _, update = answer(order, tensors, site)
    second = replace(order, round=2, model=digest(apply(tensors, update)))
    _, repeated = answer(second, apply(tensors, update), site)
    other_order, other = start(2, shift=0.01)
    _, elsewhere = answer(other_order, other, site)
    assert len(trainings) == 3
    assert trainings[0]["optimizer_state"] is None
    before, anew = (call["optimizer_state"] for call in trainings[1:])
    assert before.keys() == anew.keys()
    assert all(torch.equal(before[name], anew[name]) for name in before)
    # And back again: the same bits as the first time, though other ones stand stored now.
    _, third = answer(second, apply(tensors, update), site)
    assert len(trainings) == 4
    assert repeated is not None
    assert elsewhere is not None
    assert third is not None
    assert same_bits(repeated, third)
    assert not same_bits(repeated, elsewhere)


@pytest.mark.parametrize("lost", ["update-0002", "moments-0002", "both"])
def test_a_damaged_state_is_trained_again_to_the_same_bits(
    lost: str, site: Site, trainings: list[dict[str, Any]]
) -> None:
    order, tensors = start()
    _, update = answer(order, tensors, site)
    tensors = apply(tensors, update)
    order = replace(order, round=2, model=digest(tensors))
    _, expected = answer(order, tensors, site)
    for path in site.state.rglob("*-0002.safetensors"):
        if lost in ("both", path.stem):
            path.write_bytes(path.read_bytes()[:100])
    _, again = answer(order, tensors, site)
    assert len(trainings) == 2 if lost == "moments-0002" else 3
    assert expected is not None
    assert again is not None
    assert same_bits(expected, again)


class Killed(BaseException):
    """Stands for kill -9."""


def test_a_round_killed_midway_goes_on_from_its_last_note(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIDWAY_S", -1.0)  # every step is noted
    study = tiny_study(stages=[{**SIMCLR, "local_epochs": 4}])
    tensors = initial_tensors(study, 0, None)
    order = Order(study.canonical(), 0, 1, "north", digest(tensors), True, False)
    _, expected = answer(order, tensors, replace(site, state=site.state.with_name("undisturbed")))

    def dying(done: int, steps: int) -> None:
        if done == 2:
            raise Killed

    steps: list[int] = []
    with pytest.raises(Killed):
        answer(order, tensors, site, dying)
    assert [path.name for path in site.state.rglob("*-0001*")] == ["midway-0001.safetensors"]
    _, update = answer(order, tensors, site, lambda done, of: steps.append(done))
    assert steps[0] == 3
    assert expected is not None
    assert update is not None
    assert same_bits(update, expected)
    assert not list(site.state.rglob("midway-*"))


def test_a_stage_starts_with_fresh_moments_and_its_own_learning_rate(
    site: Site, trainings: list[dict[str, Any]]
) -> None:
    for round in (1, 2, 3, 4):
        answer(*start(round), site)
    assert [call["optimizer_state"] is None for call in trainings] == [True, False, False, True]
    assert [call["stage_round"] for call in trainings] == [0, 1, 2, 0]
    assert len({call["seed"] for call in trainings}) == 4


def test_two_sites_and_two_studies_draw_differently(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    order, tensors = start()
    for name in ("north", "south"):
        answer(replace(order, site=name), tensors, Site(name, in_memory(12), tmp_path / name))
    other = tiny_study(study={"name": "tiny", "seed": 4}, stages=[{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 1}])
    tensors = initial_tensors(other, 0, None)
    order = replace(order, study=other.canonical(), model=digest(tensors))
    answer(order, tensors, Site("north", in_memory(12), tmp_path / "north"))
    assert len({call["seed"] for call in trainings}) == 3
    assert len(list((tmp_path / "north").iterdir())) == 2  # one folder a study


def test_evaluates_the_tensors_as_they_came(site: Site, trainings: list[dict[str, Any]]) -> None:
    order, tensors = start()
    only, update = answer(replace(order, train=False, evaluate=True), tensors, site)
    assert update is None
    assert trainings == []
    assert only.patients == 0
    assert only.train == {}
    assert set(only.evaluation) == PROBES
    both, _ = answer(replace(order, evaluate=True), tensors, site)
    assert both.evaluation == only.evaluation  # measured before training


@pytest.mark.parametrize(
    ("cohort", "missing"),
    [
        (in_memory(4, images=1), PROBES),  # too few images for the health figures, and for a probe
        (replace(in_memory(12), labels=np.full(24, "")), {"knn_auc", "probe_auc", "probe_balanced_accuracy"}),
        (replace(in_memory(12), labels=np.full(24, "clear")), {"knn_auc", "probe_auc", "probe_balanced_accuracy"}),
    ],
)
def test_what_cannot_be_measured_is_left_out(cohort: Cohort, missing: set[str], tmp_path: Path) -> None:
    order, tensors = start()
    reply, update = answer(replace(order, evaluate=True), tensors, Site("north", cohort, tmp_path))
    assert PROBES - set(reply.evaluation) == missing
    assert update is not None


def test_threads_are_the_studys_and_come_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import threadpoolctl

    seen: list[tuple[int, set[int]]] = []
    inner = work.health

    def looking(x: Any) -> dict[str, float]:
        blas = {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
        seen.append((torch.get_num_threads(), blas))
        return inner(x)

    monkeypatch.setattr(work, "health", looking)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        order, tensors = start()
        with threadpoolctl.threadpool_limits(2):
            answer(replace(order, train=False, evaluate=True), tensors, site)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, {1})]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"site": "south"}, Refused, "the order is for 'south' and this is 'north'"),
        ({"round": 0}, Refused, "round 0 of the study is not one of stage 0"),
        ({"round": 99}, Refused, "round 99 of the study is not one of stage 0"),
        ({"round": -1}, Refused, "round -1 of the study"),
        ({"stage": 1}, Refused, "round 1 of the study is not one of stage 1"),
        ({"stage": -1}, Refused, "is not one of stage -1"),
        ({"model": "0" * 64}, Refused, "the order's tensors are not those that it names"),
        ({"study": "{}"}, StudyError, "the study that came with the order"),
        ({"study": "[" * 100_000}, StudyError, "the study that came with the order"),
        ({"study": "x" * 10**6}, StudyError, "the study that came with the order"),
        ({"study": "null"}, StudyError, "the study that came with the order"),
    ],
)
def test_an_order_that_contradicts_itself_is_refused(
    change: dict[str, Any], error: type[PolyclinicError], said: str, site: Site, trainings: list[dict[str, Any]]
) -> None:
    order, tensors = start()
    with pytest.raises(error) as refused:
        answer(replace(order, **change), tensors, site)
    assert said in refused.value.problem
    assert trainings == []
    assert not site.state.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("head.0.bias"),
        lambda tensors: tensors.update(extra=np.zeros(2, np.float32)),
        lambda tensors: tensors.update({"head.0.bias": np.zeros(3, np.float32)}),
    ],
)
def test_tensors_that_are_not_the_stages_are_refused(change: Callable[[Tensors], Any], site: Site) -> None:
    order, tensors = start()
    change(tensors)
    with pytest.raises(Malformed):
        answer(replace(order, model=digest(tensors)), tensors, site)


def test_a_site_with_too_little_says_so(tmp_path: Path) -> None:
    order, tensors = start()
    with pytest.raises(CohortError):
        answer(order, tensors, Site("north", in_memory(1), tmp_path))


SECRETS = ("Jane", "Doe", "patient-", "/", "\\")


class Node:
    """A site's app behind a grid, and the last message it sent."""

    def __init__(self, find: Callable[[Context], Site]) -> None:
        self.grid = LocalGrid({"node": make_app(find)})

    def ask(self, content: RecordDict, kind: str) -> Message:
        (node,) = self.grid.get_node_ids()
        (reply,) = self.grid.send_and_receive([Message(content, node, kind)])
        return reply


def test_nothing_leaves_but_what_is_listed_here(site: Site) -> None:
    order, tensors = start()
    content = wire.pack_order(replace(order, evaluate=True), wire.pack_tensors(tensors))
    named = replace(site.cohort, sites=np.full(24, "Jane Doe"), folder=Path("/data/Jane Doe"))
    node = Node(lambda context: replace(site, cohort=named))
    reply = node.ask(content, MessageType.TRAIN)
    assert {name: type(record) for name, record in reply.content.items()} == {
        "reply": ConfigRecord, "train": MetricRecord, "evaluation": MetricRecord, "update": ArrayRecord,
    }  # fmt: skip
    assert dict(reply.content["reply"]) == {
        "study": STUDY.hash, "stage": 0, "round": 1, "site": "north", "patients": 8, "head": "",
    }  # fmt: skip
    assert set(reply.content["train"]) == set(wire.TRAINING) - {"epsilon"}
    assert set(reply.content["evaluation"]) == PROBES
    assert set(wire.unpack_tensors(reply.content["update"])) == set(tensors)
    who = node.ask(wire.pack_question(STUDY.hash), MessageType.QUERY)
    fields = {"site", "version", "approved", "clock"}
    assert {key: set(record) for key, record in who.content.items()} == {"presence": fields}
    for message in (reply, who):
        printed = str({key: list(record.items()) for key, record in message.content.items() if key != "update"})
        assert not any(secret in printed for secret in SECRETS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Jane Doe"), "RuntimeError"),
        (FileNotFoundError(2, "No such file", "/data/Jane Doe"), "FileNotFoundError"),
        (CohortError("/data/Jane Doe is gone", "look"), "..."),
        (CohortError("cannot read '/data/Jane Doe/1.dcm'", "look"), "cannot read '..."),
        (PolyclinicError("the training loss is no longer a number", "x"), "the training loss is no longer a number"),
        (MemoryError(), "MemoryError"),
        (StorageError("the disk is full: /data/Jane Doe", "make room"), "the disk is full: ..."),
    ],
)
def test_an_error_leaves_as_its_kind_or_our_own_words_without_paths(
    error: Exception, said: str, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(work, "train", failing)
    order, tensors = start()
    with caplog.at_level(logging.INFO):
        reply = Node(lambda context: site).ask(wire.pack_order(order, wire.pack_tensors(tensors)), MessageType.TRAIN)
    code = wire.SITE_LATER if isinstance(error, StorageError) else wire.SITE_ERROR
    assert (reply.error.code, reply.error.reason) == (code, said)
    assert said in caplog.text
    assert not any(secret in caplog.text for secret in ("Jane", "Doe"))


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_why_a_site_cannot_be_opened_stays_there(kind: str) -> None:
    def find(context: Context) -> Site:
        raise CohortError("there is no built cohort in Jane Doe", "build it")

    order, tensors = start()
    reply = Node(find).ask(wire.pack_order(order, wire.pack_tensors(tensors)), kind)
    assert reply.error.reason == "the site's cohort cannot be opened"


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_message_that_is_no_order_is_answered_with_an_error(kind: str, site: Site) -> None:
    for content in (RecordDict(), RecordDict({"order": ConfigRecord({"study": "{}"}), "tensors": ArrayRecord()})):
        reply = Node(lambda context: site).ask(content, kind)
        assert reply.has_error()


def test_the_deployed_app_opens_the_site_that_its_node_names(tmp_path: Path) -> None:
    from polyclinic.cohort import build_cohort
    from polyclinic_client.app import app
    from polyclinic_client.site import write_site

    from ..tiny import write_cohort

    cohort = build_cohort(write_cohort(tmp_path / "images", 4), STUDY.images, tmp_path / "state", workers=1)
    write_site(tmp_path / "site", "north", cohort.folder)
    message = Message(wire.pack_question(STUDY.hash), 2, MessageType.QUERY)
    context = Context(1, 2, {"site": str(tmp_path / "site")}, RecordDict(), {})
    assert app(message, context).content["presence"]["site"] == "north"


def test_stored_facts_are_json_and_hold_no_path(site: Site) -> None:
    answer(*start(), site)
    (path,) = site.state.rglob("update-*.safetensors")
    data = path.read_bytes()
    assert str(site.state).encode() not in data
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header["__metadata__"]) == {"model", "facts", "crc32"}


@pytest.mark.parametrize(
    ("method", "encoder"), [("micle", "vit_tiny"), ("simclr", "resnet50"), ("simclr", "bit_resnet50")]
)
def test_a_large_encoder_takes_a_step(method: str, encoder: str, tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "method": method, "rounds": 1}], encoder={"name": encoder})
    tensors = initial_tensors(study, 0, None)
    order = Order(study.canonical(), 0, 1, "north", digest(tensors), True, False)
    reply, update = answer(order, tensors, Site("north", in_memory(4), tmp_path))
    assert update is not None
    assert math.isfinite(reply.train["loss"])
    assert all(np.isfinite(value).all() for value in update.values())
    assert [name for name, value in update.items() if value.ndim > 1 and not value.any()] == []
