"""Flower's SuperNode, mended: it sends what is ready, whenever it is, and loses nothing to a broken connection.

Flower 1.41's looks for replies only after a message has come. When a message is dropped midway, since its run has ended
meanwhile (SuperLink was killed and started again), every later reply lies there until the next message comes, which
the coordinator sends when it has that reply. And where a connection breaks in its handshake (the gateway was killed),
it does not try again, but forgets the reply that it was sending, or the message that it was told of. It forgets the
reply, too, where an object of it arrived and SuperLink's answer did not: SuperLink takes an object once, refuses the
second attempt, and waits three minutes for the objects that were to follow. And where the process that works for a
message dies just before it has fetched that, nobody answers it: the node waits for ever, deaf to all that comes.
"""

import logging
import ssl
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import httpx

from polyclinic.errors import Refused
from polyclinic.processes import with_time

log = logging.getLogger(__name__)

PULL, PUSH = "_pull_and_store_message", "_push_messages"
"""Of flwr.supernode.start_client_internal: the first gives None where no message has come, and then nothing is sent.
Both take the calls that they make to the coordinator as arguments."""
OBJECT = "push_object"
"""That of these calls by which a part of a reply is sent."""
LOOK_S = 0.2
"""Between two looks for a reply."""
FIRST_S, LONGEST_S = 1.0, 30.0
"""Between two attempts at a call, doubled each time; there is no last one."""


def main() -> None:
    """As Flower's program of that name."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    with_time(log)
    mend(start_client_internal)
    flower_supernode()


def mend(node: Any) -> None:
    """Have Flower's module `node` look for replies where no message has come, too, and make its calls patiently.

    Raises:
        Refused: the module is not the one that this was written for.
    """
    pull, push = (getattr(node, name, None) for name in (PULL, PUSH))
    if not callable(pull) or not callable(push):
        raise Refused(
            f"this version of Flower has no {PULL} or {PUSH}: the node does not start",
            "install the version of flwr that polyclinic asks for",
        )

    def pull_or_send(*, state: Any, **rest: Any) -> int | None:
        run: int | None = pull(state=state, **_patient(rest))
        return 0 if run is None and waits(state) else run

    def push_when_answered(*, state: Any, **rest: Any) -> None:
        while not waits(state):
            answer_what_was_lost(state)
            time.sleep(LOOK_S)
        push(state=state, **_patient(rest))

    setattr(node, PULL, pull_or_send)
    setattr(node, PUSH, push_when_answered)


def answer_what_was_lost(state: Any) -> None:
    """Where no process is, or will be, at work, say so of the messages that are still there.

    Flower does, but for a message that its process had not fetched yet.
    """
    from flwr.common.constant import Status
    from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

    if state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]) or waits(state):
        return
    with state.lock_msg_store:
        lost = [entry for entry in state.msg_store.values() if not entry.message.metadata.reply_to_message_id]
        for entry in lost:
            entry.is_retrieved = True
            state.record_message_processing_start(entry.message.metadata.message_id)
    if lost:
        log.warning("the process that worked for a message is gone, and nobody would answer: the coordinator is told")
        state._store_error_replies({entry.message.metadata.run_id for entry in lost}, CLIENT_APP_CRASHED_ERROR)


def _patient(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, calls to the coordinator made again and again until the connection holds."""
    calls = {name: patiently(value) if callable(value) else value for name, value in arguments.items()}
    return {**calls, OBJECT: once(calls[OBJECT])} if OBJECT in calls else calls


def once(push_object: Callable[..., None]) -> Callable[..., None]:
    """`push_object`, where a refusal ends that object and not the reply: it was taken before the connection broke.

    Only as many in a row as are under way at once. Where more are refused SuperLink has given the reply up, after three
    minutes without a connection; where it could not store one, it will. The coordinator then asks for the reply again.
    """
    from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES as AT_ONCE
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    refused = 0

    @wraps(push_object)
    def pushing(*arguments: Any, **named: Any) -> None:
        nonlocal refused
        try:
            push_object(*arguments, **named)
            refused = 0
        except ObjectPushError as error:
            refused += 1
            if refused > AT_ONCE:
                raise
            log.warning("%s It was most likely taken before the connection broke", error)

    return pushing


def patiently(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, repeated while it is the connection that fails; whatever else it raises is raised."""

    @wraps(call)
    def calling(*arguments: Any, **named: Any) -> Any:
        wait_s = FIRST_S
        while True:
            try:
                answer = call(*arguments, **named)
                if wait_s > FIRST_S:
                    log.warning("the connection to the coordinator holds again")
                return answer
            except (httpx.TransportError, ssl.SSLError, ConnectionError) as error:
                said = f"{type(error).__name__}, {str(error)[:200]!a}"
                log.warning("the connection to the coordinator broke: %s; again in %.0f s", said, wait_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_S)

    return calling


def waits(state: Any) -> bool:
    """Is there a reply that has not been sent?"""
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in entries)


if __name__ == "__main__":
    main()
