"""What there is to know of a coordinator: the one source of `coordinator status`, the page and the metrics."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from polyclinic import __version__
from polyclinic.errors import PolyclinicError
from polyclinic_server.home import CONNECTION, Enrolled, Home
from polyclinic_server.pki import days_left
from polyclinic_server.progress import Part, Records, Run, part, progress, records
from polyclinic_server.supervisor import flower

ASK_S = 15.0
"""For which Flower's list of nodes is believed: to ask for it takes a process and seconds."""
CLOCK_S, SHUT_OUT_S = 5.0, 305
"""By which a site's clock may be off before that is said, and before Flower lets its node in no more."""
EXPIRES_DAYS = 30
"""Before a certificate's end, when that is said."""


@dataclass(frozen=True)
class Site(Part):
    """An enrolled site.

    Attributes:
        state: enrolled, registered (SuperLink knows its key) or revoked.
        online: as Flower sees it, which takes a minute to miss a node; None where it is not known.
        last_seen: when it was missed, UTC.
    """

    state: str
    online: bool | None
    last_seen: str | None

    @property
    def presence(self) -> str:
        """`state` and `online` in words."""
        if self.state != "registered" or self.online is None:
            return "unknown" if self.state == "registered" else self.state
        gone = f"gone {self.last_seen[5:16]}" if self.last_seen else "not seen yet"
        return "online" if self.online else gone

    @property
    def clock_is_off(self) -> bool:
        return abs(self.clock_ahead_s or 0.0) > CLOCK_S


@dataclass(frozen=True)
class Overview:
    """A coordinator; `run` is the one launched last, `notes` are what somebody should see to."""

    name: str
    address: str
    version: str
    page: str
    certificate_days: int
    superlink: bool
    sites: dict[str, Site]
    run: Run | None
    notes: list[str]


def overview(home: Home) -> Overview:
    """All of it as it is now; of nodes, as it was ASK_S ago at most."""
    settings, up, path, run, notes = home.settings, superlink_is_up(home), home.latest, None, []
    if not up:
        notes.append("SuperLink does not answer: polyclinic coordinator start, or see logs/superlink.log")
    if (days := days_left((home.path / "server.crt").read_bytes())) < EXPIRES_DAYS:
        notes.append(f"the certificate ends in {days} days: polyclinic coordinator renew")
    nodes = _nodes(home.path, int(time.monotonic() // ASK_S)) if up else {}
    found = records(path) if path else Records([], {}, {})
    sites = {name: _site(site, nodes.get(site.node, {}), found) for name, site in home.sites().items()}
    try:
        run = progress(path) if path else None
    except PolyclinicError as error:
        notes.append(f"the last run cannot be read: {error.problem}")
    if run and not run.ended:
        notes += [note for name, site in sites.items() if site.state != "revoked" for note in _notes(name, site)]
        run = run if up else replace(run, state="waiting", at_work=None, left_s=None)
    return Overview(settings.name, settings.address, __version__, settings.page, days, up, sites, run, notes)


def duration(seconds: float) -> str:
    """
    >>> duration(754.3)
    '0:12:34'
    """
    return str(timedelta(seconds=round(seconds)))


def superlink_is_up(home: Home) -> bool:
    """Does SuperLink's health service say that it serves?"""
    with grpc.insecure_channel(home.settings.health_address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


@lru_cache(maxsize=1)
def _nodes(home: Path, when: int) -> dict[int, dict[str, str]]:
    """What Flower says of each node; nothing where it gives no answer."""
    try:
        return {int(node["node-id"]): node for node in flower(Home(home), "supernode", "list", CONNECTION)["nodes"]}
    except PolyclinicError:
        return {}


def _site(site: Enrolled, node: dict[str, str], found: Records) -> Site:
    return Site(
        **asdict(part(site.name, found)),
        state="revoked" if site.revoked else "registered" if site.node else "enrolled",
        online=node["status"] == "online" if node else None,
        last_seen=node["offline-at"] if node and node["offline-at"] != "N/A" else None,
    )


def _notes(name: str, site: Site) -> Iterator[str]:
    if site.approved is False:
        yield f"{name} has not approved the study: nothing runs there until it does"
    if site.clock_is_off:
        yield f"the clock of {name} is off by {site.clock_ahead_s:+.0f} s: beyond {SHUT_OUT_S} s it is shut out"
    if site.version not in (None, __version__):
        yield f"{name} has version {site.version}, and this coordinator {__version__}"
