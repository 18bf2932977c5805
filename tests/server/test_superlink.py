"""SuperLink takes a signed request once, and gives up what a node was sending when it starts anew."""

import contextlib
import logging
import sqlite3
import time
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message, verify_signature
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet import node_auth

from polyclinic.enrolment import fingerprint
from polyclinic.errors import Refused
from polyclinic_server import superlink
from polyclinic_server.superlink import AUTHENTICATE, Signatures, mend

ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", base=16)
"""Of the curve P-384."""
KEY = ec.generate_private_key(ec.SECP384R1())
WHEN = b"2026-01-01T00:00:00+00:00"


def asked(signature: bytes, what: Any = None) -> Any:
    public = b64encode(public_key_to_bytes(KEY.public_key())).decode()
    return SimpleNamespace(
        headers={"flwr-public-key": public, "flwr-signature": b64encode(signature).decode(), "flwr-timestamp": "now"},
        state=SimpleNamespace(protobuf_request=what),
    )


def mended(
    path: Path, authenticate: Any = lambda request: None, node: int | None = 7, session: Any = contextlib.nullcontext
) -> Any:
    found = {public_key_to_bytes(KEY.public_key()): node}.get
    state = SimpleNamespace(get_node_id_by_public_key=found, session=session)
    module = SimpleNamespace(**{AUTHENTICATE: authenticate, "get_linkstate": lambda request: state})
    mend(module, Signatures(path / "signatures.db"))
    return module.authenticate_node


def test_the_hook_still_bites() -> None:
    assert AUTHENTICATE in node_auth.NodeAuthMiddleware.dispatch.__code__.co_names
    assert callable(node_auth.get_linkstate)
    with pytest.raises(Refused, match="has no authenticate_node"):
        mend(SimpleNamespace(), None)  # type: ignore[arg-type]


def test_a_request_is_taken_once_and_a_second_by_name_never(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = sign_message(KEY, WHEN), sign_message(KEY, WHEN)
    authenticate = mended(tmp_path)
    authenticate(asked(one))
    authenticate(asked(other))  # signed in the same microsecond
    with pytest.raises(HTTPException) as refusal:
        authenticate(asked(one))
    assert refusal.value.status_code == 503  # after a 401, the site's own node would end if it came second
    (told,) = caplog.messages
    whose = fingerprint(KEY.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    assert told == f"a request of the site with the key {whose} came a second time and was refused"
    with pytest.raises(HTTPException):
        mended(tmp_path)(asked(other))  # started again


def test_the_twin_of_a_signature_is_the_same_request(tmp_path: Path) -> None:
    signature = sign_message(KEY, WHEN)
    r, s = decode_dss_signature(signature)
    twin = encode_dss_signature(r, ORDER - s)
    assert twin != signature
    assert verify_signature(KEY.public_key(), WHEN, twin)
    authenticate = mended(tmp_path)
    authenticate(asked(signature))
    with pytest.raises(HTTPException):
        authenticate(asked(twin))


def test_what_flower_refuses_is_not_remembered(tmp_path: Path) -> None:
    def refuse(request: Any) -> None:
        raise HTTPException(401)

    signature = sign_message(KEY, WHEN)
    with pytest.raises(HTTPException):
        mended(tmp_path, refuse)(asked(signature))
    mended(tmp_path)(asked(signature))  # nobody can use up another's signature


@pytest.mark.filterwarnings("ignore:No path_separator")  # of Alembic, in Flower
@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_what_a_node_was_sending_when_it_started_anew_is_given_up(
    whose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flower's own SuperLink waits three minutes for the rest: here one sees it wait, and then no longer."""
    database = str(tmp_path / "state.db")
    state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
    session = state.start_session(1)
    reply = ObjectTree(object_id="a" * 64)
    assert state.preregister_object_tree(reply, session) == [reply.object_id]
    message = reply.object_id if whose == "its own" else "b" * 64
    authenticate = mended(tmp_path, session=state.session)  # type: ignore[attr-defined]
    pushed = PushMessagesRequest(messages_list=[Message(metadata=Metadata(message_id=message))])
    authenticate(asked(sign_message(KEY, WHEN), pushed))
    assert state.get_object(1, reply.object_id) == b""  # waited for
    authenticate(asked(sign_message(KEY, WHEN), ActivateNodeRequest()))
    if whose == "another's":
        assert state.get_object(1, reply.object_id) == b""
    else:
        assert state.get_object(1, reply.object_id) is None  # unknown: who asks for it learns that it is lost
        assert not state.store_object(1, session, reply.object_id, b"late")
    assert ("will be asked again" in caplog.text) == (whose == "its own")


def test_nothing_of_a_stranger_is_kept(tmp_path: Path) -> None:
    """Who asks to be let in signs with a key of their own: they could fill the disk."""
    mended(tmp_path, node=None)(asked(sign_message(KEY, WHEN)))
    with sqlite3.connect(tmp_path / "signatures.db") as database:
        assert database.execute("SELECT COUNT(*) FROM taken").fetchone() == (0,)


@pytest.mark.parametrize("damage", ["header", "page", "folder of other things"])
def test_a_damaged_file_is_begun_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "signatures.db"
    signatures = Signatures(path)
    while path.stat().st_size < 20_000:
        signatures.take(sign_message(KEY, WHEN))
        signatures._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    signatures._database.close()
    content = bytearray(path.read_bytes())
    start = 0 if damage == "header" else 4096
    content[start : start + 4096] = b"x" * 4096
    path.write_bytes(content if damage != "folder of other things" else b"no database")
    again = Signatures(path)
    for _ in range(50):
        assert again.take(sign_message(KEY, WHEN))
    assert "is damaged and begun anew" in caplog.text


def test_a_file_that_cannot_be_opened_now_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "signatures.db"
    path.mkdir()
    with pytest.raises(sqlite3.OperationalError):
        Signatures(path)
    assert path.exists()


def test_signatures_are_forgotten_when_their_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "signatures.db"
    Signatures(path).take(sign_message(KEY, WHEN))
    monkeypatch.setattr(superlink, "time", SimpleNamespace(time=lambda: time.time() + 2 * superlink.KEPT_S))
    again = Signatures(path)
    again.take(sign_message(KEY, WHEN))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT COUNT(*) FROM taken").fetchone() == (1,)


def test_where_it_cannot_be_remembered_a_request_is_put_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authenticate = mended(tmp_path)
    with sqlite3.connect(tmp_path / "signatures.db") as database:
        database.execute("DROP TABLE taken")
    with caplog.at_level(logging.WARNING), pytest.raises(HTTPException) as refusal:
        authenticate(asked(sign_message(KEY, WHEN)))
    assert refusal.value.status_code == 503
    assert "cannot be kept" in caplog.text
