"""What must stand nowhere: identifiers, header text and paths, in any byte that a build leaves or prints."""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from polyclinic.cohort import build_cohort
from polyclinic.cohort.card import card_html, make_card
from polyclinic.errors import CohortError
from polyclinic.study import Images

Write = Callable[..., Path]
NAMED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "OtherPatientIDs", "AccessionNumber", "StudyDate",
    "InstitutionName", "ReferringPhysicianName", "StudyDescription", "StudyInstanceUID", "SOPInstanceUID",
    "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber",
)  # fmt: skip


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file but the raw pixels, whose bytes are no text."""
    for path in folder.rglob("*"):
        yield "name", path.name.encode()
        if path.is_file() and path.name != "images.u8":
            yield path.name, path.read_bytes()


def test_nothing_that_names_a_patient_is_left_behind(
    tmp_path: Path, dicom: Write, images: Images, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    header = {
        "PatientName": "Mustermann^Erika", "PatientID": "MRN-4711-0815", "PatientBirthDate": "19640812",
        "InstitutionName": "Klinikum Musterstadt", "AccessionNumber": "ACC-99887766", "StudyDate": "20260314",
        "ReferringPhysicianName": "Brinkmann^Klaus", "StudyDescription": "Verdacht auf Pneumonie",
        "Manufacturer": "Praxis Dr. Mustermann", "ManufacturerModelName": "Raum von Schwester Agathe",
        "DeviceSerialNumber": "SN-0815-Brinkmann",
    }  # fmt: skip
    folder = tmp_path / "archive"
    for k in range(4):
        dicom(folder / "Mustermann_Erika" / f"secretname{k}.dcm", k, **header)
    dicom(folder / "Mustermann_Erika" / "burned.dcm", 9, BurnedInAnnotation="YES", **header)
    cut = folder / "Mustermann_Erika" / "cut.dcm"
    cut.write_bytes(dicom(cut, 10, **header).read_bytes()[:-300])
    (folder / "MRN-4711-0815.txt").write_text("notes on Mustermann")
    lines = ["image,label,patient,site"]
    lines += [f"{path.relative_to(folder)},sick,CSV-PATIENT-7,north" for path in sorted(folder.rglob("*.*"))]
    for source, table in (("tree", None), ("csv", lines)):
        if table:
            (folder / "labels.csv").write_text("\n".join(table))
        cohort = build_cohort(folder, images, tmp_path / source)
        card = make_card(cohort.folder)
        assert (card["images"], card["quarantine"]) == (4, {"not_an_image": 1, "burned_in": 1, "damaged": 1})
        texts = [*written(tmp_path / source), ("card", (str(card) + card_html(card)).encode())]
        texts += [("output", "".join(capfd.readouterr()).encode()), ("log", caplog.text.encode())]
        forbidden = [*header.values(), "Mustermann", "Erika", "Agathe", "secretname", "CSV-PATIENT", "archive", "4711"]
        for name, data in texts:
            for word in forbidden:
                assert word.lower().encode() not in data.lower(), f"{word} in {name}"


@pytest.mark.filterwarnings("ignore::UserWarning")  # the test's own reading of damaged headers
def test_no_identifier_of_the_samples_is_left_behind(samples: Path, tmp_path: Path, images: Images) -> None:
    """Every identifying value of six characters or more, as pydicom reads it; shorter ones occur in any file."""
    forbidden = {path.name for path in samples.iterdir()}
    for path in sorted(samples.glob("*.dcm")):
        header = dcmread(path, force=True, stop_before_pixels=True)
        forbidden |= {str(header.get(name, "")).strip() for name in NAMED}
    forbidden = {word for word in forbidden if len(word) >= 6}
    assert len(forbidden) > 100
    cohort = build_cohort(samples, images, tmp_path / "state", allow_burned_in=True)
    texts = [*written(tmp_path / "state"), ("card", str(make_card(cohort.folder)).encode())]
    for name, data in texts:
        for word in forbidden:
            assert word.encode() not in data, f"{word} in {name}"


def test_samples_are_all_accounted_for(samples: Path, tmp_path: Path, images: Images) -> None:
    for allow in (False, True):
        cohort = build_cohort(samples, images, tmp_path / "state", allow_burned_in=allow)
        card = make_card(cohort.folder)
        assert card["files"] == len(list(samples.iterdir()))
        assert card["files_used"] + sum(card["quarantine"].values()) == card["files"]
        with (cohort.folder / "quarantine.csv").open() as file:
            assert len(list(csv.DictReader(file))) == sum(card["quarantine"].values())
        assert card["quarantine"]["no_pixels"] >= 6 and "crashed" not in card["quarantine"]
        assert card["images"] >= (30 if allow else 13)


def test_errors_and_tracebacks_name_nothing(tmp_path: Path, dicom: Write, images: Images) -> None:
    dicom(tmp_path / "archive" / "Mustermann.dcm", PatientName="Mustermann^Erika", Modality="US")
    with pytest.raises(CohortError) as error:
        build_cohort(tmp_path / "archive", images, tmp_path / "state")
    assert "Mustermann" not in str(error.value) and "1 ultrasound" in str(error.value)


def test_worker_keeps_the_key_off_its_command_line(tmp_path: Path, png: Write, images: Images) -> None:
    """Command lines and environments can be read by others on the machine."""
    code = (
        "import subprocess, sys\nfrom pathlib import Path\n"
        "from polyclinic.cohort import build_cohort, identity\nfrom polyclinic.study import Images\n"
        "seen = []\nstart = subprocess.Popen.__init__\n"
        "def spy(self, *args, **kwargs):\n    seen.append(repr((args, kwargs)))\n    start(self, *args, **kwargs)\n"
        "subprocess.Popen.__init__ = spy\n"
        "build_cohort(Path(sys.argv[1]), Images(size=16), Path(sys.argv[2]))\n"
        "key = identity.load_key(Path(sys.argv[2]))\n"
        "assert seen and not any(key.hex() in text or repr(key) in text for text in seen)\n"
    )
    png(tmp_path / "a" / "x" / "1.png")
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "state")]
    subprocess.run(command, check=True, env=environment, timeout=60)
