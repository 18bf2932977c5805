"""The runbook's commands, section by section, against a coordinator's and a site's folder on this machine.

The two "first day" sections make the folders; every other one starts from how they left them. What root types, and
what needs services that run, is not run here: of the latter, the options are checked.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyclinic import __version__
from polyclinic.bundle import bundle_folder
from polyclinic.cli import build, run
from polyclinic.study import load_study
from polyclinic_client.hospital import Hospital
from polyclinic_client.monitor import Meter
from polyclinic_server.home import Home
from polyclinic_server.web import _Metrics
from polyclinic_simulations.phantom import write_site

from .stand_in import free_port, gateway

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
DEPLOY = Path(__file__).parents[2] / "deploy"
TEXT = (DEPLOY / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", TEXT, re.MULTILINE))
FIRST_DAY = ["First day: the coordinator", "First day: a site"]
KEY = "authority.key"
"""Kept off the machine after the first day, as the runbook asks, but where a certificate is made."""
LIVE = [
    "polyclinic coordinator status --follow",
    "tail --lines 50 site/logs/supernode.log",
    "curl --fail --silent http://127.0.0.1:8080/metrics",
    "grpc_health_probe -addr=127.0.0.1:8001",
]
"""Commands that need services that run."""
STUDY = """
[study]
name = "chest"
seed = 3

[images]
size = 32

[encoder]
name = "vit_tiny"

[[stages]]
kind = "pretrain"
method = "mae"
rounds = 1
batch_size = 16

[evaluation]
rows = []

[aggregation]
min_sites = 1
"""


def commands(section: str) -> list[tuple[str, str, str]]:
    """(machine, # or $, command) of a section's fenced blocks."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```$", SECTIONS[section], re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    found = [re.fullmatch(r"(coordinator|north|checkout)([#$]) (.+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return [(match[1], match[2], match[3]) for match in found if match]


EVERY = [(section, *command) for section in SECTIONS for command in commands(section)]


@dataclass
class World:
    """The two machines' folders; `port` is the gateway's, for which a stand-in answers."""

    path: Path
    port: int

    def run(self, section: str) -> str:
        """Run what `polyclinic` types in a section, and hand over the files that are sent; what it printed."""
        said = []
        for machine, prompt, command in commands(section):
            if prompt == "$" and machine != "checkout" and command not in LIVE:
                said.append(self.type(machine, command))
                self.send()
        return "\n".join(said)

    def type(self, machine: str, command: str) -> str:
        """Run one command; what it printed."""
        study = load_study(self.path / "north" / "chest.toml")
        names = {
            "polyclinic.example.org:443": f"localhost:{self.port}",
            "polyclinic.example.org": "localhost",
            "new.example.org": "127.0.0.1",
            "/mnt/images": str(self.path / "images"),
            "HASH": study.hash,
        }
        for name, here in names.items():
            command = command.replace(name, here)
        words = shlex.split(command)
        if words[0] == "polyclinic":
            return self.polyclinic(machine, words[1:])
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(words, cwd=self.path / machine, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def polyclinic(self, machine: str, words: list[str]) -> str:
        """In this process: what it imports, it imports once. Whatever it asks is answered with yes."""
        with contextlib.chdir(self.path / machine), pytest.MonkeyPatch.context() as patch:
            patch.setattr("typer.confirm", lambda _: True)
            patch.setenv("COLUMNS", "200")
            with open(self.path / "said", "w+") as said, contextlib.redirect_stdout(said):  # noqa: PTH123
                with contextlib.redirect_stderr(said):
                    code = run(words)
                said.seek(0)
                text = said.read()
        assert code == 0, f"{words}\n{text}"
        return text

    def send(self) -> None:
        """The request and the answer, as soon as they are there."""
        north, coordinator = self.path / "north", self.path / "coordinator"
        for made, sent in (
            (north / "site" / "request.json", coordinator / "request-north.json"),
            (coordinator / "join-north.json", north / "join-north.json"),
        ):
            if made.exists():
                shutil.copy(made, sent)


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """After the two "first day" sections, with what the services would have left by now."""
    world = World(tmp_path_factory.mktemp("runbook") / "world", free_port())
    for machine in ("coordinator", "north"):
        (world.path / machine).mkdir(parents=True)
        (world.path / machine / "chest.toml").write_text(STUDY)
    write_site(world.path / "images", "north", 6, 3, number=0)
    first, *rest = commands(FIRST_DAY[0])
    assert "coordinator init" in first[2]
    world.type("coordinator", first[2])
    home = world.path / "coordinator" / "coordinator"
    with gateway(home, world.port):
        for machine, prompt, command in rest:
            if prompt == "$":
                world.type(machine, command)
        world.run(FIRST_DAY[1])
        (home / KEY).rename(world.path / KEY)
        (home / "superlink.db").touch()
        site = world.path / "north" / "site"
        (site / "logs").mkdir()
        Hospital(site).ledger.append({"to": "", "kind": "train", "error": "an answer"})
        yield world


@pytest.fixture
def world(first_day: World) -> Iterator[World]:
    """Put back afterwards, at the same path: the folders hold paths of their own."""
    kept = first_day.path.with_name("kept")
    shutil.copytree(first_day.path, kept)
    yield first_day
    shutil.rmtree(first_day.path)
    kept.rename(first_day.path)


def test_the_first_day_ends_with_a_study_that_waits_for_its_sites(first_day: World) -> None:
    home, site = Home(first_day.path / "coordinator" / "coordinator"), Hospital(first_day.path / "north" / "site")
    assert list(home.sites()) == ["north"]
    assert site.joined is not None
    assert home.wanted is not None
    assert site.approves(load_study(first_day.path / "north" / "chest.toml").hash)


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in (*FIRST_DAY, "Install")])
def test_a_section_does_what_it_says(section: str, world: World) -> None:
    before = (world.path / "coordinator" / "coordinator" / "server.crt").read_bytes()
    if "polyclinic coordinator renew" in SECTIONS[section]:
        (world.path / KEY).rename(world.path / "coordinator" / "coordinator" / KEY)
    said = world.run(section)
    home, site = Home(world.path / "coordinator" / "coordinator"), world.path / "north" / "site"
    if section == "A certificate expires":
        assert (home.path / "server.crt").read_bytes() != before
    elif section == "Back up, and restore":
        assert home.sites().keys() == {"north"}
        assert "1 entries" in said
        assert "approved by" in said
        assert (world.path / "north" / "site.broken").is_dir()
        assert (site / "node.key").stat().st_mode & 0o77 == 0
    elif section == "Retire or revoke a site":
        assert home.sites()["north"].revoked
        assert not (site / "node.key").exists()
        assert not list((site / "approved").glob("*.json"))
        assert (site / "ledger").is_dir()
    elif section == "Move the coordinator to another machine":
        assert f"coordinator at 127.0.0.1:{world.port}" in said
        assert home.sites().keys() == {"north"}


def test_a_restored_site_lacks_only_the_copies_of_its_images(world: World) -> None:
    site = world.path / "north" / "site"
    held = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    (line,) = [command for _, _, _, command in EVERY if command.startswith("tar --create") and "--exclude" in command]
    world.type("north", line)
    site.rename(site.with_name("broken"))
    world.type("north", "tar --extract --gzip --file site.tar.gz")
    missing = held - {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert missing
    assert all(path.parts[:2] == ("state", "cohorts") for path in missing)


@pytest.mark.parametrize("command", [command for command in LIVE if command.startswith("polyclinic ")])
def test_a_command_that_is_not_run_here_knows_its_options(command: str) -> None:
    words = command.split()[1:]
    names = itertools.takewhile(lambda word: not word.startswith("--"), words)
    shown = CliRunner().invoke(build(), [*names, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert all(word in shown.output for word in words if word.startswith("--"))


def test_what_is_left_out_is_there_to_be_left_out() -> None:
    assert set(LIVE) <= {command for _, _, _, command in EVERY}
    assert all(prompt == "#" for section, machine, prompt, _ in EVERY if section == "Install" and machine == "north")


def test_root_types_units_and_programs_that_exist() -> None:
    typed = [shlex.split(command) for _, _, prompt, command in EVERY if prompt == "#"]
    units = {word for words in typed if words[0] == "systemctl" for word in words if word.startswith("polyclinic")}
    assert {f"{unit}.service" for unit in units} == {path.name for path in (DEPLOY / "systemd").iterdir()}
    assert {words[0] for words in typed} <= {"systemctl", "ln", "sh", "cp", "useradd", "install", "sha256sum"}
    for words in typed:
        if words[0] in ("cp", "sh"):
            assert (DEPLOY / words[1]).exists() or words[1] == "wheelhouse/install.sh"


def test_every_metric_that_is_watched_is_written(first_day: World) -> None:
    home, site = Home(first_day.path / "coordinator" / "coordinator"), Hospital(first_day.path / "north" / "site")
    Meter(site.path, site.name, site.ledger).write(up=True)
    written = set(re.findall(r"^# TYPE (\w+)", (site.path / "metrics.prom").read_text(), re.MULTILINE))
    written |= {metric.name for metric in _Metrics(home).collect()}
    watched = set(re.findall(r"polyclinic_\w+", SECTIONS["What to watch"]))
    assert len(watched) > 6
    assert watched <= written, watched - written


def test_ports_that_are_named_are_the_ones_of_init(first_day: World) -> None:
    settings = Home(first_day.path / "coordinator" / "coordinator").settings
    assert settings.page in SECTIONS["What to watch"]
    assert f"-addr={settings.health_address}" in SECTIONS["What to watch"]


def test_the_bundles_hash_tells_versions_apart() -> None:
    """It is what keeps a site from running another version: its own version must go with the package's."""
    project = tomllib.loads((bundle_folder() / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"/opt/polyclinic/{__version__}" in SECTIONS["Install"]


@pytest.mark.parametrize("page", ["runbook.md", "kubernetes.md", "README.md"])
def test_the_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (DEPLOY / page).read_text())
    assert all((DEPLOY / link).exists() for link in links)


def test_nothing_of_this_machine_stands_in_the_folder() -> None:
    pages = [
        path for path in DEPLOY.rglob("*") if path.suffix in (".md", ".py", ".service", ".yaml") or "." not in path.name
    ]
    for path in pages:
        if path.is_file():
            assert str(Path.home()) + os.sep not in path.read_text()
