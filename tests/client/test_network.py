"""The way to the coordinator: through a forward proxy where the environment names one, as Flower's node goes."""

import base64
import http.server
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join
from polyclinic_client.network import Way, certificate_days, direct_to_loopback, proxy_to
from polyclinic_server.pki import make_authority, make_server

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
KEY, AUTHORITY = make_authority("consortium")
COORDINATOR = "coordinator.invalid"
"""A name that only the proxy knows."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own settings are left out."""
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme.upper()}_PROXY", raising=False)


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Gateway(Quiet):
    def do_GET(self) -> None:
        self.send_response(200)  # with a Date
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()


class Proxy(Quiet):
    """Opens tunnels to the gateway, for who knows the password; notes for whom."""

    gateway = 0
    asked: ClassVar[list[str]] = []
    login = ""

    def do_CONNECT(self) -> None:
        if self.login and self.headers.get("Proxy-Authorization") != self.login:
            self.send_error(407)
            return
        self.asked.append(self.path)
        with closing(socket.create_connection(("127.0.0.1", self.gateway))) as there:
            self.send_response(200)
            self.end_headers()
            ends = [self.connection, there]
            while True:
                ready, _, _ = select.select(ends, [], [], 10)
                for end in ready:
                    if not (data := end.recv(65536)):
                        return
                    ends[1 - ends.index(end)].sendall(data)
                if not ready:
                    return


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[type[Proxy]]:
    """A proxy class whose `port` is that of a running one, before a gateway with the coordinator's certificate."""
    key, certificate = make_server(KEY, AUTHORITY, "consortium", [COORDINATOR])
    (tmp_path / "s.key").write_bytes(key)
    (tmp_path / "s.crt").write_bytes(certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "s.crt", tmp_path / "s.key")
    gateway = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    gateway.socket = context.wrap_socket(gateway.socket, server_side=True)
    made = type("Made", (Proxy,), {"gateway": gateway.server_address[1], "asked": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    made.port = running.server_address[1]  # type: ignore[attr-defined]
    for server in (gateway, running):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    for server in (running, gateway):
        server.shutdown()
        server.server_close()


def way(port: int = 443) -> Way:
    address, authority = f"{COORDINATOR}:{port}", AUTHORITY.decode()
    return Way(Join(name="n", coordinator="c", address=address, authority=authority, bundle=bundle_hash()))


def test_without_a_proxy_the_name_must_be_known_here() -> None:
    found = list(way().check())
    assert [finding.check for finding in found] == ["answer", "DNS"]
    assert "behind a forward proxy, set HTTPS_PROXY" in found[-1].fix


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_the_doctor_goes_through_the_proxy(name: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    found = {finding.check: finding for finding in way().check()}
    assert list(found) == ["answer", "proxy", "TLS", "gateway", "clock"]
    assert {finding.level for finding in found.values()} == {"PASS"}
    assert set(proxy.asked) == {f"{COORDINATOR}:443"}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_flowers_node_goes_through_the_same_proxy(name: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment that the agent gives it: should Flower take another HTTP client, this tells."""
    monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    for key, value in direct_to_loopback().items():
        monkeypatch.setenv(key, value)
    address = f"{COORDINATOR}:443"
    with FleetHttpClient.from_server_address(address, False, AUTHORITY, []) as node:
        node.ActivateNode(ActivateNodeRequest())
    assert proxy.asked == [address]


def test_the_node_speaks_to_its_own_programs_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server = http.server.HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(httpx.ConnectError), httpx.Client() as client:
            client.get(url)
        for key, value in direct_to_loopback().items():
            monkeypatch.setenv(key, value)
        with httpx.Client() as client:
            assert client.get(url).status_code == 200
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_site_exempts_stays_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", ".example.org")
    assert direct_to_loopback()["NO_PROXY"] == direct_to_loopback()["no_proxy"] == ".example.org,127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("host", "exempt", "direct"),
    [
        ("c.example.org", "", False),
        ("c.example.org", "example.org", True),
        ("c.example.org", "other.org, .example.org", True),
        ("C.Example.Org", "c.example.org", True),
        ("notexample.org", "example.org", False),
        ("c.example.org", "other.org,*", True),
        ("localhost", "", True),
        ("127.0.0.1", "", True),
    ],
)
def test_which_hosts_are_reached_directly(
    host: str, exempt: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "proxy.local:3128")
    monkeypatch.setenv("NO_PROXY", exempt)
    found = proxy_to(host)
    assert (found is None) == direct
    if found is not None:
        assert (found.scheme, found.hostname, found.port) == ("http", "proxy.local", 3128)


@pytest.mark.parametrize(("password", "level"), [("p%40ss", "PASS"), ("wrong", "FAIL")])
def test_a_proxy_with_a_password(password: str, level: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.login = "Basic " + base64.b64encode(b"north:p@ss").decode()
    monkeypatch.setenv("HTTPS_PROXY", f"http://north:{password}@127.0.0.1:{proxy.port}")
    found = {finding.check: finding for finding in way().check()}
    assert found["proxy"].level == level
    if level == "FAIL":
        assert list(found)[-1] == "proxy"
        assert "407" in found["proxy"].found
        assert f"allow CONNECT to {COORDINATOR}:443" in found["proxy"].fix
    assert not any(word in str(found) for word in (password, "p@ss", "north"))


@pytest.mark.parametrize(
    ("place", "says"),
    [("http://127.0.0.1:1", "opens no way"), ("socks5://127.0.0.1:1", "a proxy of the kind socks5")],
)
def test_a_proxy_that_does_not_work(place: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", place)
    found = list(way().check())
    assert [finding.check for finding in found] == ["answer", "proxy"]
    assert says in found[-1].found


def test_a_server_that_is_no_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet() -> None:
        with server.accept()[0] as caller:
            caller.sendall(b"220 mail\r\n")

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        threading.Thread(target=greet, daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        found = list(way().check())[-1]
    assert found.check == "proxy"
    assert "no HTTP proxy" in found.found


def test_days_of_a_certificate() -> None:
    assert certificate_days(AUTHORITY.decode()) == 3649
