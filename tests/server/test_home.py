"""A coordinator's folder: modes, enrolment, revocation, what is never overwritten."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.enrolment import Request
from polyclinic.errors import Refused
from polyclinic_server.gateway import configuration
from polyclinic_server.home import Home, Settings, make_home, renew
from polyclinic_server.rundir import RunDir

from ..tiny import tiny_study

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
"""Flower's own, as it builds the bundle."""
SETTINGS = Settings("consortium", "node.example:443", "0.0.0.0:443", 8000, ["node.example"])


def request(name: str) -> Request:
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form).decode()
    return Request(name=name, public_key=key, version="0.1.0")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "coordinator", SETTINGS)


def test_keys_are_their_owners_alone(home: Home) -> None:
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    for name in ("authority.key", "server.key"):
        assert stat.S_IMODE((home.path / name).stat().st_mode) == 0o600
    assert Home(home.path).settings == SETTINGS


def test_nothing_is_overwritten(home: Home) -> None:
    before = (home.path / "authority.key").read_bytes()
    with pytest.raises(Refused, match="is not empty"):
        make_home(home.path, SETTINGS)
    assert (home.path / "authority.key").read_bytes() == before


def test_a_folder_without_settings_is_no_coordinators(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no coordinator in"):
        Home(tmp_path)
    (tmp_path / "coordinator.toml").write_text("name = 1")
    with pytest.raises(Refused, match="cannot be read"):
        Home(tmp_path)


def test_settings_written_before_there_was_a_page_are_still_read(home: Home) -> None:
    path = home.path / "coordinator.toml"
    old = [line for line in path.read_text().splitlines() if not line.startswith(("web_port", "health_port"))]
    path.write_text("\n".join(old))
    found = Home(home.path).settings
    assert (found.page, found.health_address) == ("http://127.0.0.1:8080", "127.0.0.1:8001")
    path.write_text("\n".join(["web_port = 9000", "health_port = 9001", *old]))
    found = Home(home.path).settings
    assert (found.page, found.health_address) == ("http://127.0.0.1:9000", "127.0.0.1:9001")


def test_nothing_is_renewed_without_the_authoritys_key(home: Home) -> None:
    before = (home.path / "server.crt").read_bytes()
    (home.path / "authority.key").unlink()
    with pytest.raises(Refused, match="the authority's key is not here"):
        renew(home.path, home.settings)
    assert (home.path / "server.crt").read_bytes() == before


def test_a_renewed_certificate_is_of_the_same_authority(home: Home) -> None:
    authority, certificate = ((home.path / name).read_bytes() for name in ("authority.crt", "server.crt"))
    renew(home.path, home.settings)
    assert (home.path / "authority.crt").read_bytes() == authority
    assert (home.path / "server.crt").read_bytes() != certificate


def test_an_enrolled_site_gets_what_it_needs(home: Home) -> None:
    asked = request("north")
    answer = home.enrol(asked, 500)
    assert (answer.name, answer.address, answer.coordinator) == ("north", "node.example:443", "consortium")
    assert answer.authority == (home.path / "authority.crt").read_text()
    assert home.sites()["north"].patients == 500
    assert home.enrol(asked, 600) == answer  # the file was lost: the same once more
    assert home.sites()["north"].patients == 600


def test_names_and_keys_are_given_once(home: Home) -> None:
    asked = request("north")
    home.enrol(asked, 500)
    with pytest.raises(Refused, match="'north' is enrolled with another key"):
        home.enrol(request("north"), 500)
    with pytest.raises(Refused, match="'north' is enrolled with this key"):
        home.enrol(asked.model_copy(update={"name": "south"}), 500)
    assert home.revoke("north").revoked
    with pytest.raises(Refused, match="'north' is revoked"):
        home.enrol(asked, 500)
    with pytest.raises(Refused, match="no site 'east' is enrolled"):
        home.revoke("east")


def test_one_process_leads(home: Home) -> None:
    with home.claimed(), pytest.raises(Refused, match="another process leads"), Home(home.path).claimed():
        pass
    with home.claimed():
        pass


def test_the_wanted_run_is_remembered(home: Home) -> None:
    assert home.wanted is None
    home.want(home.path / "runs" / "s-1")
    assert Home(home.path).wanted == home.path / "runs" / "s-1"
    RunDir(home.path / "runs" / "s-1").create(tiny_study())
    for event, ended in (("run_interrupted", False), ("run_reported", True)):
        RunDir(home.path / "runs" / "s-1").event(event)
        assert (home.wanted is None) == ended
    home.want(None)
    assert home.wanted is None


def test_the_latest_run_is_known_after_it_was_stopped(home: Home) -> None:
    assert home.latest is None
    for number, name in enumerate(("s-1", "t-1", "s-2")):
        run = RunDir(home.path / "runs" / name)
        run.create(tiny_study())
        run.event("launched")
        os.utime(run.path / "events.jsonl", (1e9 - number, 1e9 - number))
    home.want(home.path / "runs" / "t-1")
    assert home.latest == home.path / "runs" / "t-1"
    home.want(None)
    assert home.latest == home.path / "runs" / "s-1"  # where something has happened last


def test_nginx_takes_the_configuration(home: Home) -> None:
    text = configuration(home.path, "127.0.0.1:18443", 8000)
    path = home.path / "gateway" / "test.conf"
    path.write_text(text)
    try:
        done = subprocess.run(["nginx", "-t", "-c", path, "-e", home.path / "error"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("nginx is not installed")
    assert done.returncode == 0, done.stderr
