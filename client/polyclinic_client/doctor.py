"""`polyclinic site doctor`: whether this site can take part, check by check, each with what to do about it.

Every check looks at one thing and trusts none of the others; those of the network go from the name of the coordinator
outwards, and the first that fails names the layer that fails.
"""

import http.client
import os
import shutil
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from polyclinic.enrolment import Join, Request, fingerprint, read_file
from polyclinic.errors import PolyclinicError
from polyclinic_client.hospital import Hospital

DISK_GB, MEMORY_GB = 10.0, 4.0
"""Below which a site is warned."""
CLOCK_WARN_S, CLOCK_FAIL_S = 60.0, 300.0
"""Flower refuses what is signed by a clock that is off by more than five minutes."""
EXPIRY_DAYS = 30
NETWORK_S = 10.0

Level = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do where that is not well."""

    check: str
    level: Level
    found: str
    fix: str = ""


Check = Callable[[Hospital], Finding]


def examine(path: Path) -> Iterator[Finding]:
    """All findings about the site in a folder, as they are made."""
    try:
        hospital = Hospital(path)
    except PolyclinicError as error:
        yield Finding("configuration", "FAIL", error.problem, error.fix)
        return
    yield Finding("configuration", "PASS", f"site {hospital.name}")
    for name, check in CHECKS.items():
        try:
            yield check(hospital)
        except PolyclinicError as error:
            yield Finding(name, "FAIL", error.problem, error.fix)
        except OSError as error:
            yield Finding(name, "FAIL", f"cannot be checked: {error.strerror}", "see who may read the site's folder")
    try:
        yield from _network(hospital)
    except PolyclinicError as error:
        yield Finding("answer", "FAIL", error.problem, error.fix)


def _data(hospital: Hospital) -> Finding:
    data = Path(hospital.settings.data)
    if not data.exists() or not os.access(data, os.R_OK):
        return Finding("data", "FAIL", f"{data} cannot be read", "mount it, or correct `data` in site.toml")
    if os.access(data, os.W_OK):
        return Finding(
            "data", "WARN", f"{data} could be written to", "mount it read-only: Polyclinic never writes there"
        )
    return Finding("data", "PASS", f"{data} can be read and not written to")


def _decoders(hospital: Hospital) -> Finding:
    """From the cohorts that were built: which files no decoder could read, by transfer syntax."""
    missing: Counter[str] = Counter()
    lists = list((hospital.path / "state" / "cohorts").glob("*/quarantine.csv"))
    for path in lists:
        table = pd.read_csv(path, keep_default_na=False)
        missing.update(table.loc[table["reason"] == "no_decoder", "transfer_syntax"])
    if not lists:
        return Finding(
            "decoders", "WARN", "no images have been read yet", "approve a study, or `polyclinic cohort inspect`"
        )
    if missing:
        named = ", ".join(f"{count} files of {syntax or 'an unknown kind'}" for syntax, count in missing.items())
        return Finding(
            "decoders", "WARN", f"no decoder for {named}", "install the extra gpl-decoders, or leave them out"
        )
    return Finding("decoders", "PASS", "every kind of file that was found can be decoded")


def _disk(hospital: Hospital) -> Finding:
    free = shutil.disk_usage(hospital.path).free / 1e9
    if free < DISK_GB:
        return Finding("disk", "WARN", f"{free:.1f} GB free", f"free {DISK_GB:.0f} GB where the site's folder is")
    return Finding("disk", "PASS", f"{free:.0f} GB free")


def _memory(hospital: Hospital) -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9
    except OSError:
        return Finding("memory", "WARN", "cannot be told on this system", f"see that {MEMORY_GB:.0f} GB are free")
    if free < MEMORY_GB:
        return Finding("memory", "WARN", f"{free:.1f} GB free", f"training wants {MEMORY_GB:.0f} GB or more")
    return Finding("memory", "PASS", f"{free:.0f} GB free, {os.cpu_count()} processors")


def _key(hospital: Hospital) -> Finding:
    path = hospital.path / "node.key"
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding("key", "FAIL", f"node.key may be read by others (mode {mode:o})", f"chmod 600 {path}")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except ValueError:
        return Finding("key", "FAIL", "node.key is no private key", "restore it from a backup, or make the site anew")
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    own = fingerprint(key.public_key().public_bytes(*form).decode())
    if own != read_file(hospital.path / "request.json", Request).fingerprint:
        return Finding("key", "FAIL", "node.key is not the one of request.json", "restore both from one backup")
    return Finding("key", "PASS", own)


def _ledger(hospital: Hospital) -> Finding:
    return Finding("ledger", "PASS", f"{hospital.ledger.verify()} entries, each after the one before")


def _studies(hospital: Hospital) -> Finding:
    found = len(list((hospital.path / "approved").glob("*.json")))
    if not found:
        return Finding("studies", "WARN", "none is approved", "polyclinic site approve study.toml")
    return Finding("studies", "PASS", f"{found} approved")


CHECKS: dict[str, Check] = {
    "data": _data,
    "decoders": _decoders,
    "disk": _disk,
    "memory": _memory,
    "key": _key,
    "ledger": _ledger,
    "studies": _studies,
}


def _network(hospital: Hospital) -> Iterator[Finding]:
    """From the coordinator's answer to an answer of the coordinator; ends with the first that fails."""
    joined = hospital.joined
    if joined is None:
        yield Finding("answer", "FAIL", "the coordinator has not answered yet", "polyclinic site join join-NAME.json")
        return
    yield Finding("answer", "PASS", f"{joined.coordinator} at {joined.address}")
    host, _, port = joined.address.rpartition(":")
    host = host.strip("[]")
    steps = (partial(_name, host), partial(_tcp, host, int(port)), partial(_tls, host, int(port), joined))
    for step in steps:
        finding = step()
        yield finding
        if finding.level == "FAIL":
            return
    yield from _answers(host, int(port), joined)


def _name(host: str) -> Finding:
    try:
        found = sorted({info[4][0] for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        return Finding(
            "DNS", "FAIL", f"{host} has no address: {error.strerror}", "ask the network team, or the coordinator"
        )
    return Finding("DNS", "PASS", f"{host} is {', '.join(map(str, found))}")


def _tcp(host: str, port: int) -> Finding:
    try:
        socket.create_connection((host, port), NETWORK_S).close()
    except OSError as error:
        fix = f"let this machine connect to {host} port {port}: see `polyclinic site firewall`"
        return Finding("TCP", "FAIL", f"no connection to {host}:{port}: {error.strerror or error}", fix)
    return Finding("TCP", "PASS", f"{host}:{port} is open")


def _tls(host: str, port: int, joined: Join) -> Finding:
    """Whether the certificate is one of the coordinator's authority, and how long it lasts."""
    trusting = ssl.create_default_context(cadata=joined.authority)
    try:
        with (
            socket.create_connection((host, port), NETWORK_S) as raw,
            trusting.wrap_socket(raw, server_hostname=host) as safe,
        ):
            certificate = x509.load_der_x509_certificate(safe.getpeercert(binary_form=True) or b"")
    except ssl.SSLCertVerificationError as error:
        issuer = _issuer(host, port)
        ours = x509.load_pem_x509_certificate(joined.authority.encode()).subject.rfc4514_string()
        if issuer and issuer != ours:
            fix = "have the network team let this connection through untouched: the proxy could read and change it"
            return Finding("TLS", "FAIL", f"the certificate is by {issuer}: something intercepts TLS", fix)
        return Finding("TLS", "FAIL", error.verify_message, "ask the coordinator to renew its certificate")
    except (ssl.SSLError, OSError) as error:
        return Finding("TLS", "FAIL", f"no TLS: {error}", "ask the coordinator whether its gateway runs")
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if days < EXPIRY_DAYS:
        return Finding("TLS", "WARN", f"the certificate expires in {days} days", "ask the coordinator to renew it")
    return Finding("TLS", "PASS", f"the coordinator's own certificate, {days} days left")


def _issuer(host: str, port: int) -> str:
    """Whose certificate it is that is shown, trusted or not."""
    try:
        shown = ssl.get_server_certificate((host, port), timeout=NETWORK_S)
        return x509.load_pem_x509_certificate(shown.encode()).issuer.rfc4514_string()
    except (OSError, ValueError):
        return ""


def _answers(host: str, port: int, joined: Join) -> Iterator[Finding]:
    """Whether the gateway answers, and what time it is there."""
    context = ssl.create_default_context(cadata=joined.authority)
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=NETWORK_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        there = parsedate_to_datetime(answer.headers["Date"])
    except (OSError, TypeError, ValueError, http.client.HTTPException) as error:
        yield Finding("gateway", "FAIL", f"no answer: {error}", "ask the coordinator whether it runs")
        return
    finally:
        connection.close()
    if answer.status != 200:
        fix = "ask the coordinator whether SuperLink runs"
        yield Finding("gateway", "FAIL", f"it answers {answer.status}", fix)
        return
    yield Finding("gateway", "PASS", "it answers")
    off = (datetime.now(UTC) - there).total_seconds()
    level: Level = "FAIL" if abs(off) > CLOCK_FAIL_S else "WARN" if abs(off) > CLOCK_WARN_S else "PASS"
    said = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the coordinator's"
    yield Finding("clock", level, said, "" if level == "PASS" else "let this machine's clock be set by NTP")


def firewall_note(joined: Join) -> str:
    """One page for the firewall team."""
    host, _, port = joined.address.rpartition(":")
    return f"""\
What this machine needs of the network
======================================

One rule: outbound TCP to {host} port {port}. Nothing inbound.

Why         Polyclinic trains a model across hospitals. This machine asks the coordinator for work and sends back
            changes of the model's weights and a fixed list of figures. Images, names and file headers stay here;
            every answer is listed: polyclinic site ledger show --csv.
How         HTTPS (TLS 1.2 or later), requests every few seconds, up to some hundred MB a training round.
Who         The other end shows a certificate of the coordinator's own authority, which this machine checks. A proxy
            that opens TLS and closes it again would break that check, as it is meant to: let the connection pass.
Without it  The site takes no part; nothing else here is affected.
"""
