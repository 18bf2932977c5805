"""The Flower ClientApp: thin, since what a site does stands in `work`.

An answer to `query` says who the node is; one to `train` or `evaluate` carries out an order. An error leaves the site
as its kind and, where it is one of ours, its text without paths: never a traceback.
"""

import logging
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic import __version__, wire
from polyclinic.errors import PolyclinicError, StorageError
from polyclinic.privacy.ledger import BudgetSpent
from polyclinic_client.hospital import Hospital
from polyclinic_client.site import Site, open_site
from polyclinic_client.work import Progress, answer

log = logging.getLogger(__name__)


class Member(Protocol):
    """Whoever a node answers for."""

    @property
    def name(self) -> str:
        """As the coordinator enrolled it."""
        ...

    def approves(self, study_hash: str) -> bool:
        """Whether a study may run here."""
        ...

    def serve(self, text: str) -> Site:
        """The site for a study in its canonical form; raises where that may not run here."""
        ...

    def leaving(self, kind: str, content: RecordDict | str) -> None:
        """Note what leaves in answer to a message of a kind: a reply, or the reason why there is none.

        It may take figures out of the reply that may not leave.
        """
        ...


Handler = Callable[[Message, Member], RecordDict]


def make_app(find_site: Callable[[Context], Member], progress: Progress | None = None) -> ClientApp:
    """A ClientApp that answers for whom `find_site` gives for a node's context."""
    client = ClientApp()

    @client.query()
    @partial(_guarded, find_site)
    def who(message: Message, member: Member) -> RecordDict:
        approved = member.approves(wire.unpack_question(message.content))
        return wire.pack_presence(wire.Presence(member.name, __version__, approved, time.time()))

    @client.train()
    @client.evaluate()
    @partial(_guarded, find_site)
    def work(message: Message, member: Member) -> RecordDict:
        order, tensors = wire.unpack_order(message.content)
        return wire.pack_reply(*answer(order, tensors, member.serve(order.study), progress))

    return client


def _guarded(find_site: Callable[[Context], Member], handler: Handler) -> Callable[[Message, Context], Message]:
    """Reply with what `handler` returns, or with why it could not, once the member has noted that it leaves.

    The traceback stays here, for who asks for DEBUG. Why there is no member at all names folders of the site's, which
    nobody else is to know.
    """

    @wraps(handler)
    def replying(message: Message, context: Context) -> Message:
        try:
            member = find_site(context)
        except Exception:
            log.debug("no site", exc_info=True)
            return _failed(message, "the site's cohort cannot be opened")
        code = wire.SITE_ERROR
        try:
            content = handler(message, member)
            member.leaving(message.metadata.message_type, content)
            return Message(content, reply_to=message)
        except Exception as error:
            ours = isinstance(error, PolyclinicError | wire.Malformed)
            reason = wire.plain(error.args[0]) if ours else type(error).__name__
            code = wire.SITE_LATER if isinstance(error, StorageError) else code  # a full disk is seen to
            code = wire.SITE_SPENT if isinstance(error, BudgetSpent) else code
            log.debug("where it failed", exc_info=True)
        try:
            member.leaving(message.metadata.message_type, reason)
        except Exception:
            log.debug("the ledger", exc_info=True)
            reason = "the site cannot write its ledger: nothing leaves"
        return _failed(message, reason, code)

    return replying


def _failed(message: Message, reason: str, code: int = wire.SITE_ERROR) -> Message:
    log.error("a message could not be carried out: %s", reason)
    return Message(Error(code=code, reason=reason), reply_to=message)


def _of(context: Context) -> Member:
    """The hospital whose folder the node was started with, or the simulated site of a state folder."""
    if "home" in context.node_config:
        return Hospital(Path(str(context.node_config["home"])))
    return open_site(Path(str(context.node_config["site"])))


app = make_app(_of)
