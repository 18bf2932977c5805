"""`polyclinic site` as far as no node must run for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.bundle import bundle_hash
from polyclinic.cli import run
from polyclinic.enrolment import Join
from polyclinic.files import locked
from polyclinic.privacy.ledger import Charge
from polyclinic.study import load_study
from polyclinic_client.hospital import Hospital
from polyclinic_client.overview import in_words, overview
from polyclinic_client.rehearsal import Pace, Rehearsal
from polyclinic_server.pki import make_authority

from ..tiny import write_cohort

AUTHORITY = make_authority("c")[1].decode()
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
STUDY = """
[study]
name = "s"

[images]
size = 16

[encoder]
name = "vit_tiny"

[[stages]]
kind = "pretrain"
method = "mae"
rounds = 2
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site in ./site."""
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path / "images", 6)
    assert run(["site", "init", "--name", "north", "--data", "images"]) == 0
    (tmp_path / "study.toml").write_text(STUDY)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return found.out + found.err


def answer(name: str = "north") -> str:
    made = Join(name=name, coordinator="c", address="c.example:443", authority=AUTHORITY, bundle=bundle_hash())
    Path("join.json").write_text(made.model_dump_json())
    return "join.json"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init", "--name", "north", "--data", "images"], "is not empty"),
        (["init", "--name", "a/b", "--data", "images", "--home", "new"], "is no name of a site"),
        (["init", "--name", "n", "--data", "none", "--home", "new"], "there are no images in none"),
        (["start"], "the coordinator has not answered yet"),
        (["firewall"], "the coordinator has not answered yet"),
        (["join", "site/request.json"], "is not an answer"),
        (["withdraw", "abc"], "no study abc is approved here"),
        (["approve", "none.toml"], "cannot read the study file"),
        (["status", "--home", "none"], "there is no site in none"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", *arguments]) == 2
    shown = said(capsys)
    assert says in shown
    assert "fix:" in shown


@pytest.mark.usefixtures("quick")
def test_from_the_request_to_an_approved_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", "init", "--name", "south", "--data", "images", "--home", "other"]) == 0
    assert "SHA256:" in said(capsys)
    assert run(["site", "join", answer()]) == 0
    assert run(["site", "firewall"]) == 0
    assert "outbound TCP to c.example port 443" in said(capsys)
    assert run(["site", "approve", "study.toml", "--yes"]) == 0
    shown = said(capsys)
    hash = load_study(Path("study.toml")).hash
    assert "trains 2 rounds of mae on 8 images of 4 patients" in shown
    assert "of the 12 images of 6 patients here, some patients are for measuring only" in shown
    assert f"approved by {Hospital(Path('site')).approved(hash).by}" in shown  # type: ignore[union-attr]
    assert run(["site", "status", "--json"]) == 0
    found = json.loads(said(capsys))
    assert (found["coordinator"], found["running"], list(found["approved"])) == ("c.example:443", False, [hash])
    assert found["certificate_days"] > 3600
    assert found["last_answer"] is None
    assert any("trains simclr" in line for line in found["policy"])
    study = found["approved"][hash]
    assert (study["study"], study["patients"], study["orders"], study["max_orders"]) == ("s", 6, 0, 26)
    assert run(["site", "withdraw", hash]) == 0
    assert run(["site", "status"]) == 0
    assert "approved:" not in said(capsys)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dry run."""
    pace = Rehearsal([Pace("mae", 2, 20.0, 30.0)], 1500.0, "cpu")
    monkeypatch.setattr("polyclinic_client.preview.rehearse", lambda *_: pace)


@pytest.mark.usefixtures("quick")
def test_scripts_see_a_study_before_they_approve_it(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys)
    assert run(["site", "approve", "study.toml", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["approved"] is None
    assert not list(Path("site").glob("approved/*"))
    assert (seen["images"], seen["patients"], seen["estimate"]["seconds"]) == (12, 6, 60.0)
    assert seen["stages"][0]["bytes_a_round"] > 1e6
    assert run(["site", "approve", "study.toml", "--json", "--yes"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["approved"]["by"]
    assert {**again, "approved": None} == seen
    assert len(list(Path("site").glob("approved/*.json"))) == 1


@pytest.mark.usefixtures("quick")
def test_the_state_tells_the_last_order_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", "approve", "study.toml", "--yes"]) == 0
    hospital, study = Hospital(Path("site")), load_study(Path("study.toml"))
    hospital.serve(study.canonical())
    hospital.ledger.append({"to": "c", "kind": "train", "study": study.hash, "round": 3, "bytes": 2_000_000})
    hospital.ledger.append({"to": "c", "kind": "query"})
    said(capsys)
    assert run(["site", "status"]) == 0
    shown = said(capsys)
    assert "1 of 26 orders carried out, the last at 20" in shown
    assert "train: round 3, 2.0 MB" in shown
    with locked(hospital.path):
        hospital.ledger.append({"to": "c", "kind": "train", "error": "the site works 19:00-07:00"})
        found = overview(hospital)
    assert (found["running"], found["answering"]) == (True, False)
    assert found["last_answer"]["error"] == "the site works 19:00-07:00"
    assert "running, but not answering" in next(in_words(found))


@pytest.mark.usefixtures("quick")
def test_a_study_that_is_asked_about_and_not_wanted_is_not_approved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: False)
    assert run(["site", "approve", "study.toml"]) == 2
    assert "not approved" in said(capsys)
    assert not list(Path("site/approved").glob("*"))


def test_a_study_beyond_the_policy_is_not_even_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Path("site/site.toml")
    settings.write_text(settings.read_text().replace("max_rounds = 1000", "max_rounds = 1"))
    assert run(["site", "approve", "study.toml", "--yes"]) == 2
    assert "allows 1 rounds; the study has 2" in said(capsys)


def test_the_ledger_is_shown_and_verified(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Hospital(Path("site")).ledger
    ledger.append({"to": "c", "kind": "query"})
    facts = {"study": "a" * 64, "round": 3, "tensors": [{"name": "w"}], "bytes": 2_000_000}
    ledger.append({"to": "c", "kind": "train", **facts})
    ledger.append({"to": "c", "kind": "train", "error": "not approved"})
    said(capsys)
    assert run(["site", "ledger", "show"]) == 0
    shown = said(capsys)
    assert "train: round 3 of aaaaaaaaaaaaaaaa, 1 tensors, 2.0 MB" in shown
    assert "train: not approved" in shown
    assert run(["site", "ledger", "show", "--csv"]) == 0
    assert said(capsys).splitlines()[2].split(",")[2:7] == ["c", "train", "a" * 64, "", "3"]
    assert run(["site", "ledger", "verify"]) == 0
    assert "3 entries" in said(capsys)
    lines = Path("site/ledger/ledger.jsonl")
    lines.write_text(lines.read_text().replace("not approved", "fine"))
    assert run(["site", "ledger", "verify"]) == 1


def test_the_doctor_fails_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", "doctor", "--json"]) == 1
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["answer"]["level"] == "FAIL"
    assert run(["site", "doctor"]) == 1
    assert "FAIL" in said(capsys)


def private(path: str, **privacy: object) -> Path:
    """study.toml once more, with a promise to patients."""
    text = Path("study.toml").read_text() + "\n[privacy]\nmode = 'patient'\n"
    text += "".join(f"{name} = {value}\n" for name, value in privacy.items())
    Path(path).write_text(text.replace("rounds = 2", "rounds = 2\nbatch_size = 2"))
    return Path(path)


@pytest.mark.usefixtures("quick")
def test_what_a_study_would_spend_is_said_before_it_is_approved(capsys: pytest.CaptureFixture[str]) -> None:
    private("private.toml", noise=2.0, epsilon=50.0, delta=1e-2)
    assert run(["site", "approve", "private.toml", "--yes"]) == 0
    shown = " ".join(said(capsys).split())
    assert "an epsilon of" in shown
    assert "no number of patients and no figure leaves" in shown
    assert "at this site's own delta, 1e-06, all studies together have spent 0.00, without a limit" in shown
    assert "with it the number of patients" not in shown
    assert run(["site", "approve", "private.toml", "--json"]) == 0
    spending = json.loads(capsys.readouterr().out)["privacy"]["spending"]
    assert 0 < spending["epsilon"] < 50
    assert spending["fits"] == 2
    settings = Path("site/site.toml")
    one = spending["epsilon"] * 0.9
    settings.write_text(settings.read_text().replace("epsilon = 0.0", f"epsilon = {one}").replace("1e-6", "1e-2"))
    assert run(["site", "approve", "private.toml", "--yes"]) == 0
    assert "only 1 of its 2 rounds are within the limits" in " ".join(said(capsys).split())
    settings.write_text(settings.read_text().replace(f"epsilon = {one}", "epsilon = 0.01"))
    assert run(["site", "approve", "private.toml", "--yes"]) == 2
    assert "no round of the study is within what may be spent" in " ".join(said(capsys).split())


def test_what_was_spent_is_shown_by_study(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys)
    assert run(["site", "ledger"]) == 0
    assert "no study that promises patients privacy has trained here" in said(capsys)
    Hospital(Path("site")).ledger.append({"kind": "train", "study": "c" * 64, "round": 1, "tensors": []})
    ledger = Hospital(Path("site")).spending
    charge = Charge("a" * 64, "first", 0, 1, "m", "c", 100, 1.0, 0.1, 20)
    ledger.commit(ledger.reserve(charge, []), 20)
    ledger.reserve(replace(charge, study="b" * 64, name="second", steps=7), [])
    assert run(["site", "ledger"]) == 0
    shown = said(capsys)
    assert "first (aaaaaaaaaaaaaaaa): epsilon" in shown
    assert "1 rounds, 7 steps" in shown
    assert "study cccccccccccccccc: updates of 1 rounds left without a promise; no epsilon covers them" in shown
    assert "no limit of the site's" in shown
    settings = Path("site/site.toml")
    settings.write_text(settings.read_text().replace("epsilon = 0.0", "epsilon = 9.0"))
    assert run(["site", "ledger", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit"] == 9.0
    assert found["left"] == pytest.approx(9.0 - found["epsilon"])
    assert max(row["epsilon"] for row in found["studies"]) < found["epsilon"]
    assert run(["site", "ledger", "verify"]) == 0
    assert "privacy spent: 3 entries" in said(capsys)


def test_a_promise_to_patients_needs_to_know_who_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "images" / "labels.csv"
    table.write_text("".join(line.rpartition(",")[0] + "\n" for line in table.read_text().splitlines()))
    private("private.toml", noise=2.0)
    assert run(["site", "approve", "private.toml", "--yes"]) == 2
    assert "nothing says which images are of one patient" in said(capsys)
