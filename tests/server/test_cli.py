"""`polyclinic coordinator` as far as nothing must run for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polyclinic.cli import run
from polyclinic_client.hospital import make_hospital
from polyclinic_server import overview
from polyclinic_server.home import Home

from ..tiny import write_cohort
from .test_overview import free_port, play

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
STUDY = '[study]\nname = "s"\n\n[[stages]]\nkind = "pretrain"\nmethod = "simclr"\nrounds = 2\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator in ./coordinator, a site's request in ./north."""
    monkeypatch.chdir(tmp_path)
    ports = [f"--{name}-port={free_port()}" for name in ("superlink", "web", "health")]
    assert run(["coordinator", "init", "--address", "localhost:8443", *ports]) == 0
    write_cohort(tmp_path / "images", 6)
    make_hospital(tmp_path / "north", "north", tmp_path / "images")
    (tmp_path / "study.toml").write_text(STUDY)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return found.out + found.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init", "--address", "nowhere"], "give host:port"),
        (["init", "--address", "host:99999"], "give host:port"),
        (["init", "--address", "h:1", "--name", "a/b"], "letters, digits"),
        (["init", "--address", "localhost:8443"], "is not empty"),
        (["status", "--home", "none"], "there is no coordinator in none"),
        (["enrol", "none.json"], "cannot read none.json"),
        (["enrol", "study.toml"], "is not a request to join"),
        (["enrol", "north/request.json", "--fingerprint", "SHA256:x"], "the key's fingerprint is SHA256:"),
        (["revoke", "south"], "no site 'south' is enrolled"),
        (["launch", "study.toml", "--yes"], "0 sites are enrolled"),
        (["stop"], "no study is running"),
        (["report"], "no study has been launched"),
        (["report", "s-9"], "there is no run s-9"),
        (["export", "../../etc", "--to", "x"], "there is no run ../../etc"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["coordinator", *arguments]) == 2
    shown = said(capsys)
    assert says in shown
    assert "fix:" in shown


def test_a_study_is_launched_once_at_the_sites_that_are_enrolled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: True)
    assert run(["coordinator", "enrol", "north/request.json"]) == 0
    (tmp_path / "study.toml").write_text(STUDY + "\n[aggregation]\nmin_sites = 1\n")
    assert run(["coordinator", "launch", "study.toml", "--yes", "--no-follow"]) == 0
    shown = said(capsys)
    assert "2 rounds of simclr" in shown
    assert "at 1 site: north" in shown
    assert "online now: not known, since SuperLink is down" in shown
    folder = tmp_path / "coordinator" / "runs" / "s-1"
    assert json.loads((folder / "seats.json").read_text()) == {"north": 65_536}
    assert run(["coordinator", "launch", "study.toml", "--yes", "--no-follow"]) == 2
    assert "s-1 is running" in said(capsys)
    assert run(["coordinator", "status", "--json"]) == 0
    found = json.loads(said(capsys))
    assert {name: site["state"] for name, site in found["sites"].items()} == {"north": "enrolled"}
    assert (found["run"]["name"], found["run"]["state"], found["superlink"]) == ("s-1", "waiting", False)


def test_initial_weights_that_do_not_fit_are_refused_before_a_run_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: True)
    assert run(["coordinator", "enrol", "north/request.json"]) == 0
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.safetensors")
    init = 'encoder.init = { file = "w.safetensors", family = "torchvision" }\n'
    (tmp_path / "study.toml").write_text(init + STUDY + "\n[aggregation]\nmin_sites = 1\n")
    assert run(["coordinator", "launch", "study.toml", "--yes", "--no-follow"]) == 2
    assert "the initial weights do not fit the encoder" in said(capsys)
    assert not (tmp_path / "coordinator" / "runs" / "s-1").exists()


def test_a_new_certificate_is_made_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "coordinator" / "server.crt").read_bytes()
    assert run(["coordinator", "renew"]) == 0
    assert "valid for 396 days" in said(capsys)
    assert (tmp_path / "coordinator" / "server.crt").read_bytes() != before


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is up, and sees north only."""
    nodes = [
        {"node-id": "11", "status": "online", "offline-at": "N/A"},
        {"node-id": "12", "status": "offline", "offline-at": "2026-11-21 16:05:31Z"},
    ]
    monkeypatch.setattr(overview, "superlink_is_up", lambda _: True)
    monkeypatch.setattr(overview, "flower", lambda *_: {"nodes": nodes})
    overview._nodes.cache_clear()


@pytest.mark.usefixtures("superlink")
@pytest.mark.parametrize("columns", [80, 120])
def test_status_fits_and_marks_what_is_wrong(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    play(Home(tmp_path / "coordinator"), 4, reason="[red]not[/red] approved at this site " * 5)
    capsys.readouterr()
    assert run(["coordinator", "status"]) == 0
    shown = said(capsys)
    assert max(map(len, shown.splitlines())) <= columns
    rows = {line.split()[0]: line for line in shown.splitlines() if line}
    assert rows["north"].split() == ["north", "online", "yes", "+0.2", "s", "4", "4.0", "MB", "off"]
    assert "gone 11-21 16:05" in rows["south"]
    assert "NO !" in rows["south"]
    assert "-45.0 s !" in rows["south"]
    assert "tiny-1: running, round 5 of 5 rounds, stage 2 of 2 (micle)" in shown
    assert "0:00:25 a round, about 0:00:25 left" in shown
    assert "loss by round: 4: 1\n" in shown
    assert "south, round 4: left out: [red]not[/red]" in shown
    assert "! the clock of south is off by -45 s" in shown


@pytest.mark.usefixtures("superlink")
def test_status_of_a_run_that_has_failed_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Home(tmp_path / "coordinator"), 1).event("run_failed", problem="collapsed", fix="lower the rate")
    assert run(["coordinator", "status", "--follow"]) == 0  # there is nothing to follow
    assert "tiny-1: failed, 1 of 5 rounds, stage 1 of 2 (simclr)" in (shown := said(capsys))
    assert "collapsed\n  fix: lower the rate" in shown


@pytest.mark.usefixtures("superlink")
def test_the_preview_says_who_is_online(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: False)
    home = Home(tmp_path / "coordinator")
    home.change("north", public_key="a", patients=10, node=11)
    home.change("south", public_key="b", patients=10, node=12)
    assert run(["coordinator", "launch", "study.toml"]) == 2
    assert "online now: north; not: south" in said(capsys)


def test_a_report_is_made_of_what_is_there_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = play(Home(tmp_path / "coordinator"), 2)
    assert run(["coordinator", "export", "--to", "out"]) == 2
    assert "tiny-1 has not finished" in said(capsys)
    assert run(["coordinator", "report"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{found.path / 'report.html'}\n"
    assert "what is there so far" in shown.err
    assert "tiny" in (found.path / "report.html").read_text()


def test_a_finished_run_is_exported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = play(Home(tmp_path / "coordinator"), 5)
    for name in ("encoder.safetensors", "MODEL_CARD.md", "report.html"):
        (found.path / name).write_text(name)
    (found.path / "summary.json").write_text('{"comparison": {}}')
    found.event("run_reported")
    assert run(["coordinator", "report"]) == 0
    assert (found.path / "report.html").read_text() == "report.html"  # the ServerApp's own
    assert run(["coordinator", "export", "tiny-1", "--to", "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "encoder.safetensors", "MODEL_CARD.md", "report.html", "study.toml"
    }  # fmt: skip
    assert run(["coordinator", "export", "--to", "out"]) == 2
    assert "out exists already" in said(capsys)
