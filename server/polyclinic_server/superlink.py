"""Flower's SuperLink, mended: a signed request is taken once, and what a killed node was sending is not waited for.

Flower 1.41's node signs the time of a request and nothing else, and SuperLink takes whatever was signed within the last
five minutes. Who has recorded one request could send it again, or another with its headers: fetch the messages that are
meant for the site, or answer in its name. Here every signature counts once, also after SuperLink was started again.
What remains is for TLS to prevent: who can hold a request back may use its headers in its stead, once.

Of a reply that is sent in parts SuperLink waits for the next part for three minutes, also where the node that was
sending has been killed, is back and knows nothing of it. Here a node that starts has nothing under way.
"""

import logging
import sqlite3
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from polyclinic.enrolment import fingerprint
from polyclinic.errors import Refused
from polyclinic.processes import with_time

log = logging.getLogger(__name__)

AUTHENTICATE = "authenticate_node"
"""In flwr.superlink.routers.fleet.node_auth: raises where a request was not signed lately by the key that it names."""
KEPT_S = 3600.0
"""Longer than any signature is taken, in front of or behind the coordinator's clock."""
LATER = 503
"""After which Flower's node asks again, with a new signature. After a 401 it would end: so that whoever is the first to
send what a site has sent, could end it."""


def main() -> None:
    """As Flower's program of that name; the first argument is the file that remembers signatures."""
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.routers.fleet import node_auth

    with_time(log)
    mend(node_auth, Signatures(Path(sys.argv.pop(1))))
    flower_superlink()


class Signatures:
    """Those that were taken lately, in a file; safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._using, self._cleaned = path, threading.Lock(), 0.0
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)

    def take(self, signature: bytes) -> bool:
        """Whether this ECDSA signature (DER) comes for the first time.

        Known by its first number alone: from (r, s) anyone can make (r, -s), which is as valid.

        Raises:
            sqlite3.OperationalError: it cannot be kept, for instance on a full disk.
        """
        r, _ = decode_dss_signature(signature)
        with self._using:
            try:
                return self._add(r)
            except sqlite3.DatabaseError as error:
                self._begin_anew(error)
                return self._add(r)

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, but for the last signatures
        self._database.execute("CREATE TABLE IF NOT EXISTS taken (signature TEXT PRIMARY KEY, at REAL) WITHOUT ROWID")

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """Without the file where it is damaged: or no site would be heard again. A full disk damages nothing."""
        if isinstance(error, sqlite3.OperationalError):
            raise error
        log.warning("%s is damaged and begun anew, without the signatures of the last minutes: %s", self._path, error)
        self._database.close()
        for end in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + end).unlink(missing_ok=True)
        self._open()

    def _add(self, r: int) -> bool:
        now = time.time()
        if now - self._cleaned > KEPT_S:
            self._database.execute("DELETE FROM taken WHERE at < ?", [now - KEPT_S])
            self._cleaned = now
        return self._database.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", [f"{r:x}", now]).rowcount == 1


def mend(module: Any, signatures: Signatures) -> None:
    """Have Flower's `module` take a signed request once, and give up what a node had begun to send before it started.

    Raises:
        Refused: the module is not the one that this was written for.
    """
    from fastapi import HTTPException
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    authenticate: Callable[[Any], None] | None = getattr(module, AUTHENTICATE, None)
    if not callable(authenticate):
        raise Refused(
            f"this version of Flower has no {AUTHENTICATE}: SuperLink does not start",
            "install the version of flwr that polyclinic asks for",
        )

    sending: dict[int, str] = {}  # node: its newest reply; it sends one after the other

    def once(request: Any) -> None:
        authenticate(request)
        public_key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
        state = module.get_linkstate(request)
        if (node := state.get_node_id_by_public_key(public_key)) is None:
            return  # a stranger asks to be let in, and Flower refuses; nothing of theirs is kept
        try:
            first = signatures.take(b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER]))
        except sqlite3.Error as error:
            log.warning("no request can be taken, since its signature cannot be kept: %s", error)
            raise HTTPException(LATER, "not now") from error
        if not first:
            key = bytes_to_public_key(public_key)
            whose = fingerprint(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
            log.warning("a request of the site with the key %s came a second time and was refused", whose)
            raise HTTPException(LATER, "a request is taken once")
        what = request.state.protobuf_request
        if isinstance(what, PushMessagesRequest) and what.messages_list:
            sending[node] = what.messages_list[0].metadata.message_id
        elif isinstance(what, ActivateNodeRequest) and node in sending:
            give_up(state, sending.pop(node))

    setattr(module, AUTHENTICATE, once)


def give_up(state: Any, reply: str) -> None:
    """Have Flower's `state` wait no longer for the parts of a reply that have not come.

    By the reply's own number: its row is gone as soon as the ServerApp has asked for it.
    """
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot

    with state.session() as session:
        begun = session.query(ObjectPushSessionRoot.session_id).filter(ObjectPushSessionRoot.root_object_id == reply)
        open_still = session.query(ObjectPushSession).filter(ObjectPushSession.session_id.in_(begun))
        ended = open_still.update({"expires_at": now() - timedelta(seconds=1)}, synchronize_session=False)
    if ended:
        log.warning("a node has started anew while it was sending a reply: it will be asked again")


if __name__ == "__main__":
    main()
