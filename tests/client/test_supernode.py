"""SuperNode sends what is ready, though no message has come."""

import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState, MessageEntry

from polyclinic.errors import Refused
from polyclinic_client.supernode import PULL, mend, waits


def test_the_hook_still_bites() -> None:
    assert PULL in start_client_internal.start_client_internal.__code__.co_names


def entry(reply_to: str, retrieved: bool = False) -> Any:
    return SimpleNamespace(
        message=SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=reply_to)), is_retrieved=retrieved
    )


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
    node = SimpleNamespace(**{PULL: lambda **rest: came})
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


def test_another_flower_does_not_start() -> None:
    with pytest.raises(Refused, match="has no _pull_and_store_message"):
        mend(SimpleNamespace())
