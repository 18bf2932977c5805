"""`polyclinic coordinator` as far as nothing must run for it."""

import json
from pathlib import Path

import pytest

from polyclinic.cli import run
from polyclinic_client.hospital import make_hospital

from ..tiny import write_cohort

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
STUDY = '[study]\nname = "s"\n\n[[stages]]\nkind = "pretrain"\nmethod = "simclr"\nrounds = 2\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator in ./coordinator, a site's request in ./north."""
    monkeypatch.chdir(tmp_path)
    assert run(["coordinator", "init", "--address", "localhost:8443"]) == 0
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
    folder = tmp_path / "coordinator" / "runs" / "s-1"
    assert json.loads((folder / "seats.json").read_text()) == {"north": 65_536}
    assert run(["coordinator", "launch", "study.toml", "--yes", "--no-follow"]) == 2
    assert "s-1 is running" in said(capsys)
    assert run(["coordinator", "status", "--json"]) == 0
    found = json.loads(said(capsys))
    assert found["sites"] == {"north": "enrolled"}
    assert found["run"]["last"] == "launched"


def test_a_new_certificate_is_made_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "coordinator" / "server.crt").read_bytes()
    assert run(["coordinator", "renew"]) == 0
    assert "valid for 396 days" in said(capsys)
    assert (tmp_path / "coordinator" / "server.crt").read_bytes() != before
