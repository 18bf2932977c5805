"""Asking sites, and taking what they answer: who is there, and the replies of a round as they arrive.

Waits are bounded, and nothing that arrives can stop the caller: what is nobody's turn is written down and dropped.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from polyclinic import wire
from polyclinic.wire import Order, Packed, Reply, Tensors
from polyclinic_server.rundir import RunDir

POLL_S = 0.2
"""Seconds between looks for replies when none has come."""
LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)
"""Errors by which Flower says that a node, or the process that worked for it, is gone: what it was asked is asked again
once it is back. It answers from what it has stored, or goes on from the state of the round before."""
AGAIN = 20
"""How often a site is asked again in one round."""
AGAIN_S = 2.0
"""Seconds between looks for nodes that are back."""
GRACE_S = 600.0
"""Seconds after a round's deadline at which its messages expire: a node that comes back later gets none of them."""


@dataclass(frozen=True)
class Round:
    """One round in flight: what is asked of whom, and from which tensors."""

    number: int
    stage: int
    tensors: Tensors
    packed: Packed
    """The tensors as they are sent; `tensors` are views of its bytes."""
    orders: Mapping[str, Order]


def find_sites(
    grid: Grid, run: RunDir, seats: Mapping[str, int], patience_s: float, registered: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Ask every node who it is, until all enrolled sites are found or patience is at its end: {site: node}.

    With `registered`, {site: node}, a node gets no other seat than that of the site whose key it has.
    """
    deadline = time.monotonic() + patience_s
    nodes: dict[str, int] = {}
    asked: set[int] = set()
    pending: dict[str, int] = {}
    looked = time.monotonic()
    lost: set[int] = set()
    while set(nodes) != set(seats):
        if time.monotonic() - looked > AGAIN_S:
            looked, asked = time.monotonic(), asked - lost
            lost.clear()
        for node in [node for node in grid.get_node_ids() if node not in asked]:
            asked.add(node)
            question = Message(RecordDict(), node, MessageType.QUERY, ttl=patience_s + GRACE_S)
            pending.update(dict.fromkeys(grid.push_messages([question]), node))
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            if (sender := _sender(reply, pending)) is None:
                continue
            if _is_lost(reply):
                lost.add(sender)
            else:
                _seat(reply, sender, nodes, run, seats, registered)
        if not replies:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    for name in sorted(set(seats) - set(nodes)):
        run.event("site_missing", round=0, site=name)
    return dict(sorted(nodes.items()))


def _seat(
    reply: Message,
    node: int,
    nodes: dict[str, int],
    run: RunDir,
    seats: Mapping[str, int],
    registered: Mapping[str, int] | None,
) -> None:
    """Note which site a node says that it is; the first to claim a seat has it, unless it is known to be another's."""
    record = reply.content.get("site") if reply.has_content() else None
    name = record.get("site") if isinstance(record, ConfigRecord) else None
    ours = registered is None or (isinstance(name, str) and registered.get(name) == node)
    if isinstance(name, str) and name in seats and name not in nodes and ours:
        nodes[name] = node
        return
    if isinstance(name, str):
        why = "is not enrolled" if name not in seats else "has another key" if not ours else "is taken"
        text = f"a node calls itself {name[:64]!r}, a site that {why}"
    else:
        text = f"a node does not say which site it is: {_error(reply) or 'it answers with something else'}"
    run.event("warning", text=wire.plain(text))


def replies(
    grid: Grid, run: RunDir, round: Round, nodes: Mapping[str, int], patience_s: float
) -> Iterator[tuple[str, Message]]:
    """(site, reply) as they arrive, until every site has answered or patience is at its end.

    What has arrived by then is taken, even where taking the one before lasted beyond the deadline. A site whose node
    has gone is asked again when it is back.
    """
    deadline = time.monotonic() + patience_s
    names = {node: site for site, node in nodes.items()}
    pending = _send(grid, round, nodes, patience_s + GRACE_S)
    missing = set(nodes)
    again = Counter[str]()
    lost: set[str] = set()
    looked, late = time.monotonic(), False
    while (pending or lost) and not late:
        late = time.monotonic() > deadline
        if lost and time.monotonic() - looked > AGAIN_S:
            looked, back = time.monotonic(), {site for site in lost if nodes[site] in set(grid.get_node_ids())}
            lost -= back
            again.update(back)
            pending |= _send(grid, round, {site: nodes[site] for site in sorted(back)}, patience_s + GRACE_S)
        seen = False
        for message in _arrived(grid, list(pending)):
            seen = True
            if (sender := _sender(message, pending)) is not None:
                if _is_lost(message) and again[names[sender]] < AGAIN:
                    lost.add(names[sender])
                    run.event("site_lost", round=round.number, site=names[sender], reason=_error(message))
                    continue
                missing.discard(names[sender])
                yield names[sender], message
            elif (site := names.get(message.metadata.src_node_id)) is not None:
                refuse(run, round, site, "it answers nothing that was asked of it, or answers again")
            else:
                run.event("warning", text="a reply to nothing that was asked was dropped")
            del message
        if not seen and not late:
            time.sleep(POLL_S)
    for site in sorted(missing):
        run.event("site_missing", round=round.number, site=site)


def _send(grid: Grid, round: Round, nodes: Mapping[str, int], ttl: float) -> dict[str, int]:
    """Send every site its order: {message: node}. The messages share one copy of the tensors."""
    pending: dict[str, int] = {}
    for site, node in nodes.items():
        order = round.orders[site]
        kind = MessageType.TRAIN if order.train else MessageType.EVALUATE
        message = Message(wire.pack_order(order, round.packed), node, kind, group_id=str(round.number), ttl=ttl)
        pending.update(dict.fromkeys(grid.push_messages([message]), node))
    return pending


def _arrived(grid: Grid, asked: list[str]) -> Iterator[Message]:
    """Replies that are there. One message is asked for at a time: for all at once, Flower would load all replies."""
    for number in asked:
        found = list(grid.pull_messages([number]))
        while found:
            yield found.pop()


def _sender(reply: Message, pending: dict[str, int]) -> int | None:
    """The node that a reply is from, struck off `pending` {message: node}; None where it is nobody's turn.

    A reply counts if it answers a message that waits for one and comes from the node that was asked, or is an error:
    those the server's own transport sends too, in a node's stead.
    """
    asked = str(reply.metadata.reply_to_message_id)
    node = pending.get(asked)
    if node is None or (reply.has_content() and reply.metadata.src_node_id != node):
        return None
    return pending.pop(asked)


def read(message: Message) -> tuple[Reply, Tensors | None]:
    """A reply and its update, not yet looked at.

    Raises:
        Malformed: it is not a reply; or an error, and then the text says which.
    """
    if (error := _error(message)) is not None:
        raise wire.Malformed(f"the site failed: {error}")
    return wire.unpack_reply(message.content)


def refuse(run: RunDir, round: Round, site: str, reason: object) -> None:
    """Write down, by name and reason, that a site has lost its turn."""
    run.event("update_refused", round=round.number, site=site, reason=wire.plain(reason))


def _is_lost(message: Message) -> bool:
    return bool(message.has_error() and message.error.code in LOST)


def _error(message: Message) -> str | None:
    return wire.plain(message.error.reason) if message.has_error() else None
