"""Asking sites, and taking what they answer: who is there, and the replies of a round as they arrive.

Waits are bounded, and nothing that arrives can stop the caller: what is nobody's turn is written down and dropped.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from polyclinic import wire
from polyclinic.study import Study
from polyclinic.wire import Order, Packed, Reply, Tensors
from polyclinic_server.rundir import RunDir

POLL_S = 0.2
"""Seconds between looks for replies when none has come."""
LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    wire.SITE_LATER,
)
"""Errors by which Flower says that a node, or the process that worked for it, is gone, or by which a site says that its
disk is full: what it was asked is asked again. It answers from what it has stored, or goes on from there."""
UNREADABLE = "it answers with something that cannot be read"
AGAIN = 20
"""How often a site is asked again in one round."""
AGAIN_S, AGAIN_LONGEST_S = 2.0, 60.0
"""Seconds until it is asked again, if it is back: doubled from time to time, up to the second."""
GRACE_S = 600.0
"""Seconds after a round's deadline at which its messages expire: a node that comes back later gets none of them."""


class Clock:
    """The time by which sites are waited for: this machine's."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, until: float) -> None:
        """Come back when something may have come, at `until` at the latest or soon after."""
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Round:
    """One round in flight: what is asked of whom, and from which tensors."""

    number: int
    stage: int
    tensors: Tensors
    packed: Packed
    """The tensors as they are sent; `tensors` are views of its bytes."""
    orders: Mapping[str, Order]


class Mail:
    """The way to the enrolled sites.

    Attributes:
        nodes: the sites that take part, {site: node}. A site that has not answered within a round's patience is none
            of them until it says again who it is, so that one which has left for good holds up one round only.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunDir,
        study: Study,
        seats: Mapping[str, int],
        registered: Mapping[str, int] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """With `registered`, {site: node}, a node gets no other seat than that of the site whose key it has."""
        self.nodes: dict[str, int] = {}
        self._clock = clock or Clock()
        self._grid, self._run, self._seats, self._registered = grid, run, seats, registered
        self._question, self._patience_s = wire.pack_question(study.hash), study.aggregation.round_deadline_s
        self._names: dict[int, str] = {}
        self._asked_at: dict[int, float] = {}
        self._due: dict[int, float] = {}  # when a node is asked again; one that has not answered, never
        self._failed = Counter[int]()
        self._told: set[tuple[int, str]] = set()
        self._pending: dict[str, int] = {}

    def find(self) -> None:
        """Ask every node who it is, until all enrolled sites are found or patience is at its end."""
        deadline = self._clock.now() + self._patience_s
        while set(self.nodes) != set(self._seats):
            if not self.look():
                if self._clock.now() >= deadline:
                    break
                self._clock.wait(min([deadline, *self._due.values()]))
        for name in sorted(set(self._seats) - set(self.nodes)):
            self._run.event("site_missing", round=0, site=name)

    def look(self) -> bool:
        """Ask nodes that are new who they are, unless all sites are there, and take what has come; whether it has."""
        if set(self.nodes) == set(self._seats):
            return False
        now = self._clock.now()
        for node in [node for node in self._grid.get_node_ids() if now >= self._due.get(node, now)]:
            self._due[node], self._asked_at[node] = math.inf, time.time()
            question = Message(self._question, node, MessageType.QUERY, ttl=self._patience_s + GRACE_S)
            self._pending.update(dict.fromkeys(self._grid.push_messages([question]), node))
        came = False
        for number, answer in _arrived(self._grid, list(self._pending)):
            came = True
            if answer is None:
                self._strange(self._pending.pop(number), UNREADABLE)
            elif (sender := _sender(answer, self._pending)) is None:
                continue
            elif _is_lost(answer):
                self._ask_later(sender)
            else:
                self._seat(answer, sender)
        return came

    def _seat(self, reply: Message, node: int) -> None:
        """Note which site a node says that it is; the first to claim a seat has it, unless it is another's by key."""
        try:
            if (error := _error(reply)) is not None:
                raise wire.Malformed(error)
            found = wire.unpack_presence(reply.content)
        except wire.Malformed as reason:
            self._strange(node, reason)
            return
        site, ours = found.site, self._registered is None or self._registered.get(found.site) == node
        if site in self._seats and site not in self.nodes and ours:
            self.nodes = dict(sorted({**self.nodes, site: node}.items()))
            self._names[node] = site
            self._told = {told for told in self._told if told[0] != node}
            del self._failed[node]
            now, asked = time.time(), self._asked_at[node]  # it has answered between
            ahead = round(max(found.clock - now, 0.0) + min(found.clock - asked, 0.0), 1)
            facts = {"version": found.version, "approved": found.approved, "clock_ahead_s": ahead}
            self._run.event("site_found", site=site, **facts)
            return
        why = "is not enrolled" if site not in self._seats else "has another key" if not ours else "is taken"
        self._run.event("warning", text=wire.plain(f"a node calls itself {site[:64]!r}, a site that {why}"))

    def _strange(self, node: int, reason: object) -> None:
        """Note a node that does not say who it is. It is asked again: it may be well later."""
        self._ask_later(node)
        text = wire.plain(f"a node does not say which site it is: {reason}")
        if (node, text) not in self._told:
            self._told.add((node, text))
            self._run.event("warning", text=text)

    def _ask_later(self, node: int) -> None:
        self._due[node] = self._clock.now() + _wait_s(self._failed[node])
        self._failed[node] += 1

    def replies(self, round: Round) -> Iterator[tuple[str, Message]]:
        """(site, reply) as they arrive, until every site that was asked has answered or patience is at its end.

        What has arrived by then is taken, even where taking the one before lasted beyond the deadline. A site whose
        node has gone is asked again when it is back. Who comes meanwhile is there for the next round.
        """
        deadline = self._clock.now() + self._patience_s
        pending = self._send(round, round.orders)
        missing = set(round.orders)
        again = Counter[str]()
        lost: dict[str, float] = {}
        look_at, late = self._clock.now() + AGAIN_S, False
        while (pending or lost) and not late:
            now = self._clock.now()
            late = now >= deadline
            if now >= look_at:
                self.look()
                online, look_at = set(self._grid.get_node_ids()) if lost else set(), now + AGAIN_S
                back = sorted(site for site, due in lost.items() if now >= due and self.nodes[site] in online)
                again.update(back)
                pending |= self._send(round, back)
                lost = {site: due for site, due in lost.items() if site not in back}
            for number, message in _arrived(self._grid, list(pending)):
                if message is None:
                    site = self._names[pending.pop(number)]
                    missing.discard(site)
                    refuse(self._run, round, site, UNREADABLE)
                    continue
                if (sender := _sender(message, pending)) is not None:
                    site = self._names[sender]
                    if _is_lost(message) and again[site] < AGAIN:
                        lost[site] = self._clock.now() + _wait_s(again[site])
                        self._run.event("site_lost", round=round.number, site=site, reason=_error(message))
                        continue
                    missing.discard(site)
                    yield site, message
                elif site := self._names.get(message.metadata.src_node_id, ""):
                    refuse(self._run, round, site, "it answers nothing that was asked of it, or answers again")
                else:
                    self._run.event("warning", text="a reply to nothing that was asked was dropped")
                del message  # or it would stay in memory until the next has come
            if (pending or lost) and not late:  # also where some have come: a look asks for each of a thousand
                due = min([*lost.values(), *self._due.values()], default=deadline)
                self._clock.wait(min(deadline, max(due, look_at)))
        for site in sorted(missing):
            self._run.event("site_missing", round=round.number, site=site)
            self._due[self.nodes.pop(site)] = now  # it may be well again: it is asked before the next round

    def _send(self, round: Round, sites: Iterable[str]) -> dict[str, int]:
        """Send sites their orders: {message: node}. The messages share one copy of the tensors."""
        pending: dict[str, int] = {}
        for site in sites:
            order, node = round.orders[site], self.nodes[site]
            kind = MessageType.TRAIN if order.train else MessageType.EVALUATE
            content, ttl = wire.pack_order(order, round.packed), self._patience_s + GRACE_S
            message = Message(content, node, kind, group_id=str(round.number), ttl=ttl)
            pending.update(dict.fromkeys(self._grid.push_messages([message]), node))
        return pending


def _wait_s(times: int) -> float:
    """Until a node is asked again that was asked again so often."""
    return min(AGAIN_S * (1 << min(times, 10)), AGAIN_LONGEST_S)


def _arrived(grid: Grid, asked: list[str]) -> Iterator[tuple[str, Message | None]]:
    """(message that was asked, reply) of those that are there; None where Flower cannot read what a site has sent.

    One message is asked for at a time: for all at once, Flower would load all replies, and one that cannot be read
    would take the others with it.
    """
    for number in asked:
        try:
            found: list[Message | None] = list(grid.pull_messages([number]))
        except (ValueError, TypeError, KeyError, IndexError, DecodeError):
            found = [None]
        while found:
            yield number, found.pop()


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
