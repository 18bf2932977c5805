"""From this machine to an answer of the coordinator, layer by layer: proxy, name, port, TLS, gateway, clock.

Flower's node speaks HTTPS through httpx, which takes a forward proxy from HTTPS_PROXY (or https_proxy, which wins, or
ALL_PROXY) and leaves out the hosts of NO_PROXY; what is checked here goes the same way.
"""

import base64
import http.client
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies

from cryptography import x509

from polyclinic.enrolment import Join
from polyclinic_client.findings import Finding, Level

CLOCK_WARN_S, CLOCK_FAIL_S = 60.0, 300.0
"""Flower refuses what is signed by a clock that is off by more than five minutes."""
EXPIRY_DAYS = 30
"""Below which a certificate's days are a warning."""
NETWORK_S = 10.0
"""For which each step is waited for."""
LOOPBACK = ("127.0.0.1", "localhost")


def direct_to_loopback() -> dict[str, str]:
    """The environment in which SuperNode and the program that it starts speak to each other without the proxy."""
    exempt = ",".join(filter(None, [getproxies().get("no", ""), *LOOPBACK]))
    return {"no_proxy": exempt, "NO_PROXY": exempt}


def proxy_to(host: str) -> SplitResult | None:
    """The forward proxy by which the node reaches a host; None: it connects directly."""
    found = getproxies()
    names = [name.strip().lstrip(".").lower() for name in (*found.get("no", "").split(","), *LOOPBACK)]
    exempt = any(name in ("*", host.lower()) or host.lower().endswith(f".{name}") for name in names if name)
    place = "" if exempt else found.get("https") or found.get("all") or ""
    return urlsplit(place if "://" in place else f"http://{place}") if place else None


def certificate_days(pem: str) -> int:
    """Whole days until a certificate expires; negative once it has."""
    return _days(x509.load_pem_x509_certificate(pem.encode()))


@dataclass(frozen=True)
class Way:
    """The way to the coordinator that `joined` names."""

    joined: Join

    @property
    def host(self) -> str:
        """Without the brackets of an IPv6 address."""
        return self.joined.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of the gateway."""
        return int(self.joined.address.rpartition(":")[2])

    @cached_property
    def proxy(self) -> SplitResult | None:
        """As `proxy_to`."""
        return proxy_to(self.host)

    def check(self) -> Iterator[Finding]:
        """Findings up to the first layer that fails."""
        yield Finding("answer", "PASS", f"{self.joined.coordinator} at {self.joined.address}")
        steps = (self._proxied, self._tls) if self.proxy else (self._name, self._tcp, self._tls)
        for step in steps:
            finding = step()
            yield finding
            if finding.level == "FAIL":
                return
        yield from self._answers()

    def connect(self) -> socket.socket:
        """A connection to the gateway, through the proxy where there is one.

        Raises:
            OSError: there is none; the text holds no password.
        """
        if self.proxy is None:
            return socket.create_connection((self.host, self.port), NETWORK_S)
        tunnel = http.client.HTTPConnection(self.proxy.hostname or "", self.proxy.port or 80, timeout=NETWORK_S)
        headers = {}
        if self.proxy.username:
            login = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        tunnel.set_tunnel(f"[{self.host}]" if ":" in self.host else self.host, self.port, headers)
        try:
            tunnel.connect()
        except http.client.HTTPException as error:
            tunnel.close()
            raise OSError(f"it is no HTTP proxy: {type(error).__name__}") from error
        return tunnel.sock

    def _proxied(self) -> Finding:
        """Whether the proxy opens a tunnel (HTTP CONNECT), as the node asks it to."""
        assert self.proxy is not None
        name = f"{self.proxy.hostname}:{self.proxy.port or 80}"
        if self.proxy.scheme != "http":
            fix = "set HTTPS_PROXY=http://HOST:PORT: it still carries HTTPS, in a tunnel"
            return Finding("proxy", "FAIL", f"{name} is a proxy of the kind {self.proxy.scheme}", fix)
        try:
            self.connect().close()
        except (OSError, ValueError) as error:
            fix = f"have the proxy allow CONNECT to {self.host}:{self.port}, or name the host in NO_PROXY"
            return Finding("proxy", "FAIL", f"{name} opens no way to {self.joined.address}: {_said(error)}", fix)
        return Finding("proxy", "PASS", f"{name} opens a tunnel to {self.joined.address}; the node goes through it too")

    def _name(self) -> Finding:
        try:
            found = sorted({str(info[4][0]) for info in socket.getaddrinfo(self.host, None)})
        except OSError as error:
            fix = "ask the network team, or the coordinator; behind a forward proxy, set HTTPS_PROXY"
            return Finding("DNS", "FAIL", f"{self.host} has no address: {_said(error)}", fix)
        return Finding("DNS", "PASS", f"{self.host} is {', '.join(found)}")

    def _tcp(self) -> Finding:
        where = f"{self.host}:{self.port}"
        try:
            self.connect().close()
        except OSError as error:
            fix = f"let this machine connect to {self.host} port {self.port}: see `polyclinic site firewall`"
            return Finding("TCP", "FAIL", f"no connection to {where}: {_said(error)}", fix)
        return Finding("TCP", "PASS", f"{where} is open")

    def _tls(self) -> Finding:
        """Whether the certificate is one of the coordinator's authority, and how long it lasts."""
        try:
            certificate = self._shown(ssl.create_default_context(cadata=self.joined.authority))
        except ssl.SSLCertVerificationError as error:
            return self._untrusted(error)
        except (ssl.SSLError, OSError) as error:
            return Finding("TLS", "FAIL", f"no TLS: {_said(error)}", "ask the coordinator whether its gateway runs")
        days = _days(certificate)
        if days < EXPIRY_DAYS:
            return Finding("TLS", "WARN", f"the certificate expires in {days} days", "ask the coordinator to renew it")
        return Finding("TLS", "PASS", f"the coordinator's own certificate, {days} days left")

    def _shown(self, context: ssl.SSLContext) -> x509.Certificate:
        """The certificate that the other end shows."""
        with self.connect() as raw, context.wrap_socket(raw, server_hostname=self.host) as safe:
            return x509.load_der_x509_certificate(safe.getpeercert(binary_form=True) or b"")

    def _untrusted(self, error: ssl.SSLCertVerificationError) -> Finding:
        """A certificate that does not pass: by somebody else, or by the coordinator and still not right."""
        looking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        looking.check_hostname, looking.verify_mode = False, ssl.CERT_NONE  # to see it; nothing is sent
        try:
            issuer = self._shown(looking).issuer.rfc4514_string()
        except (OSError, ValueError):
            issuer = ""
        if issuer and issuer != x509.load_pem_x509_certificate(self.joined.authority.encode()).subject.rfc4514_string():
            fix = "have the network team let this connection through untouched: the proxy could read and change it"
            return Finding("TLS", "FAIL", f"the certificate is by {issuer}: something intercepts TLS", fix)
        fix = "ask the coordinator to renew its certificate"
        return Finding("TLS", "FAIL", f"the coordinator's own certificate, and not right: {error.verify_message}", fix)

    def _answers(self) -> Iterator[Finding]:
        """Whether the gateway answers, and what time it is there."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=NETWORK_S)
        try:
            context = ssl.create_default_context(cadata=self.joined.authority)
            connection.sock = context.wrap_socket(self.connect(), server_hostname=self.host)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            there = parsedate_to_datetime(answer.headers["Date"])
        except (OSError, TypeError, ValueError, http.client.HTTPException) as error:
            yield Finding("gateway", "FAIL", f"no answer: {_said(error)}", "ask the coordinator whether it runs")
            return
        finally:
            connection.close()
        if answer.status != 200:
            yield Finding(
                "gateway", "FAIL", f"it answers {answer.status}", "ask the coordinator whether SuperLink runs"
            )
            return
        yield Finding("gateway", "PASS", "it answers")
        off = (datetime.now(UTC) - there).total_seconds()
        level: Level = "FAIL" if abs(off) > CLOCK_FAIL_S else "WARN" if abs(off) > CLOCK_WARN_S else "PASS"
        said = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the coordinator's"
        yield Finding("clock", level, said, "" if level == "PASS" else "let this machine's clock be set by NTP")


def _days(certificate: x509.Certificate) -> int:
    return (certificate.not_valid_after_utc - datetime.now(UTC)).days


def _said(error: Exception) -> str:
    """An error in the system's words, or its own."""
    return str(getattr(error, "strerror", None) or error)
