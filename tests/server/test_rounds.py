"""The round loop: order of arrival, quorum, stages, metrics, and going on after any stop."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType

from polyclinic import wire
from polyclinic.errors import Collapsed, QuorumLost, StudyError
from polyclinic.model import initial_tensors
from polyclinic.study import Study
from polyclinic_server import mail
from polyclinic_server.aggregation.fedavg import weight_of
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid, Node

from ..tiny import SIMCLR, SITES, Mail, events, honest, measured, open_run, real, same_bits, tiny_study

SEATS = dict(zip(SITES, (10, 20, 40), strict=True))


def nodes() -> dict[str, Node]:
    return {name: honest(name, patients) for name, patients in SEATS.items()}


class Shuffled(LocalGrid):
    """The replies of a round in random order."""

    def __init__(self, apps: dict[str, Node], seed: int) -> None:
        super().__init__(apps)
        self._random = random.Random(seed)
        self.orders: list[tuple[int, ...]] = []
        self._asked: list[str] = []
        self._arrived: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        self._asked += ids
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self._asked:
            while one := list(super().pull_messages(self._asked)):
                self._arrived += one
            self._asked = []
            self._random.shuffle(self._arrived)
            self.orders.append(tuple(message.metadata.src_node_id for message in self._arrived))
        due = self._arrived and self._arrived[-1].metadata.reply_to_message_id in set(message_ids)
        return [self._arrived.pop()] if due else []


@pytest.mark.parametrize("weighting", ["patients", "equal", "tempered"])
def test_the_order_of_arrival_changes_no_bit(weighting: str, tmp_path: Path) -> None:
    study = tiny_study(aggregation={"weighting": weighting})
    run = open_run(tmp_path / "in order", study)
    expected = run_study(LocalGrid(nodes()), study, run, SEATS)
    seen = set()
    for seed in range(6):
        grid = Shuffled(nodes(), seed)
        other = open_run(tmp_path / str(seed), study)
        assert same_bits(run_study(grid, study, other, SEATS), expected)
        assert measured(other) == measured(run)
        for path in sorted(run.checkpoints.iterdir()):
            assert (other.checkpoints / path.name).read_bytes() == path.read_bytes()
        seen.update(grid.orders)
    assert len(seen) > 3


def test_the_order_of_arrival_changes_no_bit_where_sites_really_train(tmp_path: Path) -> None:
    study = tiny_study()
    results = []
    for seed in range(2):
        apps = {name: real(name, tmp_path / f"sites-{seed}") for name in SITES}
        run = open_run(tmp_path / f"run-{seed}", study)
        results.append(run_study(Shuffled(apps, seed), study, run, dict.fromkeys(SITES, 10)))
    assert same_bits(*results)
    assert not same_bits(results[0], initial_tensors(study, 0, None))


@pytest.mark.parametrize("weighting", ["patients", "equal", "tempered"])
def test_a_round_is_the_weighted_mean_of_what_the_sites_sent(weighting: str, tmp_path: Path) -> None:
    study = tiny_study(aggregation={"weighting": weighting}, stages=[{**SIMCLR, "rounds": 1}])
    sent: dict[str, wire.Tensors] = {}

    def note(site: str, reply: Message) -> list[Message]:
        if "update" in reply.content:
            sent[site] = {name: value.copy() for name, value in wire.unpack_tensors(reply.content["update"]).items()}
        return [reply]

    new = run_study(Mail(nodes(), note), study, open_run(tmp_path, study), SEATS)
    weights = {site: weight_of(patients, weighting) for site, patients in SEATS.items()}
    for name, value in initial_tensors(study, 0, None).items():
        mean = sum(sent[s][name].astype(np.float64) * w for s, w in weights.items()) / sum(weights.values())
        np.testing.assert_allclose(new[name], value + mean, rtol=1e-6, atol=1e-8)


def test_metrics_and_events_tell_what_happened(tmp_path: Path) -> None:
    study = tiny_study(stages=[SIMCLR, {**SIMCLR, "rounds": 1, "projection": 4}])
    run = open_run(tmp_path, study)
    tensors = run_study(LocalGrid(nodes()), study, run, dict.fromkeys(SITES, 65_536))  # at most so many patients each
    assert [line["event"] for line in events(run)][:8] == [
        "run_started", *["site_found"] * 3, "round_started", "update_accepted", "update_accepted", "update_accepted",
    ]  # fmt: skip
    assert [(line["round"], line["stage"]) for line in events(run, "round_started")] == [(1, 0), (2, 0), (3, 1)]
    rows = measured(run)
    assert len({row[:4] for row in rows}) == len(rows)
    losses = {(stage, round, site) for stage, round, site, metric, _ in rows if metric == "loss"}
    assert losses == {(s, r, site) for s, r in (("0", "1"), ("0", "2"), ("1", "3")) for site in ("", *SITES)}
    ranks = {(stage, round, site) for stage, round, site, metric, _ in rows if metric == "effective_rank"}
    assert ranks == {(s, r, site) for s, r in [("0", "0"), ("0", "1"), ("0", "2"), ("1", "3")] for site in ("", *SITES)}
    for round, metric in (("2", "loss"), ("1", "effective_rank"), ("3", "effective_rank")):
        by_site = {row[2]: float(row[4]) for row in rows if row[1] == round and row[3] == metric}
        assert by_site[""] == pytest.approx(sum(by_site[s] * SEATS[s] for s in SITES) / sum(SEATS.values()))
    size = sum(value.nbytes for value in tensors.values())
    assert {row[4] for row in rows if row[1] == "3" and row[3] in ("bytes_up", "bytes_down")} == {repr(float(size))}


@pytest.mark.parametrize(("every", "rounds"), [(0, {"4"}), (1, {"0", "1", "2", "3", "4"}), (3, {"0", "3", "4"})])
def test_evaluation_rides_with_training_as_often_as_asked(every: int, rounds: set[str], tmp_path: Path) -> None:
    study = tiny_study(evaluation={"every": every}, stages=[{**SIMCLR, "rounds": 4}])
    run = open_run(tmp_path, study)
    run_study(LocalGrid(nodes()), study, run, SEATS)
    assert {row[1] for row in measured(run) if row[3] == "effective_rank"} == rounds


def test_a_round_sends_one_message_a_site(tmp_path: Path) -> None:
    study = tiny_study()
    grid = LocalGrid(nodes())
    run_study(grid, study, open_run(tmp_path, study), SEATS)
    pushed = int(next(iter(grid.push_messages([Message(wire.RecordDict(), 2, "query")])))) - 1
    assert pushed == len(SITES) * (1 + study.rounds + 1)  # who are you, the rounds, the last measurement


def failing_from(round: int, inner: Node) -> Node:
    def node(message: Message, context: Any) -> Message:
        if message.metadata.message_type == "train" and int(message.metadata.group_id) >= round:
            raise RuntimeError("no")
        return inner(message, context)

    return node


def test_below_quorum_the_run_ends_and_goes_on_when_the_sites_are_back(tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 3}])
    whole = open_run(tmp_path / "whole", study)
    expected = run_study(LocalGrid(nodes()), study, whole, SEATS)
    run = open_run(tmp_path / "run", study)
    broken = {**nodes(), **{name: failing_from(3, nodes()[name]) for name in ("north", "west")}}
    with pytest.raises(QuorumLost, match="only 1 of at least 2 sites sent an update that passed in round 3") as lost:
        run_study(LocalGrid(broken), study, run, SEATS)
    assert lost.value.exit_code == 1
    assert sorted(path.stem for path in run.checkpoints.glob("*.json")) == ["round-0000", "round-0001", "round-0002"]
    assert same_bits(run_study(LocalGrid(nodes()), study, run, SEATS), expected)
    assert [line["round"] for line in events(run, "run_resumed")] == [2]
    assert [line["round"] for line in events(run, "round_started")] == [1, 2, 3, 3]
    assert measured(run) == measured(whole)


def test_too_few_sites_found(tmp_path: Path) -> None:
    study = tiny_study(aggregation={"round_deadline_s": 0.1})
    run = open_run(tmp_path, study)
    with pytest.raises(QuorumLost, match="only 1 of at least 2 sites were found"):
        run_study(LocalGrid({"east": honest("east")}), study, run, SEATS)
    assert [line["site"] for line in events(run, "site_missing")] == ["north", "west"]


class Growing(LocalGrid):
    """Nodes that come one by one."""

    seen = 0

    def get_node_ids(self) -> Iterable[int]:
        self.seen += 1
        return list(super().get_node_ids())[: self.seen]


def test_nodes_that_come_later_are_waited_for(tmp_path: Path) -> None:
    study = tiny_study()
    run = open_run(tmp_path, study)
    run_study(Growing(nodes()), study, run, SEATS)
    assert {line["site"] for line in events(run, "update_accepted")} == set(SITES)


class Away(LocalGrid):
    """The last node is away from the time that a round's orders are sent until those of another are."""

    def __init__(self, apps: dict[str, Node], since: int, until: int) -> None:
        super().__init__(apps)
        self.round, self._since, self._until = 0, since, until

    @property
    def _away(self) -> bool:
        return self._since <= self.round < self._until

    def get_node_ids(self) -> Iterable[int]:
        here = list(super().get_node_ids())
        return here[:-1] if self._away else here

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.round = max([self.round, *(int(message.metadata.group_id or 0) for message in sent)])
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        last = list(super().get_node_ids())[-1]
        return [m for m in super().pull_messages(message_ids) if not (self._away and m.metadata.src_node_id == last)]


@pytest.mark.parametrize(
    ("since", "until", "without", "missed"),
    [
        (0, 2, {1, 2}, 0),  # late: found when a look for nodes follows the orders of round 2
        (2, 4, {2, 3, 4}, 2),  # gone: in no round after the one that it has missed, until it is back
    ],
)
def test_a_site_that_is_late_or_gone_holds_up_one_wait_and_joins_a_later_round(
    since: int, until: int, without: set[int], missed: int, tmp_path: Path
) -> None:
    study = tiny_study(aggregation={"round_deadline_s": 0.2}, stages=[{**SIMCLR, "rounds": 6}])
    run = open_run(tmp_path / "run", study)
    tensors = run_study(Away(nodes(), since, until), study, run, SEATS)
    assert {line["round"] for line in events(run, "update_accepted") if line["site"] == "west"} == {
        *range(1, 7)
    } - without
    assert [(line["round"], line["site"]) for line in events(run, "site_missing")] == [(missed, "west")]
    assert [line["site"] for line in events(run, "site_found")].count("west") == (2 if missed else 1)

    def failing(message: Message, context: Any) -> Message:
        if message.metadata.message_type == "train" and int(message.metadata.group_id) in without:
            raise RuntimeError("no")
        return nodes()["west"](message, context)

    refused = run_study(LocalGrid({**nodes(), "west": failing}), study, open_run(tmp_path / "other", study), SEATS)
    assert same_bits(tensors, refused)


def test_who_had_no_update_accepted_has_no_say_in_the_last_mean(tmp_path: Path) -> None:
    def failing(message: Message, context: Any) -> Message:
        if message.metadata.message_type == "train":
            raise RuntimeError("no")
        return nodes()["west"](message, context)

    run = open_run(tmp_path, study := tiny_study())
    run_study(LocalGrid({**nodes(), "west": failing}), study, run, SEATS)
    last = {
        row[2]: float(row[4]) for row in measured(run) if row[1] == str(study.rounds) and row[3] == "effective_rank"
    }
    assert set(last) == {"", *SITES}
    trained = [site for site in SITES if site != "west"]
    mean = sum(last[site] * SEATS[site] for site in trained) / sum(SEATS[site] for site in trained)
    assert last[""] == pytest.approx(mean)


class Coming(LocalGrid):
    """The last node is there once the second has trained and answers at the second look; the first takes four looks."""

    def __init__(self, apps: dict[str, Node]) -> None:
        super().__init__(apps)
        self._looks, self._trained = Counter[str](), False
        self._slow: dict[str, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        here = list(super().get_node_ids())
        return here if self._trained else here[:-1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        first, *_, last = super().get_node_ids()
        for number, message in zip(ids, sent, strict=True):
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            self._slow[number] = 4 if (kind, node) == ("train", first) else 2 if (kind, node) == ("query", last) else 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (number,) = message_ids
        self._looks[number] += 1
        if self._looks[number] < self._slow[number]:
            return []
        found = list(super().pull_messages([number]))
        self._trained |= any(message.metadata.message_type == "train" for message in found)
        return found


def test_a_site_that_comes_during_a_round_is_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "AGAIN_S", 0.0)
    monkeypatch.setattr(mail, "POLL_S", 0.01)
    study = tiny_study(aggregation={"round_deadline_s": 1.0}, stages=[{**SIMCLR, "rounds": 3}])
    run = open_run(tmp_path, study)
    run_study(Coming(nodes()), study, run, SEATS)
    assert [line["round"] for line in events(run, "update_accepted") if line["site"] == "west"] == [2, 3]


@pytest.mark.parametrize(
    ("weighting", "seats", "fits"),
    [
        ("patients", {f"s{k}": 65_536 for k in range(4095)}, True),
        ("patients", {f"s{k}": 65_536 for k in range(4096)}, False),
        ("patients", {f"s{k}": 10**9 for k in range(4095)}, True),  # max_patients binds each
        ("tempered", {f"s{k}": 65_536 for k in range(1024)}, False),
        ("equal", {f"s{k}": 65_536 for k in range(100_000)}, True),
    ],
)
def test_sites_whose_sum_could_overflow_are_refused_before_anything_runs(
    weighting: str, seats: dict[str, int], fits: bool, tmp_path: Path
) -> None:
    study = tiny_study(aggregation={"weighting": weighting, "round_deadline_s": 0.01})
    with pytest.raises(QuorumLost if fits else StudyError):
        run_study(LocalGrid({}), study, open_run(tmp_path, study), seats)
    assert (tmp_path / "checkpoints").exists() == fits


class Stop(BaseException):
    """Stands for Ctrl-C."""


def stopping_at(folder: Path, study: Study, number: int) -> RunDir:
    """A run that stops as its event `number` has been written."""
    seen = 0

    def listen(line: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Stop

    run = RunDir(folder, listen)
    run.create(study)
    return run


def test_stopped_at_any_event_and_resumed_is_as_undisturbed(tmp_path: Path) -> None:
    study = tiny_study(stages=[SIMCLR, {**SIMCLR, "rounds": 1, "projection": 4}])
    whole = open_run(tmp_path / "whole", study)
    expected = run_study(LocalGrid(nodes()), study, whole, SEATS)
    count = len(events(whole))
    assert count == 1 + 3 + 3 * 5 + 3
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        with pytest.raises(Stop):
            run_study(LocalGrid(nodes()), study, stopping_at(folder, study, number), SEATS)
        run = RunDir(folder)
        assert same_bits(run_study(LocalGrid(nodes()), study, run, SEATS), expected)
        assert measured(run) == measured(whole)
        for path in sorted(whole.checkpoints.iterdir()):
            assert (run.checkpoints / path.name).read_bytes() == path.read_bytes()


def test_a_finished_run_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    study = tiny_study()
    run = open_run(tmp_path, study)
    expected = run_study(LocalGrid(nodes()), study, run, SEATS)
    before = measured(run)
    assert same_bits(run_study(LocalGrid(nodes()), study, RunDir(tmp_path), SEATS), expected)
    assert measured(run) == before
    assert len(events(run, "round_started")) == study.rounds


def test_what_has_arrived_is_taken_though_taking_the_one_before_was_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(mail.time, "monotonic", lambda: clock[0])

    def slow(inner: Node) -> Node:
        def node(message: Message, context: Any) -> Message:
            clock[0] += 1000.0  # sites in one process work one after another
            return inner(message, context)

        return node

    study = tiny_study(aggregation={"round_deadline_s": 1500.0})
    run = open_run(tmp_path, study)
    run_study(LocalGrid({name: slow(node) for name, node in nodes().items()}), study, run, SEATS)
    assert events(run, "site_missing") == []
    assert [line["accepted"] for line in events(run, "round_closed")] == [3, 3]


def test_messages_expire_some_time_after_the_deadline(tmp_path: Path) -> None:
    lives: list[float] = []

    def noting(inner: Node) -> Node:
        def node(message: Message, context: Any) -> Message:
            lives.append(message.metadata.ttl)
            return inner(message, context)

        return node

    study = tiny_study()
    grid = LocalGrid({name: noting(node) for name, node in nodes().items()})
    run_study(grid, study, open_run(tmp_path, study), SEATS)
    assert set(lives) == {study.aggregation.round_deadline_s + mail.GRACE_S}


@pytest.mark.parametrize(
    "stages",
    [
        [SIMCLR, {**SIMCLR, "rounds": 1, "projection": 4}],
        [{"kind": "finetune", "rounds": 3, "probe_rounds": 2, "batch_size": 8}],
    ],
    ids=["another stage", "an encoder that is unfrozen"],
)
def test_norms_are_compared_within_a_stage_and_until_the_encoder_is_unfrozen_only(
    stages: list[dict[str, Any]], tmp_path: Path
) -> None:
    def node(message: Message, context: Any) -> Message:
        """Hardly moves in the first two rounds, and far more in the third."""
        later = message.metadata.message_type == "train" and message.metadata.group_id == "3"
        return honest(str(context.node_config["site"]), scale=0.05 if later else 1e-4)(message, context)

    study = tiny_study(stages=stages, evaluation=CLASSES)
    run = open_run(tmp_path, study)
    run_study(LocalGrid(dict.fromkeys(SITES, node)), study, run, dict.fromkeys(SITES, 10))
    norms = {line["round"]: line["norm"] for line in events(run, "update_accepted")}
    assert norms[3] > study.aggregation.norm_limit * norms[2]
    stored = [json.loads(path.read_text())["norms"] for path in sorted(run.checkpoints.glob("*.json"))]
    assert [len(norms) for norms in stored] == [3, 6, 3]


def test_replies_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    """A grid that serves hospitals hands out every reply that is there: all updates at once, were all asked for."""
    asked: list[int] = []

    class Counting(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ids = list(message_ids)
            asked.append(len(ids))
            return super().pull_messages(ids)

    study = tiny_study()
    run_study(Counting(nodes()), study, open_run(tmp_path, study), SEATS)
    orders = len(SITES) * (study.rounds + 1)  # of every round, and of the last measurement
    assert asked[-orders:] == [1] * orders


FINETUNE = {"kind": "finetune", "rounds": 8, "batch_size": 8, "patience": 2}
CLASSES = {"labels": {"clear": ["clear"], "spot": ["spot"]}}
LOSSES = {2: 0.5, 3: 0.4, 4: 0.6, 5: 0.45, 6: 0.1, 7: 0.1, 8: 0.1}
"""Of the tensors that rounds 1 to 7 made, as they are measured a round later."""


@pytest.mark.parametrize("killed", [False, True])
def test_fine_tuning_stops_early_with_its_best_tensors_and_the_next_stage_goes_on(killed: bool, tmp_path: Path) -> None:
    study = tiny_study(stages=[FINETUNE, {**SIMCLR, "rounds": 1}], evaluation=CLASSES)
    came: dict[int, wire.Tensors] = {}

    def noting(name: str) -> Node:
        node = honest(name, validation=LOSSES)

        def note(message: Message, context: Context) -> Message:
            if message.metadata.message_type != MessageType.QUERY:
                order, tensors = wire.unpack_order(message.content)
                if order.train:
                    came[order.round] = {n: v.copy() for n, v in tensors.items()}
                if killed and order.round == 5 and not (tmp_path / "was here").exists():
                    (tmp_path / "was here").touch()
                    raise KeyboardInterrupt
            return node(message, context)

        return note

    run = open_run(tmp_path / "run", study)
    grid = LocalGrid({name: noting(name) for name in SITES})
    if killed:
        with pytest.raises(KeyboardInterrupt):
            run_study(grid, study, run, SEATS)
        run = RunDir(tmp_path / "run")
    run_study(grid, study, run, SEATS)
    assert [line["round"] for line in events(run, "stopped_early")] == [5]
    assert [line["round"] for line in events(run, "round_closed")] == [1, 2, 3, 4, 5, 9]
    encoder = {name: value for name, value in came[9].items() if name.startswith("encoder.")}
    assert encoder
    assert same_bits(encoder, {name: came[3][name] for name in encoder})  # round 2 made what came in round 3


def test_the_encoder_is_frozen_in_the_probe_rounds_and_learns_after_them(tmp_path: Path) -> None:
    study = tiny_study(stages=[{**FINETUNE, "rounds": 4, "patience": 0, "probe_rounds": 2}], evaluation=CLASSES)
    run, made = open_run(tmp_path / "run", study), [initial_tensors(study, 0, None)]

    def noting(name: str) -> Node:
        node = real(name, tmp_path)

        def note(message: Message, context: Context) -> Message:
            if message.metadata.message_type == MessageType.TRAIN and name == SITES[0]:
                order, tensors = wire.unpack_order(message.content)
                made[order.round - 1 :] = [{n: v.copy() for n, v in tensors.items()}]
            return node(message, context)

        return note

    made.append(run_study(LocalGrid({n: noting(n) for n in SITES}), study, run, dict.fromkeys(SITES, 10)))
    for number, (before, after) in enumerate(pairwise(made)):
        moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
        assert moved == (set(before) if number >= 2 else {"head.weight", "head.bias"})


FALLING = {number: 1 / number for number in range(1, 9)}


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("lie", [dict.fromkeys(range(1, 9), 0.0), {2: 0.0, 3: 0.0, 4: 1e9, 5: 1e9}, {3: 0.0}])
def test_one_site_cannot_end_the_fine_tuning_of_all(lie: dict[int, float], patience: int, tmp_path: Path) -> None:
    study = tiny_study(stages=[{**FINETUNE, "patience": patience}], evaluation=CLASSES)
    apps = {name: honest(name, validation=lie if name == "west" else FALLING) for name in SITES}
    run = open_run(tmp_path, study)
    run_study(LocalGrid(apps), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == list(range(1, 9))


def test_a_site_that_misses_a_round_changes_nothing_about_the_best(tmp_path: Path) -> None:
    study = tiny_study(stages=[FINETUNE], evaluation=CLASSES, aggregation={"round_deadline_s": 1.0})
    hard = {number: 10 + loss for number, loss in FALLING.items()}
    apps = {name: honest(name, validation=hard if name == "west" else FALLING) for name in SITES}

    def disturb(site: str, reply: Message) -> list[Message]:
        missed = site == "west" and "reply" in reply.content and reply.content["reply"]["round"] == 3
        return [] if missed else [reply]

    run = open_run(tmp_path, study)
    run_study(Mail(apps, disturb), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == list(range(1, 9))
    assert not events(run, "stopped_early")


def test_fine_tuning_without_validation_patients_runs_to_its_end(tmp_path: Path) -> None:
    study = tiny_study(stages=[FINETUNE], evaluation=CLASSES)
    run = open_run(tmp_path, study)
    run_study(LocalGrid(nodes()), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == list(range(1, 9))


@pytest.mark.parametrize(("collapsed", "stops"), [(1, False), (2, True), (3, True)])
def test_a_collapse_at_most_sites_ends_the_stage(collapsed: int, stops: bool, tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 8}])
    run = open_run(tmp_path, study)
    apps = {name: honest(name, spread=0.001 if k < collapsed else 0.5) for k, name in enumerate(SITES)}
    if not stops:
        run_study(LocalGrid(apps), study, run, SEATS)
        return
    with pytest.raises(Collapsed, match=rf"at {collapsed} of 3 sites .* after round 2"):
        run_study(LocalGrid(apps), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == [1, 2]  # the first quarter may recover


def test_sites_whose_updates_were_refused_have_no_say_in_a_collapse(tmp_path: Path) -> None:
    study = tiny_study(stages=[{**SIMCLR, "rounds": 1}], aggregation={"min_sites": 1}, evaluation={"every": 0})
    run = open_run(tmp_path, study)
    apps = {name: honest(name, spread=0.001 if k else 0.5, scale=np.nan if k else 1e-3) for k, name in enumerate(SITES)}
    run_study(LocalGrid(apps), study, run, SEATS)
    assert [line["site"] for line in events(run, "update_accepted")] == [SITES[0]]
    assert len(events(run, "site_measured")) == len(SITES)


@pytest.mark.parametrize(
    ("stages", "every", "found", "closed"),
    [
        ([{**SIMCLR, "rounds": 2}], 0, 2, [1, 2]),  # measured once, at the end
        ([{**SIMCLR, "rounds": 2}], 2, 2, [1, 2]),
        ([{**SIMCLR, "rounds": 1}, {**SIMCLR, "rounds": 4}], 1, 1, [1]),  # the next stage does not go on from it
        ([{**SIMCLR, "rounds": 1}, {**FINETUNE, "rounds": 4, "patience": 0}], 1, 1, [1]),
        ([{**SIMCLR, "rounds": 3}, {**FINETUNE, "rounds": 4, "patience": 0}], 0, 3, [1, 2, 3]),
        ([{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 4}], 2, 2, [1, 2]),
        ([{**SIMCLR, "rounds": 3}, {**SIMCLR, "rounds": 4}], 4, 3, [1, 2, 3]),
    ],
)
def test_the_last_round_of_a_stage_is_judged_too(
    stages: list[dict[str, Any]], every: int, found: int, closed: list[int], tmp_path: Path
) -> None:
    study = tiny_study(stages=stages, evaluation={**CLASSES, "every": every})
    run = open_run(tmp_path, study)
    apps = {name: honest(name, spread=0.001) for name in SITES}
    with pytest.raises(Collapsed, match=rf"after round {found}\n"):
        run_study(LocalGrid(apps), study, run, SEATS)
    assert [line["round"] for line in events(run, "round_closed")] == closed
