"""The coordinator's folder: authority, machine's certificate, gateway, enrolled sites, runs.

coordinator.toml   name, address that sites reach, ports
authority.key/.crt server.key/.crt   superlink.db   signatures.db   gateway/nginx.conf   flwr/config.toml
sites/NAME.json    an enrolled site: its public key, the patients that it may count for, Flower's number for it
runs/              a run directory a study; wanted.json names the one that is to run
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join, Request
from polyclinic.errors import PolyclinicError, Refused
from polyclinic.files import locked, storage, write_atomic, write_secret
from polyclinic_server.gateway import configuration
from polyclinic_server.pki import make_authority, make_server
from polyclinic_server.rundir import ENDED, last_event

SETTINGS = "coordinator.toml"
PATIENCE_S = 10.0
"""For which a change of the list of sites waits for another."""
CONNECTION = "coordinator"
"""SuperLink's name in Flower's own configuration."""


@dataclass(frozen=True)
class Settings:
    """coordinator.toml.

    Attributes:
        name: of the consortium's coordinator, in certificates.
        address: host:port at which sites reach the gateway.
        listen: address:port that the gateway is bound to here.
        superlink_port: on loopback.
        hosts: names and addresses in the machine's certificate.
        web_port: of the page that shows what goes on, on loopback.
        health_port: at which SuperLink says that it is well, on loopback; 0: the one after `superlink_port`.
    """

    name: str
    address: str
    listen: str
    superlink_port: int
    hosts: list[str]
    web_port: int = 8080
    health_port: int = 0

    @property
    def health_address(self) -> str:
        """Of SuperLink's health service: gRPC, no TLS."""
        return f"127.0.0.1:{self.health_port or self.superlink_port + 1}"

    @property
    def page(self) -> str:
        """The page's address in a browser of this machine."""
        return f"http://127.0.0.1:{self.web_port}"


@dataclass(frozen=True)
class Enrolled:
    """sites/NAME.json. `node` is Flower's number, 0 until it is registered; a revoked site keeps its file."""

    name: str
    public_key: str
    patients: int
    node: int = 0
    revoked: bool = False


class Home:
    """A coordinator's folder that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        try:
            self.settings = Settings(**tomllib.loads((self.path / SETTINGS).read_text()))
        except FileNotFoundError as error:
            raise Refused(
                f"there is no coordinator in {path}", "make one: polyclinic coordinator init --home DIR"
            ) from error
        except (TypeError, ValueError) as error:
            raise Refused(f"{path / SETTINGS} cannot be read: {error}", "restore it from a backup") from error

    def sites(self) -> dict[str, Enrolled]:
        """The enrolled sites by name, revoked ones among them."""
        found = [Enrolled(**json.loads(path.read_text())) for path in sorted((self.path / "sites").glob("*.json"))]
        return {site.name: site for site in found}

    def change(self, name: str, **fields: Any) -> Enrolled:
        """A site's file with these fields changed; what others have changed meanwhile stays."""
        path = self.path / "sites" / f"{name}.json"
        with locked(path.parent, PATIENCE_S) as free:
            if not free:
                raise PolyclinicError("the list of sites is in use for too long", "try again")
            before = json.loads(path.read_text()) if path.exists() else {"name": name}
            site = Enrolled(**{**before, **fields})
            write_atomic(path, json.dumps(asdict(site)))
        return site

    def enrol(self, request: Request, patients: int) -> Join:
        """Enrol a site; what it gets in answer.

        Raises:
            Refused: a site of that name, or with that key, is enrolled already.
        """
        for site in self.sites().values():
            if site.name == request.name and (site.revoked or site.public_key != request.public_key):
                raise Refused(
                    f"{request.name!r} is {'revoked' if site.revoked else 'enrolled with another key'}",
                    "give the site a new name" if site.revoked else "revoke that site first, or correct the name",
                )
            if site.public_key == request.public_key and site.name != request.name:
                raise Refused(f"{site.name!r} is enrolled with this key", "have the site make a key of its own")
        self.change(request.name, public_key=request.public_key, patients=patients)
        return Join(
            name=request.name,
            coordinator=self.settings.name,
            address=self.settings.address,
            authority=(self.path / "authority.crt").read_text(),
            bundle=bundle_hash(),
        )

    def revoke(self, name: str) -> Enrolled:
        """Note that a site may take no part any more.

        Raises:
            Refused: no site of that name is enrolled.
        """
        if name not in self.sites():
            raise Refused(f"no site {name!r} is enrolled", f"the sites are {', '.join(self.sites()) or 'none yet'}")
        return self.change(name, revoked=True)

    @property
    def launched(self) -> Path | None:
        """The run directory that was launched last, unless it was stopped for good."""
        with suppress(FileNotFoundError):
            return self.path / "runs" / str(json.loads((self.path / "wanted.json").read_text())["run"])
        return None

    @property
    def latest(self) -> Path | None:
        """The run directory that was launched last, stopped ones among them."""
        found = (self.path / "runs").glob("*/events.jsonl")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return self.launched or (newest.parent if newest else None)

    @property
    def wanted(self) -> Path | None:
        """The run directory that is to run, until it has ended."""
        return None if self.launched is None or last_event(self.launched) in ENDED else self.launched

    def want(self, run: Path | None) -> None:
        """Say which run is to run; None: nothing."""
        if run is None:
            (self.path / "wanted.json").unlink(missing_ok=True)
        else:
            write_atomic(self.path / "wanted.json", json.dumps({"run": run.name}))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process leads from this folder meanwhile.

        Raises:
            Refused: one does.
        """
        with locked(self.path) as free:
            if not free:
                raise Refused(f"another process leads from {self.path}", "stop it first, or use another --home")
            yield


def make_home(path: Path, settings: Settings) -> Home:
    """Make a coordinator's folder.

    Raises:
        Refused: there is something in it already.
    """
    if path.exists() and any(path.iterdir()):
        raise Refused(f"{path} is not empty", "give another --home; nothing there is ever overwritten")
    with storage(path):
        for folder in (path, path / "sites", path / "runs", path / "gateway", path / "flwr", path / "logs"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
    home = path.resolve()
    key, authority = make_authority(settings.name)
    write_secret(home / "authority.key", key)
    write_atomic(home / "authority.crt", authority)
    renew(home, settings)
    write_atomic(home / "gateway" / "nginx.conf", configuration(home, settings.listen, settings.superlink_port))
    connection: dict[str, Any] = {
        "address": f"127.0.0.1:{settings.superlink_port}",
        "root-certificates": str(home / "authority.crt"),
    }
    flower = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_atomic(home / "flwr" / "config.toml", tomli_w.dumps(flower))
    write_atomic(home / SETTINGS, tomli_w.dumps(asdict(settings)))  # last: with it, it is a coordinator's folder
    return Home(home)


def renew(home: Path, settings: Settings) -> None:
    """A new key and certificate for the machine, from the same authority: sites need not be told."""
    if not (home / "authority.key").exists():
        raise Refused("the authority's key is not here", f"put authority.key back into {home} for as long as it takes")
    own: Sequence[str] = [*settings.hosts, "localhost", "127.0.0.1"]
    authority_key, authority = ((home / f"authority.{kind}").read_bytes() for kind in ("key", "crt"))
    key, certificate = make_server(authority_key, authority, settings.name, list(dict.fromkeys(own)))
    write_secret(home / "server.key", key)
    write_atomic(home / "server.crt", certificate)
