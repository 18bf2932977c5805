"""What runs at a site under the name `flwr-clientapp`: Flower's own program, held to the code that is installed here.

Flower's node starts it for every message, or has the warm process do the same (warm.py): it downloads the bundle that
the coordinator submitted and would import whatever that names. Here the bundle's bytes must have the hash that this
installation gives its own, and the app that is run is the installed one, whatever the bundle says. Should Flower rename
what is replaced, nothing runs.
"""

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polyclinic.errors import Refused

if TYPE_CHECKING:
    from flwr.app import Context, Message

log = logging.getLogger(__name__)

REPLACED = ("install_from_fab", "get_load_client_app_fn")
"""In flwr.supernode.runtime.run_clientapp."""


def main() -> None:
    """As Flower's program of that name."""
    prepare()()


def prepare() -> Callable[[], None]:
    """Flower's program, held to what is installed, with all imported that it will need."""
    from flwr.supercore import telemetry
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    import polyclinic_client.app  # noqa: F401

    hold(run_clientapp)
    telemetry.create_event = lambda *_: "off"  # off as it is, it starts two programs to describe the machine
    return flwr_clientapp


def hold(runtime: Any) -> None:
    """Replace, in Flower's module `runtime`, how a bundle is installed and which app is loaded.

    Raises:
        Refused: the module is not the one that this was written for.
    """
    if missing := [name for name in REPLACED if not callable(getattr(runtime, name, None))]:
        raise Refused(
            f"this version of Flower has no {missing[0]}: no message is answered",
            "install the version of flwr that polyclinic asks for",
        )
    runtime.install_from_fab = check
    runtime.get_load_client_app_fn = lambda **_: lambda *_: installed()


def check(bundle: bytes, *_: Any, **__: Any) -> None:
    """Refuse any bundle but ours, before a byte of it is unpacked.

    Raises:
        Refused: it is another.
    """
    from polyclinic.bundle import bundle_hash

    found = hashlib.sha256(bundle).hexdigest()
    if found != bundle_hash():
        log.error("a bundle with the hash %s was refused: this site runs installed code only", found)
        raise Refused("the bundle is not the one that this site has installed", "submit Polyclinic's own bundle")


def installed() -> Any:
    """The site's own ClientApp."""
    from polyclinic_client.app import app

    return _plain(app)


def _plain(app: Any) -> Any:
    """The app, whose own errors (a message of a kind that it does not know) leave as their kind, without text."""
    from flwr.app import Error, Message

    from polyclinic.wire import SITE_ERROR

    def answering(message: "Message", context: "Context") -> "Message":
        try:
            return app(message, context)  # type: ignore[no-any-return]
        except Exception as error:
            log.exception("a message could not be carried out")
            return Message(Error(SITE_ERROR, type(error).__name__), reply_to=message)

    return answering
