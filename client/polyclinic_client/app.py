"""The Flower ClientApp: thin, since what a site does stands in `work`.

An answer to `query` says who the node is; one to `train` or `evaluate` carries out an order. An error leaves the site
as its kind and, where it is one of ours, its text without paths: never a traceback.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Protocol

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic import __version__, wire
from polyclinic.errors import PolyclinicError, SiteFailed
from polyclinic_client.hospital import Hospital
from polyclinic_client.site import Site, open_site
from polyclinic_client.work import Progress, answer

log = logging.getLogger(__name__)

SITE_ERROR = 1000
"""Error code of a reply that says why a site did not do what it was asked."""

Handler = Callable[[Message, Context], RecordDict]


class Member(Protocol):
    """Whoever a node answers for."""

    @property
    def name(self) -> str:
        """As the coordinator enrolled it."""
        ...

    def serve(self, text: str) -> Site:
        """The site for a study in its canonical form; raises where that may not run here."""
        ...


def make_app(find_site: Callable[[Context], Member], progress: Progress | None = None) -> ClientApp:
    """A ClientApp that answers for whom `find_site` gives for a node's context."""
    client = ClientApp()

    @client.query()
    @_guarded
    def who(message: Message, context: Context) -> RecordDict:
        site = _open(find_site, context)
        return RecordDict({"site": ConfigRecord({"site": site.name, "version": __version__})})

    @client.train()
    @client.evaluate()
    @_guarded
    def work(message: Message, context: Context) -> RecordDict:
        order, tensors = wire.unpack_order(message.content)
        site = _open(find_site, context).serve(order.study)
        return wire.pack_reply(*answer(order, tensors, site, progress))

    return client


def _open(find_site: Callable[[Context], Member], context: Context) -> Member:
    """The site; why there is none names folders of the site's, which nobody else is to know."""
    try:
        return find_site(context)
    except Exception as error:
        raise SiteFailed("the site's cohort cannot be opened", "see the site's log") from error


def _guarded(handler: Handler) -> Callable[[Message, Context], Message]:
    """Reply with what `handler` returns, or with why it could not. The traceback stays here, for who asks for DEBUG."""

    @wraps(handler)
    def replying(message: Message, context: Context) -> Message:
        try:
            return Message(handler(message, context), reply_to=message)
        except Exception as error:
            ours = isinstance(error, PolyclinicError | wire.Malformed)
            reason = wire.plain(error.args[0]) if ours else type(error).__name__
            log.error("a message could not be carried out: %s", reason)
            log.debug("where it failed", exc_info=True)
            return Message(Error(code=SITE_ERROR, reason=reason), reply_to=message)

    return replying


def _of(context: Context) -> Member:
    """The hospital whose folder the node was started with, or the simulated site of a state folder."""
    if "home" in context.node_config:
        return Hospital(Path(str(context.node_config["home"])))
    return open_site(Path(str(context.node_config["site"])))


app = make_app(_of)
