"""Orders and updates, and their form as Flower records: the only place in the library that imports flwr.

Tensors travel as raw little-endian float32, read in place on arrival: nothing is unpickled, nothing is parsed but a
name, a shape and a length. Whatever comes from a network is checked here for form; whether an update is
acceptable is the gate's decision.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
"""Named float32 tensors in the order in which they are sent."""
Packed = ArrayRecord
"""The same as a record of a message, as `pack_tensors` makes it; `unpack_tensors` reads them in place."""

LARGEST = 1e9
"""Magnitude of a metric: above any real one, and far from where sums stop being finite."""
TRAINING = {"loss": LARGEST, "images": LARGEST, "patients": LARGEST, "seconds": LARGEST, "epsilon": LARGEST}
"""Numbers that may leave a site about its training, each with its largest magnitude; only the loss may be negative."""
EVALUATION = {
    "knn_auc": 1.0,
    "probe_auc": 1.0,
    "probe_balanced_accuracy": 1.0,
    "effective_rank": LARGEST,
    "feature_spread": LARGEST,
    "alignment": 4.1,
    "uniformity": 8.0,
    "classifier_auc": 1.0,
    "classifier_balanced_accuracy": 1.0,
    "classifier_ece": 1.0,
    "validation_loss": LARGEST,
}
"""Numbers that may leave a site about the tensors that came, likewise."""
METRICS = frozenset(TRAINING) | frozenset(EVALUATION)
"""Every number that may leave a site beside its update."""

LONGEST_TEXT = 200
"""Characters of a text that another machine sends and that is written or shown here."""

SITE_ERROR, SITE_LATER, SITE_SPENT = 1000, 1001, 1002
"""Error codes of a reply that says why a site has not done what it was asked; with the second, it may be asked again
in the same round; with the third, it answers the same for the rest of the study: its patients' privacy is spent."""

LONGEST_HEADER = 1 << 22
"""Bytes before the tensors' values: one of a thousand tensors has a hundredth."""

_ONLY, _FORM, _ALIGNED, _DIMENSIONS = "tensors", "polyclinic-tensors-1", 64, 32
_GROUPS = {"train": TRAINING, "evaluation": EVALUATION}

T = TypeVar("T", "Order", "Reply", "Presence")


class Malformed(ValueError):
    """A message that does not have the form of an order or an update."""


@dataclass(frozen=True)
class Presence:
    """What a site answers when it is asked who it is, for a study.

    Attributes:
        version: of Polyclinic.
        approved: whether the study may run there.
        clock: the site's, in seconds since 1970.
    """

    site: str
    version: str
    approved: bool
    clock: float


@dataclass(frozen=True)
class Order:
    """What the coordinator asks of a site in one message.

    Attributes:
        study: the study's canonical form.
        stage: from 0.
        round: counted from 1 across stages; the round that training would make.
        site: the name the coordinator knows the site by.
        model: SHA-256 of the global tensors that come with the order.
        train: train a round from these tensors.
        evaluate: measure these tensors as they came.
        head: where the site's privacy ledger ended when the coordinator last heard of it; "" where it never has.
    """

    study: str
    stage: int
    round: int
    site: str
    model: str
    train: bool
    evaluate: bool
    head: str = ""


@dataclass(frozen=True)
class Reply:
    """What a site sends back: an update when it trained, and metrics out of METRICS.

    Attributes:
        study: SHA-256 of the study's canonical form.
        patients: whom the update was trained on; 0 when it only evaluated.
        train: metrics of the training.
        evaluation: metrics of the global tensors as they came.
        head: where the site's privacy ledger ends; "" where the study promises patients no privacy.
    """

    study: str
    stage: int
    round: int
    site: str
    patients: int
    train: dict[str, float]
    evaluation: dict[str, float]
    head: str = ""


def plain(text: object) -> str:
    """A text from another machine, or for one, as it may be written and shown: one short printable line, no path.

    What looks like a path ends the text, since a blank in it would hide where it ends. Square brackets, with which
    terminals' libraries mark styles, become round.

    >>> plain("cannot open /data/Jane Doe/1.dcm")
    'cannot open ...'
    """
    words, *path = re.split(r"[^\s'\"(]*[/\\]", str(text)[: 4 * LONGEST_TEXT], maxsplit=1)
    line = "".join(letter if letter.isprintable() else " " for letter in words + "..." * bool(path))
    return line.translate(str.maketrans("[]", "()"))[:LONGEST_TEXT].strip()


def digest(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 over names, shapes and values in order of name, hexadecimal."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(json.dumps([name, list(value.shape)]).encode())
        sha.update(np.ascontiguousarray(value).data)
    return sha.hexdigest()


def pack_tensors(tensors: Mapping[str, NDArray[np.float32]]) -> Packed:
    """Tensors as a Flower record, each copied once: the length of a header, the header, the values one after another.

    All are one array to Flower, since it keeps books on every array of a message at every step of its way: with 179
    tensors a round at three sites took SuperLink 40 s of processor time.
    """
    little = {name: np.ascontiguousarray(value, "<f4") for name, value in tensors.items()}
    header = json.dumps([[name, list(value.shape)] for name, value in tensors.items()]).encode()
    header += b" " * (-len(header) % _ALIGNED)
    data = b"".join(
        [len(header).to_bytes(8, "little"), header, *(value.data for value in little.values() if value.size)]
    )
    return ArrayRecord({_ONLY: Array("uint8", (len(data),), _FORM, data)})


def unpack_tensors(record: Packed) -> Tensors:
    """The tensors of a record, as read-only views of the bytes that arrived.

    Raises:
        Malformed: the record is not what `pack_tensors` makes.
    """
    array = record.get(_ONLY)
    if array is None or len(record) != 1 or array.stype != _FORM:
        raise Malformed("the tensors are not in the form of a message")
    data = memoryview(array.data)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > min(len(data), LONGEST_HEADER):
        raise Malformed("the tensors have no header")
    tensors, at = {}, end
    for name, shape in _layout(bytes(data[8:end])):
        size = 4 * math.prod(shape)
        if size > len(data) - at or name in tensors:
            raise Malformed(f"tensor {name[:80]!r} is not there, or twice")
        try:
            tensors[name] = np.frombuffer(data[at : at + size], "<f4").reshape(shape)
        except ValueError as error:  # too many dimensions
            raise Malformed(f"tensor {name[:80]!r} has no shape that a tensor can have") from error
        at += size
    if at != len(data):
        raise Malformed(f"{len(data) - at} bytes are of no tensor")
    return tensors


def _layout(header: bytes) -> list[tuple[str, list[int]]]:
    """(name, shape) of every tensor that a header names."""
    try:
        found = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise Malformed("the tensors' header cannot be read") from error
    if not isinstance(found, list) or not all(isinstance(item, list) and len(item) == 2 for item in found):
        raise Malformed("the tensors' header is no list of names and shapes")
    for name, shape in found:
        sides = isinstance(shape, list) and all(type(side) is int and 0 <= side < 2**48 for side in shape)
        if not isinstance(name, str) or not sides or len(shape) > _DIMENSIONS:
            raise Malformed("the tensors' header is no list of names and shapes")
    return [(name, shape) for name, shape in found]


def pack_question(study_hash: str) -> RecordDict:
    """Who are you, and may the study with this hash run there?"""
    return RecordDict({"question": ConfigRecord({"study": study_hash})})


def unpack_question(content: RecordDict) -> str:
    """The hash that a question names.

    Raises:
        Malformed: it names none.
    """
    record = content.get("question")
    found = record.get("study") if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
        raise Malformed("the message is not a question")
    return found


def pack_presence(presence: Presence) -> RecordDict:
    """The answer to a question."""
    return RecordDict({"presence": ConfigRecord(asdict(presence))})


def unpack_presence(content: RecordDict) -> Presence:
    """What a site says of itself, as text that may be shown.

    Raises:
        Malformed: it says something else.
    """
    record = content.get("presence")
    if not isinstance(record, ConfigRecord) or len(content) != 1:
        raise Malformed("it answers with something else")
    found = _typed(Presence, record)
    if not 0 <= found.clock < LARGEST * 100:
        raise Malformed("its clock is out of range")
    return replace(found, version=plain(found.version))


def pack_order(order: Order, tensors: Packed) -> RecordDict:
    """An order with its global tensors; `tensors` may be shared between the messages of a round."""
    return RecordDict({"order": ConfigRecord(asdict(order)), "tensors": tensors})


def unpack_order(content: RecordDict) -> tuple[Order, Tensors]:
    """The order and the global tensors of a message.

    Raises:
        Malformed: it is not an order.
    """
    record, tensors = content.get("order"), content.get("tensors")
    if not isinstance(record, ConfigRecord) or not isinstance(tensors, ArrayRecord) or len(content) != 2:
        raise Malformed("the message is not an order")
    return _typed(Order, record), unpack_tensors(tensors)


def pack_reply(reply: Reply, update: Mapping[str, NDArray[np.float32]] | None) -> RecordDict:
    """A reply; `update` is the difference from the order's tensors, None when the site only evaluated."""
    fields = {k: v for k, v in asdict(reply).items() if k not in _GROUPS}
    content = RecordDict({"reply": ConfigRecord(fields)})
    for group, allowed in _GROUPS.items():
        values = getattr(reply, group)
        if unknown := values.keys() - allowed:
            raise ValueError(f"metrics that may not leave a site: {sorted(unknown)}")
        content[group] = MetricRecord({k: float(v) for k, v in values.items()})
    if update is not None:
        content["update"] = pack_tensors(update)
    return content


def unpack_reply(content: RecordDict) -> tuple[Reply, Tensors | None]:
    """A reply and its update, whose values nobody has looked at yet.

    Raises:
        Malformed: it is not a reply, or carries metrics that are unknown, not finite or out of their range.
    """
    record, update = content.get("reply"), content.get("update")
    if not isinstance(record, ConfigRecord) or not isinstance(update, Packed | None):
        raise Malformed("the message is not a reply")
    if content.keys() - {"reply", "update", *_GROUPS} or record.keys() & _GROUPS.keys():
        raise Malformed("the reply carries more than a reply does")
    metrics = {group: _metrics(content.get(group), allowed) for group, allowed in _GROUPS.items()}
    reply = _typed(Reply, {**record, **metrics})
    return reply, None if update is None else unpack_tensors(update)


def describe(content: object) -> dict[str, Any]:
    """What a ledger says of a reply: every tensor by name, shape, SHA-256 and norm, and every figure."""
    if not isinstance(content, RecordDict):
        raise TypeError("not the content of a message")
    facts: dict[str, Any] = {}
    for record in content.config_records.values():
        facts |= {name: value for name, value in record.items() if name != "site"}
    if content.metric_records:
        facts["metrics"] = {name: value for group in content.metric_records.values() for name, value in group.items()}
    for group in content.array_records.values():
        facts["bytes"] = sum(len(array.data) for array in group.values())
        facts["tensors"] = [
            {
                "name": name,
                "shape": list(value.shape),
                "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
                "norm": float(np.linalg.norm(value.reshape(-1).astype(np.float64))),
            }
            for name, value in unpack_tensors(group).items()
        ]
    return facts


def _metrics(record: object, allowed: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(record, MetricRecord):
        raise Malformed("the reply carries no metrics")
    metrics = {}
    for name, value in record.items():
        if name not in allowed:
            raise Malformed("the reply carries metrics that are not known")
        lowest = -allowed[name] if name == "loss" else 0.0
        if not isinstance(value, float) or not lowest <= value <= allowed[name]:  # a NaN is not between, either
            raise Malformed(f"the reply's {name} is not a number that it can be")
        metrics[name] = value
    return metrics


def _typed(kind: type[T], values: Mapping[str, object]) -> T:
    """A dataclass from a record whose keys and types are exactly its own."""
    expected = {name: field.type for name, field in kind.__dataclass_fields__.items()}
    if set(values) != set(expected):
        raise Malformed(f"the {kind.__name__.lower()} has other fields than it should")
    for name, value in values.items():
        wanted = expected[name]
        if wanted in (str, int, bool, float) and type(value) is not wanted:
            raise Malformed(f"{name} of the {kind.__name__.lower()} is of another type than it should be")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Malformed(f"{name} of the {kind.__name__.lower()} is out of range")
    return kind(**values)  # type: ignore[arg-type]
