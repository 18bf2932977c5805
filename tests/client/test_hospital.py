"""A hospital's folder: its key, what it approves, what it refuses."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.bundle import bundle_hash
from polyclinic.enrolment import Join, Request, fingerprint, read_file
from polyclinic.errors import CohortError, Refused
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
    hospital.withdraw(STUDY.hash)
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
    ],
)
def test_the_policy_binds_what_was_approved_before(old: str, new: str, says: str, hospital: Hospital) -> None:
    approve(hospital)
    with pytest.raises(Refused, match=says):
        change(hospital, old, new).serve(STUDY.canonical())


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
