"""SuperNode sends what is ready, though no message has come."""

import inspect
import ssl
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_object_contents_from_iterable
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState, MessageEntry

from polyclinic.errors import Refused
from polyclinic_client import supernode
from polyclinic_client.supernode import PULL, PUSH, answer_what_was_lost, mend, waits


def test_the_hook_still_bites() -> None:
    assert {PULL, PUSH} <= set(start_client_internal.start_client_internal.__code__.co_names)
    for name, calls in (
        (PULL, {"receive", "pull_object", "confirm_message_received"}),
        (PUSH, {"send", "push_object"}),
    ):
        assert calls <= set(inspect.signature(getattr(start_client_internal, name)).parameters)


def entry(reply_to: str, retrieved: bool = False) -> Any:
    return SimpleNamespace(
        message=SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=reply_to)), is_retrieved=retrieved
    )


ANSWERED = SimpleNamespace(lock_msg_store=threading.RLock(), msg_store={0: entry("1")})
"""Of a node that has a reply to send."""


@pytest.mark.parametrize(
    ("came", "entries", "gives"),
    [
        (None, [], None),
        (None, [entry("")], None),  # a message that waits to be carried out
        (None, [entry("1", retrieved=True)], None),
        (None, [entry(""), entry("1")], 0),
        (7, [], 7),
        (7, [entry("1")], 7),
    ],
)
def test_a_reply_that_is_ready_is_sent_whether_or_not_a_message_has_come(
    came: int | None, entries: list[Any], gives: int | None
) -> None:
    node = SimpleNamespace(**{PULL: lambda **rest: came, PUSH: print})
    mend(node)
    state = SimpleNamespace(lock_msg_store=threading.RLock(), msg_store=dict(enumerate(entries)))
    assert getattr(node, PULL)(state=state, object_store=None) == gives


def test_flowers_own_state_has_what_is_read_of_it() -> None:
    state = InMemoryNodeState(MagicMock())
    assert not waits(state)
    for number, reply_to in enumerate(("", "0")):
        message = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=reply_to))
        state.msg_store[str(number)] = MessageEntry(message=message)
        assert waits(state) == bool(reply_to)


@pytest.mark.parametrize("fetched", [False, True])
def test_a_message_whose_process_died_is_answered(
    fetched: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own node answers it only if that process had fetched it, and else waits for ever."""
    state = InMemoryNodeState(InMemoryObjectStore())
    state.set_node_id(1)
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 2)
    message = Message(RecordDict(), 1, MessageType.TRAIN)
    message.metadata.__dict__.update(_run_id=7, _message_id="a message", _src_node_id=2)
    state.store_message(message)
    task = state.create_task(TaskType.CLIENT_APP, run_id=7)
    assert task is not None
    assert not state.get_messages_legacy(is_reply=True)
    assert state.claim_task(task)
    assert state.activate_task(task)
    if fetched:
        assert state.get_messages_legacy(is_reply=False)
        state.record_message_processing_start("a message")
    answer_what_was_lost(state)
    assert not waits(state)  # the process lives, as far as anyone knows
    state.task_token_store[task].active_until = now() - timedelta(seconds=1)
    node, sent = SimpleNamespace(**{PULL: print}), []
    setattr(node, PUSH, lambda state: sent.extend(state.get_messages_legacy(is_reply=True)))
    mend(node)
    getattr(node, PUSH)(state=state)
    [reply] = sent
    assert reply.metadata.reply_to_message_id == "a message"
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert ("is gone, and nobody would answer" in caplog.text) == (not fetched)
    answer_what_was_lost(state)
    assert not waits(state)  # once is enough


def test_another_flower_does_not_start() -> None:
    for names in ({}, {PULL: print}, {PUSH: print}):
        with pytest.raises(Refused, match="has no _pull_and_store_message or _push_messages"):
            mend(SimpleNamespace(**names))


@pytest.mark.parametrize(
    "broken", [httpx.ConnectError("x"), ssl.SSLEOFError("x"), ConnectionResetError(), httpx.ReadTimeout("x")]
)
def test_what_a_broken_connection_has_kept_from_being_sent_is_sent_again(
    broken: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(supernode.time, "sleep", waited.append)
    sent: list[str] = []

    def send(message: str) -> int:
        if len(waited) < 7:
            raise broken
        sent.append(message)
        return 3

    node = SimpleNamespace(**{PULL: print, PUSH: lambda state, send: send("an update")})
    mend(node)
    getattr(node, PUSH)(state=ANSWERED, send=send)
    assert sent == ["an update"]
    assert waited == [1, 2, 4, 8, 16, 30, 30]


def test_an_object_that_superlink_has_taken_before_does_not_end_the_reply() -> None:
    """Flower's own way of pushing objects stops at the first refusal."""
    taken: list[str] = []

    def superlink(request: PushObjectRequest) -> PushObjectResponse:
        taken.append(request.object_id)
        return PushObjectResponse(stored=taken.count(request.object_id) == 1)

    def push_object(run: int, session: str, name: str, content: bytes) -> None:
        push = make_push_object_fn_protobuf(superlink, Node(node_id=1), run, session)
        push(name, content)
        if name == "a" and taken == ["a"]:  # the answer is lost, and Flower asks again
            push(name, content)

    def push(push_object: Callable[..., None], **_: object) -> None:
        objects = [(name, b"x") for name in "abc"]
        push_object_contents_from_iterable(objects, partial(push_object, 1, "session"), max_concurrent_pushes=1)

    node = SimpleNamespace(**{PULL: print, PUSH: push})
    with pytest.raises(ObjectPushError):
        node._push_messages(state=ANSWERED, push_object=push_object)
    assert set(taken) < set("abc")
    taken.clear()
    mend(node)
    node._push_messages(state=ANSWERED, push_object=push_object)
    assert taken == ["a", "a", "b", "c"]


def test_a_reply_that_superlink_has_given_up_is_not_sent_to_its_end() -> None:
    tried: list[str] = []

    def push_object(run: int, session: str, name: str, content: bytes) -> None:
        tried.append(name)
        raise ObjectPushError(name, run, session)

    def push(push_object: Callable[..., None], **_: object) -> None:
        for name in "abcdef":
            push_object(1, "session", name, b"x")

    node = SimpleNamespace(**{PULL: print, PUSH: push})
    mend(node)
    with pytest.raises(ObjectPushError):
        node._push_messages(state=ANSWERED, push_object=push_object)
    assert tried == ["a", "b", "c"]


def test_what_is_not_the_connections_fault_is_raised() -> None:
    def ended() -> None:
        raise RuntimeError("the run has ended")

    with pytest.raises(RuntimeError, match="has ended"):
        supernode.patiently(ended)()
