"""What stands on the disk: whole DICOM files, complete labels, and the same bytes from the same seed."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from polyclinic.errors import Refused
from polyclinic_simulations.phantom import identifiers, write_consortium, write_site
from polyclinic_simulations.phantom.difficulty import SHARES
from polyclinic_simulations.phantom.scanner import Scanner


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(site: Path) -> list[dict[str, str]]:
    with (site / "labels.csv").open() as file:
        return list(csv.DictReader(file))


def headers(site: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(site.rglob("*.dcm"))]


def test_same_seed_same_bytes_and_another_seed_others(consortium: Path, tmp_path: Path) -> None:
    write_consortium(tmp_path / "again", 5, 10, 3)
    assert content(tmp_path / "again") == content(consortium)
    write_site(tmp_path / "other", "north", 10, 4)
    assert not set(content(tmp_path / "other").values()) & set(content(consortium).values())


def test_a_site_of_a_consortium_is_the_site_alone(consortium: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "east", "east", 10, 3, number=1)
    assert content(tmp_path / "east") == content(consortium / "east")


def test_every_file_reads_as_its_header_says(consortium: Path) -> None:
    for path in sorted(consortium.rglob("*.dcm")):
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array
        assert pixels.shape == (ds.Rows, ds.Columns)
        assert 160 <= min(pixels.shape) <= max(pixels.shape) <= 256
        assert pixels.dtype.itemsize * 8 == ds.BitsAllocated
        assert pixels.max() < 2**ds.BitsStored
        assert len(np.unique(pixels)) > 100
        assert ds.BurnedInAnnotation == "NO"
        assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID


def test_borders_are_black_in_either_polarity(consortium: Path) -> None:
    seen = set()
    for path in sorted(consortium.rglob("*.dcm")):
        ds = pydicom.dcmread(path)
        black = 2**ds.BitsStored - 1 if ds.PhotometricInterpretation == "MONOCHROME1" else 0
        corner = ds.pixel_array[0, 0]
        if corner == black:
            seen.add(ds.PhotometricInterpretation)
        middle = ds.pixel_array[ds.Rows // 2 - 20 : ds.Rows // 2 + 20, ds.Columns // 2 - 20 : ds.Columns // 2 + 20]
        assert abs(float(middle.mean()) - black) > 0.25 * 2**ds.BitsStored, path.parent.parent.name
    assert seen == {"MONOCHROME1", "MONOCHROME2"}


def test_labels_list_every_file_once_with_its_view(consortium: Path) -> None:
    for site in consortium.iterdir():
        listed = rows(site)
        assert list(listed[0]) == ["image", "label", "view", "age"]
        assert sorted(row["image"] for row in listed) == sorted(k for k in content(site) if k.endswith(".dcm"))
        for row in listed:
            assert pydicom.dcmread(site / row["image"], stop_before_pixels=True).ViewPosition == row["view"]


def test_patients_have_one_label_and_one_to_four_images_the_first_from_behind(consortium: Path) -> None:
    for site in consortium.iterdir():
        by_patient: dict[str, list[dict[str, str]]] = {}
        for row in rows(site):
            patient = pydicom.dcmread(site / row["image"], stop_before_pixels=True).PatientID
            by_patient.setdefault(patient, []).append(row)
        assert len(by_patient) == 10
        assert all(1 <= len(images) <= 4 for images in by_patient.values())
        assert all(len({row["label"] for row in images}) == 1 for images in by_patient.values())
        assert all(images[0]["view"] == "PA" for images in by_patient.values())
        labels = Counter(images[0]["label"] for images in by_patient.values())
        assert labels == {label: share * 10 for label, share in SHARES.items()}
    assert {row["view"] for site in consortium.iterdir() for row in rows(site)} == {"PA", "LATERAL"}


def test_patients_have_one_age_of_the_labels_and_one_sex_of_the_header(consortium: Path) -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for site in consortium.iterdir():
        for row in rows(site):
            header = pydicom.dcmread(site / row["image"], stop_before_pixels=True)
            assert "PatientAge" not in header
            found.setdefault(header.PatientID, set()).add((row["age"], header.PatientSex))
    assert all(len(each) == 1 for each in found.values())
    ages = [int(age) for each in found.values() for age, _ in each]
    assert 18 <= min(ages) < 45 and 70 < max(ages) <= 89
    assert {sex for each in found.values() for _, sex in each} >= {"F", "M"}


def test_sites_differ_in_machine_and_agree_within(consortium: Path) -> None:
    machines = []
    for site in sorted(consortium.iterdir()):
        kinds = {
            (
                ds.file_meta.TransferSyntaxUID, ds.BitsStored, ds.PhotometricInterpretation, ds.Rows, ds.StationName,
                ds.Manufacturer + ds.DeviceSerialNumber,
            )
            for ds in headers(site)
        }  # fmt: skip
        assert len(kinds) == 1
        machines.append(kinds.pop())
    assert len({machine[0] for machine in machines}) == 5
    assert {machine[1] for machine in machines} == {8, 10, 12, 16}
    assert {machine[2] for machine in machines} == {"MONOCHROME1", "MONOCHROME2"}
    assert len({machine[4] for machine in machines}) == len({machine[5] for machine in machines}) == 5
    curves = {(s.gamma, s.gain, s.blur, s.noise) for s in (Scanner.of(site, 0, 3) for site in ("north", "east"))}
    assert len(curves) == 2


def test_identifiers_are_those_of_the_headers_and_of_the_files_names(consortium: Path) -> None:
    found = identifiers(consortium / "north")
    for ds in headers(consortium / "north"):
        assert {str(ds.PatientName), ds.PatientID, ds.AccessionNumber, ds.StudyInstanceUID, ds.SOPInstanceUID} <= found
        assert {ds.PatientName.family_name, ds.InstitutionName, ds.PatientBirthDate, ds.DeviceSerialNumber} <= found
        assert Path(ds.filename).stem in found and ds.PatientName.family_name in Path(ds.filename).name
    assert all(len(identifier) >= 8 for identifier in found)
    assert not {word for word in found if not word.isdigit()} & {"Phantom", "CHEST", "ORIGINAL", "normal"}


def test_sites_share_no_patient(consortium: Path) -> None:
    people = [{str(ds.PatientID) for ds in headers(site)} for site in consortium.iterdir()]
    assert len(set.union(*people)) == sum(map(len, people)) == 50


@pytest.mark.parametrize("inside", ["a file", "the folder is a file"])
def test_what_is_there_is_never_written_over(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "kept"
    if inside == "a file":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    else:
        folder.write_text("mine")
    with pytest.raises(Refused, match="not an empty folder"):
        write_site(folder, "north", 2, 0)
    with pytest.raises(Refused, match="not an empty folder"):
        write_consortium(folder, 2, 2, 0)
    assert (folder / "mine.txt" if folder.is_dir() else folder).read_text() == "mine"


def test_progress_counts_patients_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_consortium(tmp_path / "out", 2, 3, 0, lambda done, total: calls.append((done, total)))
    assert calls == [(k, 6) for k in range(1, 7)]
