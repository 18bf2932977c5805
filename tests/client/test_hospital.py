"""A hospital's folder: its key, what it approves, what it refuses."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from polyclinic import wire
from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join, Request, fingerprint, read_file
from polyclinic.errors import CohortError, Refused
from polyclinic.files import write_secret
from polyclinic.model import initial_tensors
from polyclinic.study import Study
from polyclinic_client.hospital import SETTINGS, Hospital, make_hospital
from polyclinic_server.pki import make_authority

from ..tiny import SIMCLR, tiny_study, write_cohort

AUTHORITY = make_authority("c")[1].decode()
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
STUDY = tiny_study()


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """With ten patients of two images."""
    make_hospital(tmp_path / "site", "north", write_cohort(tmp_path / "images", 10))
    return Hospital(tmp_path / "site")


def change(hospital: Hospital, old: str, new: str) -> Hospital:
    """The same after an edit of its site.toml."""
    path = hospital.path / SETTINGS
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return Hospital(hospital.path)


def approve(hospital: Hospital, study: Study = STUDY) -> None:
    hospital.approve(study, hospital.cohort_for(study), by="someone")


def test_the_key_is_its_owners_alone_and_the_request_is_about_it(hospital: Hospital) -> None:
    assert stat.S_IMODE(hospital.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((hospital.path / "node.key").stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key((hospital.path / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    request = read_file(hospital.path / "request.json", Request)
    assert request.name == "north"
    assert request.fingerprint == fingerprint(key.public_key().public_bytes(*form).decode())
    assert "PRIVATE" not in (hospital.path / "request.json").read_text()


def test_nothing_is_overwritten_and_images_must_be_there(hospital: Hospital, tmp_path: Path) -> None:
    before = (hospital.path / "node.key").read_bytes()
    with pytest.raises(Refused, match="is not empty"):
        make_hospital(hospital.path, "north", tmp_path / "images")
    assert (hospital.path / "node.key").read_bytes() == before
    with pytest.raises(Refused, match="there are no images"):
        make_hospital(tmp_path / "other", "north", tmp_path / "none")


def test_every_setting_is_explained_and_unknown_ones_are_refused(hospital: Hospital) -> None:
    lines = [line for line in (hospital.path / SETTINGS).read_text().splitlines() if "=" in line or "[" in line[:1]]
    assert lines and all("# " in line for line in lines)
    with pytest.raises(Refused, match="the nearest known key is 'max_rounds'"):
        change(hospital, "max_rounds", "max_runds")
    with pytest.raises(Refused, match="is not TOML"):
        change(hospital, "[policy]", "[policy")
    with pytest.raises(Refused, match="there is no site in"):
        Hospital(hospital.path.parent)


def test_an_approved_study_finds_its_site(hospital: Hospital) -> None:
    approve(hospital)
    site = hospital.serve(STUDY.canonical())
    assert (site.name, site.cohort.n_patients) == ("north", 10)
    found = hospital.approved(STUDY.hash)
    assert found is not None
    assert (found.by, found.study) == ("someone", STUDY.canonical())


def test_a_study_that_is_not_approved_or_was_edited_since_is_refused(hospital: Hospital) -> None:
    with pytest.raises(Refused, match="is not approved at this site"):
        hospital.serve(STUDY.canonical())
    approve(hospital)
    edited = tiny_study(stages=[{**SIMCLR, "rounds": 3}])
    with pytest.raises(Refused, match="is not approved at this site"):
        hospital.serve(edited.canonical())
    kept = hospital.path / "state" / STUDY.hash[:16]
    kept.mkdir()
    (kept / "update-0001.safetensors").write_bytes(b"what going on would need")
    hospital.withdraw(STUDY.hash)
    assert not kept.exists()
    with pytest.raises(Refused, match="is not approved at this site"):
        hospital.serve(STUDY.canonical())
    with pytest.raises(Refused, match="is approved here"):
        hospital.withdraw(STUDY.hash)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"simclr", ', "", "does not allow simclr"),
        ("max_rounds = 1000", "max_rounds = 1", "allows 1 rounds; the study has 2"),
        ("min_patients = 2", "min_patients = 11", "too few patients"),
        ('tensors = ["*"]', 'tensors = ["encoder.*"]', "keeps 4 of the update's 10 tensors here, head.0.bias among"),
        ("max_megabytes = 1000.0", "max_megabytes = 0.001", "allows updates of 0.001 MB"),
        ("epsilon = 0.0", "epsilon = 3.0", "asks for differential privacy of patients"),
    ],
)
def test_the_policy_binds_what_is_to_be_approved_and_what_was(
    old: str, new: str, says: str, hospital: Hospital
) -> None:
    approve(hospital)
    narrowed = change(hospital, old, new)
    with pytest.raises(Refused, match=says):
        narrowed.serve(STUDY.canonical())
    assert narrowed.orders(STUDY.hash).count == 0
    with pytest.raises(Refused, match=says):
        approve(narrowed)


def test_outside_its_hours_a_site_does_not_begin_and_counts_nothing(hospital: Hospital) -> None:
    approve(hospital)
    now = datetime.now()
    later, still_later = ((now + timedelta(hours=hours)).strftime("%H:%M") for hours in (2, 3))
    closed = change(hospital, "hours = []", f'hours = ["{later}-{still_later}"]')
    with pytest.raises(Refused, match=f"the site works {later}-{still_later} by its own clock"):
        closed.serve(STUDY.canonical())
    assert closed.orders(STUDY.hash).count == 0
    approve(closed)  # an approval is no work
    before = (now - timedelta(hours=1)).strftime("%H:%M")
    assert change(closed, f'"{later}-', f'"{before}-').serve(STUDY.canonical()).name == "north"


def test_an_approved_study_is_carried_out_so_often_and_no_more(hospital: Hospital) -> None:
    approve(hospital)
    hospital = change(hospital, "max_orders = 0", "max_orders = 3")
    for made in (1, 2, 3):
        hospital.serve(STUDY.canonical())
        assert Hospital(hospital.path).orders(STUDY.hash).count == made  # as another process finds it
    with pytest.raises(Refused, match="has carried out 3 orders of this study, all that it allows"):
        Hospital(hospital.path).serve(STUDY.canonical())
    assert hospital.orders(STUDY.hash).last
    approve(hospital)
    hospital.serve(STUDY.canonical())
    assert hospital.orders(STUDY.hash).count == 1


def test_orders_at_the_same_time_are_all_counted(hospital: Hospital) -> None:
    approve(hospital)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: hospital.serve(STUDY.canonical()), range(20)))
    assert hospital.orders(STUDY.hash).count == 20


def reply(**evaluation: float) -> RecordDict:
    update = {"encoder.w": np.ones((2, 3), np.float32), "head.w": np.ones(5, np.float32)}
    return wire.pack_reply(wire.Reply(STUDY.hash, 0, 1, "north", 12, {"loss": 1.0, "seconds": 2.0}, evaluation), update)


def test_what_leaves_is_entered_and_what_is_withheld_does_not_leave(hospital: Hospital) -> None:
    approve(hospital)
    content = reply(probe_auc=0.5, knn_auc=0.5)
    change(hospital, 'metrics = ["*"]', 'metrics = ["loss", "probe_*"]').leaving("train", content)
    sent, update = wire.unpack_reply(content)
    assert (sent.train, sent.evaluation) == ({"loss": 1.0}, {"probe_auc": 0.5})
    assert update is not None
    (entry,) = hospital.ledger.entries()
    assert entry["metrics"] == {"loss": 1.0, "probe_auc": 0.5}
    assert entry["patients"] == 12


def test_an_update_does_not_leave_once_the_approval_is_withdrawn(hospital: Hospital) -> None:
    approve(hospital)
    hospital.withdraw(STUDY.hash)
    kept = hospital.path / "state" / STUDY.hash[:16]
    kept.mkdir()  # by the round that was under way
    with pytest.raises(Refused, match="has withdrawn its approval"):
        hospital.leaving("train", reply())
    assert list(hospital.ledger.entries()) == []
    assert not kept.exists()


def test_what_was_made_from_other_patients_goes_with_a_new_approval(hospital: Hospital, tmp_path: Path) -> None:
    approve(hospital)
    kept = hospital.path / "state" / STUDY.hash[:16] / "update-0001.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"an update")
    approve(hospital)
    assert kept.exists()
    approval = hospital.path / "approved" / f"{STUDY.hash}.json"
    before = json.loads(approval.read_text())
    approval.write_text(json.dumps({**before, "digest": "of other images"}))
    approve(hospital)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('tensors = ["*"]', 'tensors = ["encoder.*"]', "keeps 1 of the update's 2 tensors here, head.w among them"),
        ("max_megabytes = 1000.0", "max_megabytes = 0.00001", "one of the study has 0.0 MB"),
    ],
)
def test_an_update_that_may_not_leave_does_not_and_is_not_entered(
    old: str, new: str, says: str, hospital: Hospital
) -> None:
    narrowed = change(hospital, old, new)
    with pytest.raises(Refused, match=says):
        narrowed.leaving("train", reply())
    assert list(hospital.ledger.entries()) == []
    narrowed.leaving("train", "the reason")
    assert [entry["error"] for entry in hospital.ledger.entries()] == ["the reason"]


def test_an_approval_says_whom_it_is_about_and_what_will_leave(hospital: Hospital) -> None:
    approve(hospital)
    found = hospital.approvals()[STUDY.hash]
    assert found.patients == 10
    (tensors,) = found.leaves
    assert tensors == {name: value.nbytes for name, value in initial_tensors(STUDY, 0, None).items()}


def test_a_damaged_approval_lets_nothing_run(hospital: Hospital) -> None:
    approve(hospital)
    path = hospital.path / "approved" / f"{STUDY.hash}.json"
    for damaged in ("{", "[]", '{"study": "x"}'):
        path.write_text(damaged)
        with pytest.raises(Refused, match="cannot be read"):
            hospital.serve(STUDY.canonical())
    hospital.withdraw(STUDY.hash)
    approve(hospital)
    hospital.serve(STUDY.canonical())


def test_a_secret_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    inner = Path.replace

    def noting(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return inner(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    before = os.umask(0o022)
    try:
        write_secret(tmp_path / "key", b"secret")
        assert os.umask(0o022) == 0o022  # as it was
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (tmp_path / "key").read_bytes() == b"secret"


def test_other_images_than_those_approved_are_refused(hospital: Hospital, tmp_path: Path) -> None:
    approve(hospital)
    (tmp_path / "images" / "0.png").unlink()
    hospital.cohort_for(STUDY)  # as another study's approval does
    with pytest.raises(CohortError, match="have changed since it approved"):
        hospital.serve(STUDY.canonical())


def answer(**changes: str) -> str:
    plain = {
        "name": "north",
        "coordinator": "c",
        "address": "c.example:443",
        "authority": AUTHORITY,
        "bundle": bundle_hash(),
    }
    return Join(**{**plain, **changes}).model_dump_json()  # type: ignore[arg-type]


def test_the_answer_is_kept_if_it_is_for_this_site_and_version(hospital: Hospital, tmp_path: Path) -> None:
    file = tmp_path / "join.json"
    for wrong, says in (({"name": "south"}, "is for 'south'"), ({"bundle": "0" * 64}, "another version")):
        file.write_text(answer(**wrong))
        with pytest.raises(Refused, match=says):
            hospital.join(file)
        assert hospital.joined is None
    file.write_text(answer())
    hospital.join(file)
    assert Hospital(hospital.path).joined == read_file(file, Join)


def test_min_patients_counts_nobody_who_is_only_measured_by(hospital: Hospital) -> None:
    elsewhere = {"labels": {"a": ["x"], "b": ["y"]}, "rows": []}
    study = tiny_study(stages=[{"kind": "finetune", "rounds": 2}], evaluation=elsewhere)
    cohort = hospital.cohort_for(study)
    assert hospital.trains_on(study, cohort) == [None]
    with pytest.raises(CohortError, match="too few patients"):
        change(hospital, "min_patients = 2", "min_patients = 10").approve(study, cohort)


def test_min_patients_counts_those_that_are_trained_on(hospital: Hospital) -> None:
    cohort = hospital.cohort_for(STUDY)
    (training,) = hospital.trains_on(STUDY, cohort)
    assert training is not None
    trained = training.n_patients
    assert 2 <= trained < cohort.n_patients == 10
    change(hospital, "min_patients = 2", f"min_patients = {trained}").approve(STUDY, cohort)
    with pytest.raises(CohortError, match="too few patients"):
        change(hospital, "min_patients = ", f"min_patients = {trained + 1} #").serve(STUDY.canonical())
