"""Orders and replies: what goes in comes out, and nothing else gets in or out."""

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from polyclinic import wire
from polyclinic.wire import EVALUATION, METRICS, TRAINING, Malformed, Order, Reply

TEXT = st.text(max_size=40)
NUMBER = st.integers(-(2**63), 2**63 - 1)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20),
    arrays(np.float32, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)),
    max_size=4,
)
ORDERS = st.builds(Order, TEXT, NUMBER, NUMBER, TEXT, TEXT, st.booleans(), st.booleans())


def numbers(allowed: dict[str, float]) -> st.SearchStrategy[dict[str, float]]:
    return st.dictionaries(st.sampled_from(sorted(allowed)), st.floats(0, 1))


REPLIES = st.builds(Reply, TEXT, NUMBER, NUMBER, TEXT, NUMBER, numbers(TRAINING), numbers(EVALUATION))


def over_the_network(content: RecordDict) -> RecordDict:
    """As Flower sends it: every record to bytes and back."""
    records = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            children = {array.object_id: array for array in record.values()}
            inflated = {}
            for key, array in children.items():
                chunks = dict(array.slice_array())
                inflated[key] = Array.inflate(array.deflate(), chunks)
            records[name] = ArrayRecord.inflate(record.deflate(), inflated)
        else:
            records[name] = type(record).inflate(record.deflate())
    return RecordDict(records)


def same(one: wire.Tensors, other: wire.Tensors) -> bool:
    return list(one) == list(other) and all(
        v.shape == other[n].shape and v.tobytes() == other[n].tobytes() for n, v in one.items()
    )


@given(ORDERS, TENSORS)
def test_orders_come_back(order: Order, tensors: wire.Tensors) -> None:
    found, values = wire.unpack_order(over_the_network(wire.pack_order(order, wire.pack_tensors(tensors))))
    assert found == order
    assert same(values, tensors)


@given(REPLIES, st.none() | TENSORS)
def test_replies_come_back(reply: Reply, update: wire.Tensors | None) -> None:
    found, values = wire.unpack_reply(over_the_network(wire.pack_reply(reply, update)))
    assert found == reply
    assert values is None if update is None else values is not None and same(values, update)


def test_tensors_are_read_in_place_and_other_layouts_are_packed_right() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    record = wire.pack_tensors({"turned": values.T, "every second": values[:, ::2]})
    back = wire.unpack_tensors(record)
    assert np.array_equal(back["turned"], values.T)
    assert np.array_equal(back["every second"], values[:, ::2])
    assert not back["turned"].flags.owndata
    assert not back["turned"].flags.writeable
    assert len(record) == 1  # however many there are: Flower's books are by the array


def test_the_digest_is_of_names_shapes_and_values_and_of_nothing_else() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    same_again = {"b": np.ones(4, np.float32)[::2], "a": np.zeros((2, 3), np.float32, order="F")}
    assert wire.digest(tensors) == wire.digest(same_again)
    others: list[wire.Tensors] = [
        {"a": np.zeros((3, 2), np.float32), "b": np.ones(2, np.float32)},
        {"a": np.zeros((2, 3), np.float32), "c": np.ones(2, np.float32)},
        {"a": np.zeros((2, 3), np.float32), "b": np.array([1, 1 + 2e-7], np.float32)},
        {"a": np.zeros((2, 3), np.float32), "b": np.array([-0.0, 1], np.float32)},
        {"a": np.zeros((2, 3), np.float32)},
        {},
    ]
    assert len({wire.digest(other) for other in [tensors, *others]}) == len(others) + 1


REPLY = Reply("hash", 0, 1, "north", 10, {"loss": 1.0}, {"probe_auc": 0.5})


def test_only_known_metrics_leave() -> None:
    assert TRAINING.keys() | EVALUATION.keys() == METRICS
    assert not TRAINING.keys() & EVALUATION.keys()
    for group, name in (("train", "patient_names"), ("evaluation", "age"), ("evaluation", "loss")):
        spoilt = Reply("hash", 0, 1, "north", 10, **{"train": {}, "evaluation": {}, group: {name: 1.0}})
        with pytest.raises(ValueError, match="may not leave a site"):
            wire.pack_reply(spoilt, None)


def content(**changes: Any) -> RecordDict:
    """A good reply with records replaced, or taken away (None)."""
    records = dict(wire.pack_reply(REPLY, {"a": np.zeros(2, np.float32)}))
    return RecordDict({k: v for k, v in {**records, **changes}.items() if v is not None})


def config(**changes: Any) -> ConfigRecord:
    """A good reply's own fields, changed, or taken away (None)."""
    fields = dict(wire.pack_reply(REPLY, None)["reply"]) | changes
    return ConfigRecord({k: v for k, v in fields.items() if v is not None})


@pytest.mark.parametrize(
    "hostile",
    [
        RecordDict(),
        content(reply=None),
        content(train=None),
        content(evaluation=None),
        content(reply=MetricRecord({"patients": 10})),
        content(reply=ArrayRecord()),
        content(update=ConfigRecord({"a": b"abcd"})),
        content(update=MetricRecord({"a": 1.0})),
        content(train=ConfigRecord({"loss": 1.0})),
        content(train=ArrayRecord()),
        content(note=ConfigRecord({"path": "/data/patients"})),
        content(bomb=ConfigRecord({"x": "y" * 10**6})),
        content(reply=config(round=None)),
        content(reply=config(extra=1)),
        content(reply=config(train=1)),
        content(reply=config(patients=True)),
        content(reply=config(patients=10.0)),
        content(reply=config(patients="10")),
        content(reply=config(patients=[10])),
        content(reply=config(patients=b"10")),
        content(reply=config(patients=2**63)),
        content(reply=config(round=-(2**63) - 1)),
        content(reply=config(round=10**5000)),
        content(reply=config(site=7)),
        content(reply=config(study=b"hash")),
        content(train=MetricRecord({"loss": float("nan")})),
        content(train=MetricRecord({"loss": float("inf")})),
        content(train=MetricRecord({"loss": -float("inf")})),
        content(train=MetricRecord({"loss": 1e300})),
        content(train=MetricRecord({"loss": 1})),
        content(train=MetricRecord({"loss": [1.0]})),
        content(train=MetricRecord({"patients": -1.0})),
        content(train=MetricRecord({"probe_auc": 0.5})),
        content(train=MetricRecord({f"m{k}": 1.0 for k in range(10_000)})),
        content(evaluation=MetricRecord({"loss": 1.0})),
        content(evaluation=MetricRecord({"seconds": 1.0})),
        content(evaluation=MetricRecord({"probe_auc": 1.5})),
        content(evaluation=MetricRecord({"feature_spread": -0.1})),
        content(evaluation=MetricRecord({"age": 50.0})),
    ],
)
def test_what_is_not_a_reply_is_malformed_in_few_words(hostile: RecordDict) -> None:
    with pytest.raises(Malformed) as malformed:
        wire.unpack_reply(hostile)
    assert len(str(malformed.value)) < 120


def test_a_good_reply_passes_where_the_hostile_ones_do_not() -> None:
    assert wire.unpack_reply(content())[0] == REPLY
    assert wire.unpack_reply(content(train=MetricRecord({"loss": -3.5})))[0].train == {"loss": -3.5}


def order(**changes: Any) -> RecordDict:
    good = wire.pack_order(Order("{}", 0, 1, "north", "m", True, False), wire.pack_tensors({}))
    return RecordDict({k: v for k, v in {**good, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    "hostile",
    [
        RecordDict(),
        order(tensors=None),
        order(order=None),
        order(order=ConfigRecord({"study": "{}"})),
        order(order=ConfigRecord(dict(order()["order"]) | {"train": 1})),
        order(order=ConfigRecord(dict(order()["order"]) | {"round": True})),
        order(tensors=ConfigRecord()),
        order(run=ConfigRecord({"code": "print()"})),
        order(tensors=ArrayRecord({"a": Array("float32", (2,), "raw-le", b"abc")})),
        order(tensors=ArrayRecord()),
    ],
)
def test_what_is_not_an_order_is_malformed(hostile: RecordDict) -> None:
    with pytest.raises(Malformed):
        wire.unpack_order(hostile)


def raw(header: Any, values: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of packed tensors, with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


GOOD = raw([["a", [2]], ["b", []]], bytes(12))


def record(data: bytes, form: str = "polyclinic-tensors-1", name: str = "tensors") -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(data),), form, data)})


def test_tensors_that_are_packed_by_hand_are_read() -> None:
    assert {name: value.shape for name, value in wire.unpack_tensors(record(GOOD)).items()} == {"a": (2,), "b": ()}


@pytest.mark.parametrize(
    "hostile",
    [
        record(GOOD, form="numpy.ndarray"),
        record(GOOD, name="update"),
        ArrayRecord({**record(GOOD), "more": Array("uint8", (0,), "polyclinic-tensors-1", b"")}),
        record(b""),
        record(b"1234567"),
        record(GOOD[:-1]),
        record(GOOD + b"x"),
        record(GOOD[:-12]),
        record(raw(b"[]", length=2**63)),
        record(raw(b"[]", length=3)),
        record(raw(b"[" * 10**5)),
        record(raw(b"not JSON")),
        record(raw(b"\xff\xfe")),
        record(raw({"a": [2]}, bytes(8))),
        record(raw([["a"]])),
        record(raw([["a", 2]], bytes(8))),
        record(raw([[1, [2]]], bytes(8))),
        record(raw([["a", [2.0]]], bytes(8))),
        record(raw([["a", [True]]], bytes(4))),
        record(raw([["a", ["2"]]], bytes(8))),
        record(raw([["a", [-1]]], bytes(4))),
        record(raw([["a", [-1, -1]]], bytes(4))),
        record(raw([["a", [0, 2**70]]])),
        record(raw([["a", [2**40, 2**40]]], bytes(8))),
        record(raw([["a", [1] * 65]], bytes(4))),
        record(raw([["a", [1] * 10**5]], bytes(4))),
        record(raw([["a", [10**4000]]], bytes(4))),
        record(raw([["a", [1]], ["a", [1]]], bytes(8))),
        record(raw([["x" * 10**5, [3]]], bytes(8))),
        record(raw([["a", [1]]] * 10**6, bytes(4))),
    ],
)
def test_tensors_that_contradict_themselves(hostile: ArrayRecord) -> None:
    with pytest.raises(Malformed) as malformed:
        wire.unpack_tensors(hostile)
    assert len(str(malformed.value)) < 200


@given(st.binary(max_size=64) | st.binary(max_size=40).map(raw))
def test_no_bytes_do_more_than_being_refused(data: bytes) -> None:
    try:
        wire.unpack_tensors(record(data))
    except Malformed as malformed:
        assert len(str(malformed)) < 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no batch has two patients", "no batch has two patients"),
        ("a cohort of 1 patient (test) leaves 3 > 2", "a cohort of 1 patient (test) leaves 3 > 2"),
        ("cannot open /data/Jane Doe/1.dcm", "cannot open ..."),
        ("cannot open '/data/Jane Doe/1.dcm': denied", "cannot open '..."),
        ("data/Jane Doe is gone", "..."),
        (r"C:\Users\Jane Doe", "..."),
        ("colour \x1b[31m and [red]style[bold]", "colour  (31m and (red)style(bold)"),
        ("[/yellow] ends a style", "..."),
        ("two\nlines\r\tand\x00more", "two lines  and more"),
        ("turned \u202eround", "turned  round"),
        ("Ärzte ≥ 3", "Ärzte ≥ 3"),
        ("x" * 10**6, "x" * 200),
        (None, "None"),
        ("", ""),
    ],
)
def test_a_text_from_elsewhere_is_made_plain(text: object, shown: str) -> None:
    assert wire.plain(text) == shown


@given(st.text())
def test_a_plain_text_is_short_printable_and_without_path_or_style(text: str) -> None:
    shown = wire.plain(text)
    assert len(shown) <= 200
    assert shown.isprintable()
    assert not set(shown) & set("/\\[]\n")
    assert wire.plain(shown) == shown
