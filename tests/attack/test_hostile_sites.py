"""Whatever one site sends, it is refused by name and reason, and the round is as if that site had been absent.

"west" is hostile. The yardstick is the run of "east" and "north" alone: same bits, same checkpoint files.
"""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from polyclinic import wire
from polyclinic.study import Study
from polyclinic_server import mail
from polyclinic_server.gate import RefusedUpdate
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import Node

from ..tiny import SITES, Mail, events, honest, open_run, same_bits, tiny_study

SEATS = dict.fromkeys(SITES, 10)
Disturb = Callable[[str, Message], list[Message]]


def undisturbed(site: str, reply: Message) -> list[Message]:
    return [reply]


def lead(
    folder: Path, disturb: Disturb = undisturbed, sites: tuple[str, ...] = SITES, **nodes: Node
) -> tuple[RunDir, wire.Tensors]:
    """Two rounds; `nodes` stand in for the honest ones."""
    study = tiny_study(aggregation={"round_deadline_s": 0.3 if disturb in WAITING else 20.0})
    run = open_run(folder, study)
    grid = Mail({name: nodes.get(name, honest(name)) for name in sites}, disturb)
    return run, run_study(grid, study, run, {name: SEATS[name] for name in sites})


def without_west(folder: Path, study: Study) -> tuple[RunDir, wire.Tensors]:
    run = open_run(folder, study)
    nodes = {name: honest(name) for name in ("east", "north")}
    return run, run_study(Mail(nodes, undisturbed), study, run, dict.fromkeys(nodes, 10))


def assert_as_if_absent(run: RunDir, tensors: wire.Tensors, folder: Path) -> None:
    other, expected = without_west(folder / "without", run.study)
    assert same_bits(tensors, expected)
    for path in sorted(other.checkpoints.iterdir()):
        assert (run.checkpoints / path.name).read_bytes() == path.read_bytes(), path.name


def is_update(reply: Message) -> bool:
    return reply.has_content() and "update" in reply.content


def west(spoil: Callable[[Message], Any]) -> Disturb:
    """Mail in which west's updates have gone through `spoil`, which changes the message, or gives others."""

    def disturb(site: str, reply: Message) -> list[Message]:
        if site != "west" or not is_update(reply):
            return [reply]
        changed = spoil(reply)
        return changed if isinstance(changed, list) else [reply]

    return disturb


def update(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Message], None]:
    """Every tensor of the update goes through `change`."""

    def spoil(reply: Message) -> None:
        tensors = wire.unpack_tensors(reply.content["update"])
        changed = {name: change(name, value).astype(np.float32) for name, value in tensors.items()}
        reply.content["update"] = wire.pack_tensors(changed)

    return spoil


def array(make: Callable[[Array], Array]) -> Callable[[Message], None]:
    """The array that all tensors of the update travel in goes through `make`."""
    return lambda reply: reply.content["update"].__setitem__("tensors", make(reply.content["update"]["tensors"]))


def names(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Message], None]:
    """The update's tensors by name go through `change`, in place."""

    def spoil(reply: Message) -> None:
        tensors = wire.unpack_tensors(reply.content["update"])
        change(tensors)
        reply.content["update"] = wire.pack_tensors(tensors)

    return spoil


def field(**changes: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content["reply"].update(changes)


def record(name: str, made: ArrayRecord | ConfigRecord | MetricRecord | None) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        del reply.content[name]
        if made is not None:
            reply.content[name] = made

    return spoil


def poison_one(name: str, value: float) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(at: str, tensor: np.ndarray) -> np.ndarray:
        spoilt = tensor.copy()
        if at == name:
            spoilt.flat[-1] = value
        return spoilt

    return change


BIAS = "encoder.out.bias"

ATTACKS: dict[str, tuple[Callable[[Message], Any], str]] = {
    "NaN": (update(poison_one(BIAS, np.nan)), f"its tensor {BIAS} holds values that are not finite"),
    "inf": (update(poison_one(BIAS, -np.inf)), f"its tensor {BIAS} holds values that are not finite"),
    "over range": (update(poison_one(BIAS, 1e30)), f"its tensor {BIAS} changes a weight by 1e+30, at most 128"),
    "huge norm": (update(lambda _, v: v + 90), "is above the limit"),
    "wrong shape": (update(lambda n, v: v.reshape(-1, 1) if n == BIAS else v), "is not of shape (8,)"),
    "wrong form": (
        array(lambda a: Array(a.dtype, a.shape, "numpy.ndarray", a.data)),
        "the tensors are not in the form of a message",
    ),
    "truncated": (array(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-1])), "is not there, or twice"),
    "longer": (array(lambda a: Array(a.dtype, a.shape, a.stype, a.data + b"x")), "1 bytes are of no tensor"),
    "without a header": (array(lambda a: Array(a.dtype, a.shape, a.stype, b"\xff" * 64)), "have no header"),
    "a header that lies": (
        array(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:8] + a.data[8:].replace(b"[8]", b"[9]", 1))),
        "is not there, or twice",
    ),
    "missing tensor": (names(lambda t: t.pop(BIAS)), "(1 missing, 0 unknown)"),
    "extra tensor": (names(lambda t: t.update(extra=t[BIAS])), "(0 missing, 1 unknown)"),
    "other study": (field(study="0" * 64), "it belongs to another study"),
    "other site's name": (field(site="east"), "it names another site as its sender"),
    "name of nobody": (field(site="x" * 10**5), "it names another site as its sender"),
    "other stage": (field(stage=1), "late or replayed"),
    "later round": (field(round=99), "it belongs to round 99"),
    "too many patients": (field(patients=11), "it claims 11 patients; the site may claim 1 to 10"),
    "a billion patients": (field(patients=10**9), "it claims 1000000000 patients"),
    "negative patients": (field(patients=-150), "it claims -150 patients"),
    "no patients": (field(patients=0), "it claims 0 patients"),
    "patients are true": (field(patients=True), "patients of the reply is of another type"),
    "patients are a float": (field(patients=10.0), "patients of the reply is of another type"),
    "unknown metric": (record("train", MetricRecord({"loss": 1.0, "age": 3.0})), "metrics that are not known"),
    "metric of the other kind": (record("evaluation", MetricRecord({"loss": 1.0})), "metrics that are not known"),
    "metric is NaN": (record("train", MetricRecord({"loss": float("nan")})), "loss is not a number that it can be"),
    "metric is inf": (record("evaluation", MetricRecord({"knn_auc": float("inf")})), "knn_auc is not a number"),
    "metric is huge": (record("train", MetricRecord({"loss": 1e308})), "loss is not a number that it can be"),
    "no loss": (record("train", MetricRecord({})), "it does not say the loss of its training"),
    "no metrics": (record("train", None), "the reply carries no metrics"),
    "no update": (record("update", None), "it carries no tensors"),
    "update is text": (record("update", ConfigRecord({"a": "b"})), "the message is not a reply"),
    "reply is numbers": (record("reply", MetricRecord({"patients": 10})), "the message is not a reply"),
    "nothing": (lambda r: [r.content.pop(k) for k in list(r.content)] and None, "the message is not a reply"),
    "bomb": (lambda r: r.content.__setitem__("x", ConfigRecord({"x": ["y"] * 10**5})), "more than a reply does"),
    "many names": (
        names(lambda t: t.update({f"t{k}": np.zeros((), np.float32) for k in range(10**4)})),
        "(0 missing, 10000 unknown)",
    ),
    "many arrays": (
        lambda r: r.content["update"].update({f"t{k}": Array("float32", (), "raw-le", b"abcd") for k in range(10**4)}),
        "the tensors are not in the form of a message",
    ),
    "an error": (
        lambda r: [Message(Error(1000, "\x1b[2J" + "gone [/yellow] /data/Jane Doe\n" * 10**4), reply_to=asked(r))],
        "the site failed: (2Jgone ...",
    ),
    "an error of nothing": (lambda r: [Message(Error(0, None), reply_to=asked(r))], "the site failed: None"),
}


def asked(reply: Message) -> Message:
    """A message with the identity of the one that `reply` answers."""
    original = Message(RecordDict(), reply.metadata.src_node_id, MessageType.TRAIN)
    original.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return original


@pytest.mark.parametrize("attack", ATTACKS)
def test_is_refused_by_name_and_reason_and_the_round_goes_on(attack: str, tmp_path: Path) -> None:
    spoil, reason = ATTACKS[attack]
    run, tensors = lead(tmp_path / "run", west(spoil))
    refused = events(run, "update_refused")
    assert [(line["round"], line["site"]) for line in refused] == [(1, "west"), (2, "west")]
    for line in refused:
        assert reason in line["reason"]
        assert len(line["reason"]) <= wire.LONGEST_TEXT
        assert line["reason"].isprintable()
    assert {line["site"] for line in events(run, "update_accepted")} == {"east", "north"}
    assert [line["accepted"] for line in events(run, "round_closed")] == [2, 2]
    assert_as_if_absent(run, tensors, tmp_path)
    text = (run.path / "events.jsonl").read_text() + (run.path / "metrics.csv").read_text()
    assert not any(word in text for word in ("NaN", "Infinity", "inf\n", "nan\n", "Doe", ",age,"))


def test_a_replayed_update_is_refused(tmp_path: Path) -> None:
    stored: list[RecordDict] = []

    def spoil(reply: Message) -> None:
        stored.append(copy.deepcopy(reply.content))
        reply.content = copy.deepcopy(stored[0])

    run, tensors = lead(tmp_path / "run", west(spoil))
    (refused,) = events(run, "update_refused")
    assert refused["reason"] == "it belongs to round 1 and this is round 2: late or replayed"
    assert refused["site"] == "west"
    assert len(events(run, "update_accepted")) == 5
    assert tensors


@pytest.mark.parametrize("code", [3, 4, 5, 8, wire.SITE_LATER])
def test_a_site_whose_node_went_away_is_asked_again_and_changes_nothing(code: int, tmp_path: Path) -> None:
    """Flower answers in the stead of a node that is gone; the site's own answer comes when it is back."""
    gone = {"questions": 1, "updates": 2}

    def disturb(site: str, reply: Message) -> list[Message]:
        kind = "updates" if is_update(reply) else "questions"
        if site == "west" and gone[kind]:
            gone[kind] -= 1
            return [Message(Error(code, "Node Unavailable"), reply_to=asked(reply))]
        return [reply]

    _, expected = lead(tmp_path / "plain")
    run, tensors = lead(tmp_path / "run", disturb)
    assert same_bits(tensors, expected)
    assert [event["site"] for event in events(run, "site_lost")] == ["west", "west"]
    assert events(run, "update_refused") == events(run, "site_missing") == []


def test_a_site_that_goes_away_for_ever_is_not_asked_for_ever(tmp_path: Path) -> None:
    def disturb(site: str, reply: Message) -> list[Message]:
        if site == "west" and is_update(reply):
            return [Message(Error(5, "Node Unavailable"), reply_to=asked(reply))]
        return [reply]

    run, tensors = lead(tmp_path / "run", disturb)
    assert len(events(run, "site_lost")) == 2 * mail.AGAIN
    assert {event["reason"] for event in events(run, "update_refused")} == {"the site failed: Node Unavailable"}
    assert_as_if_absent(run, tensors, tmp_path)


def silent(site: str, reply: Message) -> list[Message]:
    return [] if site == "west" and is_update(reply) else [reply]


HELD: list[Message] = []


def late(site: str, reply: Message) -> list[Message]:
    """West's updates arrive with the first reply of the round after."""
    if site == "west" and is_update(reply):
        HELD.append(reply)
        return []
    released = [HELD.pop()] if site == "east" and HELD else []
    return [*released, reply]


WAITING = (silent, late)


def test_a_site_that_never_answers_is_missing_after_the_deadline(tmp_path: Path) -> None:
    run, tensors = lead(tmp_path / "run", silent)
    assert [(line["round"], line["site"]) for line in events(run, "site_missing")] == [(1, "west"), (2, "west")]
    assert events(run, "update_refused") == []
    assert all(line["seconds"] >= 0.3 for line in events(run, "round_closed"))
    assert_as_if_absent(run, tensors, tmp_path)


def test_a_late_update_is_refused_by_name(tmp_path: Path) -> None:
    HELD.clear()
    run, tensors = lead(tmp_path / "run", late)
    assert [(line["round"], line["site"]) for line in events(run, "site_missing")] == [(1, "west"), (2, "west")]
    refused = events(run, "update_refused")
    assert [(line["round"], line["site"]) for line in refused] == [(2, "west"), (2, "west")]
    assert {line["reason"] for line in refused} == {"it answers nothing that was asked of it, or answers again"}
    assert_as_if_absent(run, tensors, tmp_path)


def test_a_second_reply_counts_for_nothing(tmp_path: Path) -> None:
    plain, expected = lead(tmp_path / "plain")
    run, tensors = lead(tmp_path / "run", west(lambda reply: [reply, copy.deepcopy(reply)]))
    assert same_bits(tensors, expected)
    refused = events(run, "update_refused")
    # The second round's comes when nothing is waited for any more, or within the round: both are west's.
    assert {line["site"] for line in refused} == {"west"}
    assert len(events(run, "update_accepted")) == len(events(plain, "update_accepted")) == 6


def test_a_reply_in_anothers_stead_is_refused_and_the_others_own_counts(tmp_path: Path) -> None:
    _, expected = lead(tmp_path / "plain")

    def disturb(site: str, reply: Message) -> list[Message]:
        if site != "east" or not is_update(reply):
            return [reply]
        forged = copy.deepcopy(reply)
        forged.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id + 2  # west
        asked_of_north = str(int(reply.metadata.reply_to_message_id) + 1)
        forged.metadata.__dict__["_reply_to_message_id"] = asked_of_north
        return [reply, forged]

    run, tensors = lead(tmp_path / "run", disturb)
    assert same_bits(tensors, expected)
    assert {(line["site"], line["reason"]) for line in events(run, "update_refused")} == {
        ("west", "it answers nothing that was asked of it, or answers again")
    }


def test_a_reply_from_nowhere_to_nothing_is_dropped(tmp_path: Path) -> None:
    _, expected = lead(tmp_path / "plain")

    def disturb(site: str, reply: Message) -> list[Message]:
        stray = copy.deepcopy(reply)
        stray.metadata.__dict__.update({"_src_node_id": 999, "_reply_to_message_id": "no such message"})
        return [stray, reply]

    run, tensors = lead(tmp_path / "run", disturb)
    assert same_bits(tensors, expected)
    assert {line["text"] for line in events(run, "warning")} == {"a reply to nothing that was asked was dropped"}


def raising(message: Message, context: Context) -> Message:
    if message.metadata.message_type == MessageType.QUERY:
        return honest("west")(message, context)
    raise RuntimeError("cannot read /data/Jane Doe/1.dcm")


@pytest.mark.parametrize("answer", [None, "text", 7])
def test_a_node_that_returns_no_message(answer: Any, tmp_path: Path) -> None:
    def node(message: Message, context: Context) -> Any:
        return honest("west")(message, context) if message.metadata.message_type == MessageType.QUERY else answer

    run, tensors = lead(tmp_path / "run", west=node)
    assert {line["reason"] for line in events(run, "update_refused")} == {"the site failed: TypeError"}
    assert_as_if_absent(run, tensors, tmp_path)


def test_a_site_that_raises(tmp_path: Path) -> None:
    run, tensors = lead(tmp_path / "run", west=raising)
    assert {(line["site"], line["reason"]) for line in events(run, "update_refused")} == {
        ("west", "the site failed: RuntimeError")
    }
    assert_as_if_absent(run, tensors, tmp_path)


def claiming(record: RecordDict) -> Node:
    """A node that says of itself what `record` holds."""
    return lambda message, context: Message(copy.deepcopy(record), reply_to=message)


def name(value: Any, **other: Any) -> RecordDict:
    return RecordDict(
        {"presence": ConfigRecord({"site": value, "version": "1", "approved": True, "clock": 0.0, **other})}
    )


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        (name("east"), "a node calls itself 'east', a site that is taken"),
        (name("nobody"), "a node calls itself 'nobody', a site that is not enrolled"),
        (name(""), "a node calls itself '', a site that is not enrolled"),
        (name("\x1b[31m[/red]" + "x" * 10**5), "a node calls itself '..."),
        (name(7), "a node does not say which site it is: site of the presence is of another type"),
        (name(["east"]), "a node does not say which site it is: site of the presence is of another type"),
        (RecordDict(), "a node does not say which site it is: it answers with something else"),
        (RecordDict({"presence": MetricRecord({"site": 1.0})}), "a node does not say which site it is: it answers w"),
        (name("west", clock=float("nan")), "a node does not say which site it is: its clock is out of range"),
        (name("west", clock=1), "a node does not say which site it is: clock of the presence is of another type"),
        (name("west", more=1), "a node does not say which site it is: the presence has other fields"),
    ],
)
def test_a_node_with_anothers_name_or_none_has_no_seat(said: RecordDict, warned: str, tmp_path: Path) -> None:
    study = tiny_study(aggregation={"round_deadline_s": 0.3})
    run = open_run(tmp_path / "run", study)
    nodes = {"east": honest("east"), "north": honest("north"), "intruder": claiming(said)}
    tensors = run_study(Mail(nodes, undisturbed), study, run, SEATS)
    (warning,) = {line["text"] for line in events(run, "warning")}
    assert warning.startswith(warned)
    assert warning.isprintable()
    assert [(line["round"], line["site"]) for line in events(run, "site_missing")] == [(0, "west")]
    assert_as_if_absent(run, tensors, tmp_path)


@pytest.mark.parametrize("often", [1, 100])
def test_a_node_that_raises_when_asked_who_it_is_is_asked_again(
    often: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "AGAIN_S", 0.01)
    study = tiny_study(aggregation={"round_deadline_s": 0.3})
    run = open_run(tmp_path / "run", study)
    raised = 0

    def node(message: Message, context: Context) -> Message:
        nonlocal raised
        raised += 1
        if raised > often:
            return honest("west")(message, context)
        raise OSError("/data/Jane Doe")

    tensors = run_study(
        Mail({"east": honest("east"), "west": node, "north": honest("north")}, undisturbed), study, run, SEATS
    )
    assert [line["text"] for line in events(run, "warning")] == ["a node does not say which site it is: OSError"]
    if often > 1:
        assert 2 <= raised < 20  # ever more seldom
        assert_as_if_absent(run, tensors, tmp_path)
    else:
        accepted = [line["round"] for line in events(run, "update_accepted") if line["site"] == "west"]
        assert accepted == [*range(1, study.rounds + 1)]


def test_the_last_measurement_takes_no_stale_or_foreign_reply(tmp_path: Path) -> None:
    def disturb(site: str, reply: Message) -> list[Message]:
        if site == "west" and reply.has_content() and "reply" in reply.content and not is_update(reply):
            reply.content["reply"]["round"] = 1
            reply.content["evaluation"] = MetricRecord({"effective_rank": 1e8})
        return [reply]

    run, _ = lead(tmp_path / "run", disturb)
    (refused,) = events(run, "update_refused")
    assert (refused["site"], refused["reason"]) == (
        "west",
        "it belongs to round 1 and this is round 2: late or replayed",
    )
    assert "100000000" not in (run.path / "metrics.csv").read_text()


VALUES = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.integers(0, 3), max_size=3)
)
METRIC = st.integers() | st.floats() | st.lists(st.floats(), max_size=2)
FIELDS = st.sampled_from(["study", "stage", "round", "site", "patients", "other"])
GOOD = {"study": "h", "stage": 0, "round": 1, "site": "west", "patients": 10}
TENSORS = wire.pack_tensors({"a": np.ones(2, np.float32), "b": np.ones((), np.float32)})["tensors"].data
ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "float64", "x"]),
    st.lists(st.sampled_from([0, 1, 2, -1, 2**70]), max_size=3).map(tuple),
    st.sampled_from(["polyclinic-tensors-1", "numpy.ndarray"]),
    st.binary(max_size=16) | st.sampled_from([TENSORS, TENSORS[:-1], TENSORS + b"x"]),
)
RECORDS = st.one_of(
    st.dictionaries(FIELDS, VALUES, max_size=3).map(lambda changes: ConfigRecord({**GOOD, **changes})),
    st.dictionaries(st.sampled_from([*wire.METRICS, "age"]), METRIC, max_size=3).map(MetricRecord),
    st.dictionaries(st.sampled_from(["tensors", "more"]), ARRAYS, max_size=2).map(ArrayRecord),
)
NAMES = st.sampled_from(["reply", "update", "train", "evaluation", "other"])


@given(st.dictionaries(NAMES, RECORDS, max_size=5))
def test_nothing_but_a_refusal_comes_of_any_content(records: dict[str, Any]) -> None:
    from polyclinic.rules import Aggregation
    from polyclinic_server.gate import Gate

    tensors = {"a": np.ones(2, np.float32), "b": np.ones((), np.float32)}
    gate = Gate(Aggregation(), {"west": 10})
    gate.open_round(tensors)
    order = wire.Order("{}", 0, 1, "west", "m", True, False)
    try:
        reply, packed = wire.unpack_reply(RecordDict(records))
        gate.check(order, "h", reply, packed, tensors)
    except (RefusedUpdate, wire.Malformed) as reason:
        assert len(str(reason)) < 300


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_a_reply_that_flower_cannot_read_costs_its_site_the_turn_and_nobody_else(kind: str, tmp_path: Path) -> None:
    """Flower checks little of what a node uploads, and raises where the coordinator asks for it."""

    class Torn(Mail):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                if reply.metadata.message_type == kind and reply.metadata.src_node_id == list(self.get_node_ids())[-1]:
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return replies

    study = tiny_study(aggregation={"round_deadline_s": 0.3})
    run = open_run(tmp_path / "run", study)
    tensors = run_study(Torn({site: honest(site) for site in SITES}, undisturbed), study, run, SEATS)
    said = events(run, "warning" if kind == MessageType.QUERY else "update_refused")
    assert all("it answers with something that cannot be read" in str(line) for line in said)
    assert len(said) >= (study.rounds if kind == MessageType.TRAIN else 1)
    assert_as_if_absent(run, tensors, tmp_path)
