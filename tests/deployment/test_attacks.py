"""Who is not enrolled, or not who they say, or sends rubbish, gets nothing from the coordinator; the others go on."""

import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import Message

from polyclinic_server import pki
from polyclinic_server.home import Home

from .consortium import SITES, Consortium, healthy
from .processes import until

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(600)]


def key_of(consortium: Consortium, site: str) -> ec.EllipticCurvePrivateKey:
    key = load_ssh_private_key((consortium.folder / site / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def ask(
    consortium: Consortium,
    path: str,
    content: Message | bytes,
    key: ec.EllipticCurvePrivateKey,
    ago: timedelta = timedelta(),
    signed: ec.EllipticCurvePrivateKey | None = None,
) -> httpx.Response:
    """A fleet request as Flower's node makes it, with the public key of `key`, signed `ago` by `signed` (or `key`)."""
    return send(consortium, path, content, headers_of(key, ago, signed))


def headers_of(
    key: ec.EllipticCurvePrivateKey, ago: timedelta = timedelta(), signed: ec.EllipticCurvePrivateKey | None = None
) -> dict[str, str]:
    when = (datetime.now(UTC) - ago).isoformat()
    return {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": when,
        "flwr-signature": b64encode(sign_message(signed or key, when.encode())).decode(),
    }


def send(consortium: Consortium, path: str, content: Message | bytes, headers: dict[str, str]) -> httpx.Response:
    body = content if isinstance(content, bytes) else content.SerializeToString()
    trusted = ssl.create_default_context(cafile=str(consortium.home / "authority.crt"))
    url = f"https://127.0.0.1:{consortium.port}/v1/fleet/{path}"
    return httpx.post(url, content=body, headers=headers, verify=trusted, timeout=20)


@pytest.fixture(scope="module")
def node(consortium: Consortium) -> int:
    """Flower's number of alpha."""
    return int(until(lambda: Home(consortium.home).sites()["alpha"].node, 60, "registration"))


def test_an_enrolled_key_is_answered(consortium: Consortium, node: int) -> None:
    """Or what follows would show nothing."""
    answer = ask(consortium, "pull-messages", PullMessagesRequest(node=Node(node_id=node)), key_of(consortium, "alpha"))
    assert answer.status_code == 200, answer.text


def test_a_key_that_nobody_enrolled(consortium: Consortium, node: int) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(stranger.public_key())
    asked = PullMessagesRequest(node=Node(node_id=node))
    assert ask(consortium, "pull-messages", asked, stranger).status_code == 401
    for path, content in [
        ("register-node", RegisterNodeFleetRequest(public_key=public)),
        ("activate-node", ActivateNodeRequest(public_key=public, heartbeat_interval=30)),
    ]:
        assert not ask(consortium, path, content, stranger).is_success


def test_a_site_cannot_speak_for_another(consortium: Consortium, node: int) -> None:
    alpha, beta = key_of(consortium, "alpha"), key_of(consortium, "beta")
    asked = PullMessagesRequest(node=Node(node_id=node))
    assert ask(consortium, "pull-messages", asked, beta).status_code == 401
    assert ask(consortium, "pull-messages", asked, alpha, signed=beta).status_code == 401


@pytest.mark.parametrize("minutes", [10, -10])
def test_a_request_signed_ten_minutes_from_now_is_refused(consortium: Consortium, node: int, minutes: int) -> None:
    """A recorded request that is sent again late, or a site whose clock is wrong; `site doctor` tells which."""
    asked = PullMessagesRequest(node=Node(node_id=node))
    answer = ask(consortium, "pull-messages", asked, key_of(consortium, "alpha"), timedelta(minutes=minutes))
    assert answer.status_code == 401


def test_a_recorded_request_counts_once(consortium: Consortium, node: int) -> None:
    """Flower's node signs the time alone: with a recorded request, others could fetch and answer a site's messages."""
    headers, asked = headers_of(key_of(consortium, "alpha")), PullMessagesRequest(node=Node(node_id=node))
    assert send(consortium, "pull-messages", asked, headers).status_code == 200
    assert send(consortium, "pull-messages", asked, headers).status_code == 503
    other = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=1e6)
    assert send(consortium, "send-node-heartbeat", other, headers).status_code == 503
    told = f"the site with the key {consortium.fingerprint('alpha')} came a second time and was refused"
    assert consortium.log("coordinator").count(told) == 2
    assert ask(consortium, "pull-messages", asked, key_of(consortium, "alpha")).status_code == 200


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000, b"\x0a\xff\xff\xff\xff\x0f", bytes(10**6)])
@pytest.mark.parametrize("path", ["pull-messages", "push-messages", "push-object", "activate-node"])
def test_rubbish_is_refused_and_the_coordinator_lives(consortium: Consortium, path: str, content: bytes) -> None:
    assert not ask(consortium, path, content, ec.generate_private_key(ec.SECP384R1())).is_success
    assert healthy(consortium)


def test_connections_that_say_nothing_are_closed_and_hold_up_nobody(consortium: Consortium) -> None:
    trusted = ssl.create_default_context(cafile=str(consortium.home / "authority.crt"))
    slow = []
    for _ in range(60):
        plain = socket.create_connection(("127.0.0.1", consortium.port), timeout=30)
        slow.append(trusted.wrap_socket(plain, server_hostname="127.0.0.1"))
    try:
        began = time.monotonic()
        for connection in slow:
            connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        while slow and time.monotonic() - began < 40:
            for connection in list(slow):
                with suppress(TimeoutError):
                    connection.settimeout(0.01)
                    try:
                        closed = connection.recv(1 << 16) == b""
                    except (ConnectionError, ssl.SSLError):
                        closed = True
                    if closed:
                        connection.close()
                        slow.remove(connection)
        assert not slow
        assert time.monotonic() - began < 30  # however slowly a header comes, it has ten seconds
        assert healthy(consortium)
    finally:
        for connection in slow:
            connection.close()


def test_a_site_does_not_speak_to_a_coordinator_of_another_authority(consortium: Consortium) -> None:
    """Someone in between who has a certificate, and not from the authority that the site was given."""
    folder = consortium.folder
    consortium.command("coordinator", "init", "--address", "127.0.0.1:9", "--home", "other")
    consortium.command("site", "init", "--name", "astray", "--data", folder / "images" / "alpha", "--home", "astray")
    consortium.command(
        "coordinator",
        "enrol",
        "astray/request.json",
        "--fingerprint",
        consortium.fingerprint("astray"),
        "--home",
        "other",
    )
    consortium.command("site", "join", "join-astray.json", "--home", "astray")
    joined = folder / "astray" / "join.json"
    joined.write_text(joined.read_text().replace('"127.0.0.1:9"', f'"127.0.0.1:{consortium.port}"'))
    consortium.start("astray")
    until(lambda: "CERTIFICATE_VERIFY_FAILED" in consortium.log("astray"), 60, "a refusal")
    assert consortium.stop("astray") == 0
    assert healthy(consortium)


def test_with_an_expired_certificate_nobody_speaks_until_it_is_renewed(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, own = consortium.home, Home(consortium.home)
    consortium.stop("coordinator")
    with monkeypatch.context() as changed:
        changed.setattr(pki, "SERVER_DAYS", -0.01)  # a quarter of an hour ago
        key, certificate = pki.make_server(
            (home / "authority.key").read_bytes(), (home / "authority.crt").read_bytes(), "late", own.settings.hosts
        )
    (home / "server.key").write_bytes(key)
    (home / "server.crt").write_bytes(certificate)
    try:
        told = [telling(consortium, site, "certificate has expired") for site in SITES]
        consortium.start("coordinator")
        until(lambda: all(tells() for tells in told), 90, "a refusal")
        assert not healthy(consortium)
        said = consortium.command("site", "doctor", "--home", "alpha", code=1)
        assert "certificate has expired" in said
        assert "ask the coordinator to renew its certificate" in said
        assert "-1 days" in consortium.command("coordinator", "status")
    finally:
        consortium.command("coordinator", "renew")
        consortium.stop("coordinator")
        told = [telling(consortium, site, "holds again", "SuperNode ID") for site in SITES]
        consortium.start("coordinator")
    until(lambda: healthy(consortium), 60, "the gateway")
    until(lambda: all(tells() for tells in told), 90, "all, by themselves")


def telling(consortium: Consortium, site: str, *words: str) -> Callable[[], bool]:
    """Whether, from now on, a site's SuperNode has told one of these."""
    path = consortium.folder / site / "logs" / "supernode.log"
    before = path.stat().st_size
    return lambda: any(word in path.read_bytes()[before:].decode(errors="replace") for word in words)
