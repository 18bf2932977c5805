"""The Flower ClientApp: thin, since what a site does stands in `work`.

An answer to `query` says who the node is; one to `train` or `evaluate` carries out an order. An error leaves the site
as its kind and, where it is one of ours, its text: never a traceback, which can hold paths.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic import __version__, wire
from polyclinic.errors import PolyclinicError
from polyclinic_client.site import Site, open_site
from polyclinic_client.work import Progress, answer

log = logging.getLogger(__name__)

SITE_ERROR = 1000
"""Error code of a reply that says why a site did not do what it was asked."""


def make_app(find_site: Callable[[Context], Site], progress: Progress | None = None) -> ClientApp:
    """A ClientApp that answers for the site that `find_site` gives for a node's context."""
    client = ClientApp()

    @client.query()
    def who(message: Message, context: Context) -> Message:
        facts = ConfigRecord({"site": find_site(context).name, "version": __version__})
        return Message(RecordDict({"site": facts}), reply_to=message)

    @client.train()
    @client.evaluate()
    def work(message: Message, context: Context) -> Message:
        try:
            order, tensors = wire.unpack_order(message.content)
            reply, update = answer(order, tensors, find_site(context), progress)
        except Exception as error:
            log.exception("the order could not be carried out")
            said = error.problem if isinstance(error, PolyclinicError) else type(error).__name__
            return Message(Error(code=SITE_ERROR, reason=said), reply_to=message)
        return Message(wire.pack_reply(reply, update), reply_to=message)

    return client


app = make_app(lambda context: open_site(Path(str(context.node_config["site"]))))
