"""The local engine: the ServerApp's round loop and every site's ClientApp in this process, behind Flower's Grid.

A message is carried out when the server looks for replies, one a look: no process starts, one update in memory,
and a debugger steps from the round loop into a site. Sites work one after another, so none is ever late; where a
lifetime of messages holds here too, each site has all of it to itself, and one that hangs is interrupted at its end.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger(__name__)

FIRST_NODE = SUPERLINK_NODE_ID + 1
LONGEST_S = 1e8
"""For which an alarm can be set: three years."""

Node = Callable[[Message, Context], Message]


class LocalGrid(Grid):
    """Flower's Grid over ClientApps in this process: `{site name: app}`, each with its own node number."""

    def __init__(self, apps: Mapping[str, Node | ClientApp], expire: bool = False) -> None:
        """With `expire`, a site that has not answered a message when it expires never does."""
        self._expire = expire
        # Flower's messages take their sender from this, which its own runtimes set as they start.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self._apps = dict(enumerate(apps.values(), start=FIRST_NODE))
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={"site": name}, state=RecordDict(), run_config={})
            for node, name in enumerate(apps, start=FIRST_NODE)
        }
        self._waiting: dict[str, Message] = {}
        self._numbers = count(1)

    def set_run(self, run: Run) -> None:
        """There is one run; nothing to set."""

    @property
    def run(self) -> Run:
        """An empty description: nothing here reads it."""
        return Run.create_empty(run_id=1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """One node for each site."""
        return list(self._apps)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """One node a site."""
        return [NodeInfo(node_id=node) for node in self._apps]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; the answer is worked out when it is asked for."""
        ids = []
        for message in messages:
            ids.append(str(next(self._numbers)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Carry out the first of these that waits, and hand back its reply, if there is one."""
        for number in message_ids:
            if message := self._waiting.pop(number, None):
                if not self._expire:
                    return [self._carry_out(message)]
                with _interrupted(message.metadata.ttl):
                    return [self._carry_out(message)]
        return []

    def _carry_out(self, message: Message) -> Message:
        """A node's reply; what it raises becomes an error reply, as in Flower's own runtimes."""
        node = message.metadata.dst_node_id
        try:
            reply = self._apps[node](message, self._contexts[node])
            if not isinstance(reply, Message):
                raise TypeError("a node returned something else than a message")
            return reply
        except Exception as error:
            log.debug("a node raised", exc_info=True)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, in the order of the messages."""
        ids = list(self.push_messages(messages))
        return [reply for _ in ids for reply in self.pull_messages(ids)]


class _Expired(BaseException):
    """Nothing that a site catches: it is not the site's to deal with."""


@contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    """Stop what lasts longer, and go on after it.

    It lasts as it lasts where there is no alarm (Windows), outside the main thread, and where the process has set an
    alarm of its own that is due before.
    """
    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not alarm or 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds:
        yield
        return
    armed = True

    def expire(number: int, frame: object) -> None:
        if armed:
            raise _Expired

    handler, since = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST_S))
    try:
        yield
        armed = False
    except _Expired:
        log.warning("a site has not answered in %.0f s, when its message expired, and was interrupted", seconds)
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - since), 0.001), interval)
