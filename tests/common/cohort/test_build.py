"""Building: what comes out of each kind of source, what a second build does, and what trouble costs."""

import csv
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate

from polyclinic.cohort import Cohort, build, build_cohort, index, open_cohort, pool, store, union
from polyclinic.cohort.card import make_card
from polyclinic.cohort.identity import load_key
from polyclinic.cohort.index import read_facts, read_meta, require_patients
from polyclinic.cohort.intake import Facts
from polyclinic.cohort.scan import Scan, scan
from polyclinic.errors import CohortError, PolyclinicError, StorageError
from polyclinic.study import Images

Write = Callable[..., Path]


@pytest.fixture
def chest(tmp_path: Path, png: Write) -> Path:
    """A CSV cohort: 60 images of 25 patients, two labels, two sites, and three rows that cannot be used."""
    folder = tmp_path / "chest"
    rows = ["image,label,patient,site,view,split"]
    for k in range(60):
        png(folder / "images" / f"{k}.png", k)
        rows.append(
            f"images/{k}.png,{'sick' if k % 5 % 2 else 'well'},P{k % 25},{'north' if k % 25 < 10 else 'south'},PA,"
        )
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "0.png").read_bytes()[:60])
    (folder / "images" / "text.png").write_text("not an image")
    rows += ["images/broken.png,sick,P1,north,PA,", "images/text.png,sick,P1,north,PA,", "images/gone.png,sick,P1,,,"]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def same(a: Cohort, b: Cohort) -> bool:
    """Whether two cohorts hold the same images in the same order with the same words."""
    names = ("patients", "labels", "sites", "views", "scanners", "splits")
    words = all((getattr(a, name) == getattr(b, name)).all() for name in names)
    return len(a) == len(b) and words and bool((a.images[a.rows] == b.images[b.rows]).all())


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every file that is read is an error."""
    monkeypatch.setattr(pool, "WORKER", "polyclinic.no_such_module")


def test_csv_cohort(chest: Path, tmp_path: Path, images: Images) -> None:
    calls: list[tuple[int, int]] = []
    cohort = build_cohort(chest, images, tmp_path / "state", progress=lambda done, total: calls.append((done, total)))
    assert (len(cohort), cohort.n_patients) == (60, 25)
    assert cohort.images.shape[1:] == (1, 32, 32)
    assert (np.diff(cohort.patients) >= 0).all() and set(np.diff(cohort.patients)) == {0, 1}
    assert set(cohort.labels) == {"sick", "well"} and set(cohort.sites) == {"north", "south"}
    for patient in range(25):  # one patient, one site
        assert len(set(cohort.sites[cohort.patients == patient])) == 1
    assert calls[-1] == (63, 63) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    meta = read_meta(cohort.folder)
    assert (meta["files"], meta["files_used"]) == (63, 60)
    assert meta["quarantine"] == {"damaged": 1, "not_an_image": 1, "missing": 1}
    with (cohort.folder / "quarantine.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert sorted(row["reason"] for row in listed) == ["damaged", "missing", "not_an_image"]
    assert all(len(row["id"]) == 32 and row["meaning"] for row in listed)


def test_images_are_what_pillow_says(chest: Path, tmp_path: Path, images: Images) -> None:
    from PIL import Image

    cohort = build_cohort(chest, images, tmp_path / "state")
    expected = {
        np.asarray(Image.open(chest / "images" / f"{k}.png").resize((32, 32), Image.Resampling.BILINEAR)).tobytes()
        for k in range(60)
    }
    assert {np.asarray(image).tobytes() for image in cohort.images[cohort.rows]} == expected
    pixels = cohort.pixels([3, 0])
    assert pixels.shape == (2, 1, 32, 32) and (pixels[1].numpy() == cohort.images[cohort.rows[0]]).all()


def test_class_folders(tmp_path: Path, png: Write, images: Images) -> None:
    for k in range(12):
        png(tmp_path / "scans" / ("cat" if k % 3 else "dog") / f"{k}.png", k)
    cohort = build_cohort(tmp_path / "scans", images, tmp_path / "state")
    assert cohort.n_patients == 12 and sorted(cohort.labels) == ["cat"] * 8 + ["dog"] * 4
    meta = read_meta(cohort.folder)
    assert meta["own_patients"] and "patient of its own" in meta["warnings"][0]
    with pytest.raises(CohortError, match="nothing says which images are of one patient"):
        require_patients(cohort.folder)


def test_many_folders_are_no_classes(
    tmp_path: Path, png: Write, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.cohort.limits.MAX_CLASSES", 3)
    for k in range(4):
        png(tmp_path / "scans" / f"Erika{k}" / "1.png", k)
    cohort = build_cohort(tmp_path / "scans", images, tmp_path / "state")
    assert set(cohort.labels) == {""} and len(read_meta(cohort.folder)["warnings"]) == 2


def test_a_folder_of_cohorts_is_told(tmp_path: Path, png: Write, images: Images) -> None:
    for site in ("north", "south"):
        png(tmp_path / "sites" / site / "1.png", len(site))
        (tmp_path / "sites" / site / "labels.csv").write_text("image\n1.png\n")
    warnings = read_meta(build_cohort(tmp_path / "sites", images, tmp_path / "state").folder)["warnings"]
    assert any("is each one a cohort by itself?" in text for text in warnings)


def test_columns_that_are_not_read_are_warned_of(tmp_path: Path, png: Write, images: Images) -> None:
    """Each image is its own patient, so that one patient may be trained on and tested: that must not be silent."""
    for k in range(4):
        png(tmp_path / "a" / f"{k}.png", k)
    lines = ["image,Diagnosis,patient_id", *(f"{k}.png,ill,P{k // 2}" for k in range(4))]
    (tmp_path / "a" / "labels.csv").write_text("\n".join(lines))
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert (cohort.n_patients, set(cohort.labels)) == (4, {""})
    [warning] = [text for text in read_meta(cohort.folder)["warnings"] if "not read" in text]
    assert "'Diagnosis' (if it is meant as `label`" in warning
    assert "'patient_id' (if it is meant as `patient`" in warning
    (tmp_path / "a" / "labels.csv").write_text("\n".join(["image,label,patient", *lines[1:]]))
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert (cohort.n_patients, read_meta(cohort.folder)["warnings"]) == (2, [])


def test_dicom_tree_beside_labels(tmp_path: Path, dicom: Write, images: Images) -> None:
    folder, rows = tmp_path / "archive", ["image,label,view"]
    for k in range(10):
        dicom(folder / f"p{k % 4}" / f"{k}.dcm", k, PatientID=f"ID{k % 4}", ViewPosition="AP")
        rows.append(f"p{k % 4}/{k}.dcm,{'nodule' if k % 2 else 'none'},{'PA' if k < 3 else ''}")
    (folder / "labels.csv").write_text("\n".join(rows))
    cohort = build_cohort(folder, images, tmp_path / "state")
    assert (len(cohort), cohort.n_patients) == (10, 4)
    assert sorted(cohort.labels) == ["nodule"] * 5 + ["none"] * 5
    assert sorted(cohort.views) == ["AP"] * 7 + ["PA"] * 3


def test_dicom_tree_alone(tmp_path: Path, dicom: Write, png: Write, images: Images) -> None:
    """Without a CSV its directories, which may be named after patients, label nothing; previews have no patient."""
    folder = tmp_path / "archive"
    for k in range(6):
        dicom(folder / "Mustermann" / f"IM{k}", k, PatientID=f"ID{k // 2}")
    dicom(folder / "IM9", 9, PatientID="")
    png(folder / "Mustermann" / "preview.png")
    (folder / "DICOMDIR").write_bytes(b"nothing in it")
    cohort = build_cohort(folder, images, tmp_path / "state")
    assert (len(cohort), cohort.n_patients, set(cohort.labels)) == (6, 3, {""})
    assert read_meta(cohort.folder)["quarantine"] == {"no_patient": 2, "not_an_image": 1}


def test_a_stray_dicom_file_does_not_spoil_class_folders(
    tmp_path: Path, dicom: Write, png: Write, images: Images
) -> None:
    for k in range(3):
        png(tmp_path / "scans" / "cat" / f"{k}.png", k)
    dicom(tmp_path / "scans" / "dog" / "IM1", 1)
    cohort = build_cohort(tmp_path / "scans", images, tmp_path / "state")
    assert sorted(cohort.labels) == ["cat", "cat", "cat", "dog"] and cohort.n_patients == 4


def test_sex_and_age_are_of_the_csv_then_of_the_header(tmp_path: Path, dicom: Write, images: Images) -> None:
    folder = tmp_path / "a"
    for k, (sex, age) in enumerate([("F", "041Y"), ("M", "093Y"), ("O", "006M"), ("", "")]):
        dicom(folder / f"{k}.dcm", k, PatientID=f"P{k}", PatientSex=sex, PatientAge=age)
    bare = build_cohort(folder, images, tmp_path / "state", workers=1)
    assert sorted(zip(bare.sexes.tolist(), np.nan_to_num(bare.ages, nan=-1).tolist(), strict=True)) == [
        ("", -1.0), ("F", 41.0), ("M", 90.0), ("O", 0.5)
    ]  # fmt: skip
    rows = ["image,label,sex,age", "0.dcm,a,male,12", "1.dcm,b,,mid 50s", "2.dcm,c,x,", "3.dcm,d,,"]
    (folder / "labels.csv").write_text("\n".join(rows))
    said = build_cohort(folder, images, tmp_path / "state", workers=1)
    found = dict(zip(said.labels.tolist(), zip(said.sexes.tolist(), said.ages.tolist(), strict=True), strict=True))
    assert found["a"] == ("M", 12.0) and found["b"] == ("M", 90.0) and found["c"] == ("O", 0.5)
    assert found["d"][0] == "" and np.isnan(found["d"][1])
    assert read_meta(said.folder)["warnings"] == [
        "values of the column 'age' that mean nothing are taken as unknown: 1",
        "values of the column 'sex' that mean nothing are taken as unknown: 1",
    ]
    assert not {"sex", "age", "sexes", "ages"} & make_card(said.folder).keys()
    some = union([said.select([0, 2]), said.select([1, 3])])
    order = [0, 2, 1, 3]
    assert (some.sexes == said.sexes[order]).all() and np.array_equal(some.ages, said.ages[order], equal_nan=True)


def test_scanners_are_of_the_csv_then_numbers_that_no_key_changes(tmp_path: Path, dicom: Write, images: Images) -> None:
    folder, rng = tmp_path / "a", np.random.default_rng(0)
    for k in range(12):  # of four machines, the first one nameless, each with images of its own height
        machine = {"Manufacturer": "Mustermann", "DeviceSerialNumber": f"SN{k % 4}"} if k % 4 else {}
        dicom(folder / f"{k}.dcm", rng.integers(0, 4096, (24 + k % 4, 20), np.uint16), PatientID=f"P{k}", **machine)
    one, two = (build_cohort(folder, images, tmp_path / state, workers=1) for state in ("one", "two"))  # of two keys
    assert one.scanners.tolist() == two.scanners.tolist()
    told = dict(zip(read_facts(one.folder)["height"].tolist(), one.scanners.tolist(), strict=True))
    assert told.pop(24) == ""
    assert list(dict.fromkeys(filter(None, one.scanners.tolist()))) == ["scanner-1", "scanner-2", "scanner-3"]
    assert sorted(told.values()) == ["scanner-1", "scanner-2", "scanner-3"]
    assert Counter(one.scanners.tolist()) == {"": 3, "scanner-1": 3, "scanner-2": 3, "scanner-3": 3}
    rows = [f"{k}.dcm,{'Room 2' if k < 2 else ''}" for k in range(12)]
    (folder / "labels.csv").write_text("\n".join(["image,scanner", *rows]))
    said = build_cohort(folder, images, tmp_path / "one", workers=1)
    assert sorted(Counter(said.scanners.tolist()).values()) == [2, 2, 2, 3, 3]
    assert (said.scanners == "Room 2").sum() == 2
    assert not {"scanner", "scanners"} & make_card(said.folder).keys()
    some = union([said.select([0, 2]), said.select([1, 3])])
    assert some.scanners.tolist() == said.scanners[[0, 2, 1, 3]].tolist()
    rows = [row.replace("Room 2", "scanner-1") for row in rows]  # a word of the table's own: no machine gets it
    (folder / "labels.csv").write_text("\n".join(["image,scanner", *rows]))
    clash = build_cohort(folder, images, tmp_path / "one", workers=1)
    assert sorted(Counter(clash.scanners.tolist()).values()) == [2, 2, 2, 3, 3]


def test_the_digest_holds_sex_and_age_where_they_are_known(tmp_path: Path, png: Write, images: Images) -> None:
    def digest(columns: str, cells: str) -> str:
        (tmp_path / "a" / "labels.csv").write_text(f"image,label,patient{columns}\n1.png,x,P{cells}\n2.png,y,Q\n")
        return str(read_meta(build_cohort(tmp_path / "a", images, tmp_path / "state", workers=1).folder)["digest"])

    files = {
        label: hashlib.sha256(png(tmp_path / "a" / f"{k}.png", k).read_bytes()) for k, label in ((1, "x"), (2, "y"))
    }
    shas = sorted((sha.hexdigest(), label) for label, sha in files.items())
    without = hashlib.sha256(json.dumps([[k, sha, label, ""] for k, (sha, label) in enumerate(shas)]).encode())
    assert {digest("", ""), digest(",sex,age", ",,"), digest(",age", ",?")} == {without.hexdigest()}
    others = {digest(",sex,age", cells) for cells in (",F,", ",M,", ",,58", ",,59", ",F,58")}
    others |= {digest(",scanner", cell) for cell in (",Room 1", ",Room 2")}
    assert len(others | {without.hexdigest()}) == 8


def test_an_index_of_another_version_is_not_misread(
    tmp_path: Path, png: Write, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    png(tmp_path / "a" / "x" / "1.png")
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state", workers=1)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    with pytest.raises(CohortError, match="built by another version"):
        open_cohort(cohort.folder)


def test_patients_of_csv_and_header_are_the_same(tmp_path: Path, dicom: Write, images: Images) -> None:
    dicom(tmp_path / "a" / "1.dcm", 1, PatientID="P7 ")
    dicom(tmp_path / "a" / "2.dcm", 2, PatientID="other")
    (tmp_path / "a" / "labels.csv").write_text("image,patient\n1.dcm,\n2.dcm,P7\n")
    assert build_cohort(tmp_path / "a", images, tmp_path / "state").n_patients == 1


def test_a_csv_that_knows_patients_must_know_all(tmp_path: Path, png: Write, images: Images) -> None:
    for k in range(3):
        png(tmp_path / "a" / f"{k}.png", k)
    (tmp_path / "a" / "labels.csv").write_text("image,patient\n0.png,P\n1.png,Q\n2.png,\n")
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert len(cohort) == 2 and read_meta(cohort.folder)["quarantine"] == {"no_patient": 1}


def test_blanked_identifiers_are_noticed(tmp_path: Path, dicom: Write, images: Images) -> None:
    for k in range(12):
        dicom(tmp_path / "a" / f"{k}", k, PatientID="ANON" if k else "P")
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert "one patient identifier" in read_meta(cohort.folder)["warnings"][0]


def test_one_image(tmp_path: Path, png: Write, images: Images) -> None:
    png(tmp_path / "a" / "x" / "1.png")
    cohort = build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert (len(cohort), cohort.n_patients) == (1, 1)


def test_nothing_to_use_is_an_error_with_counts(tmp_path: Path, images: Images) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="holds no files") as caught:
        build_cohort(tmp_path / "empty", images, tmp_path / "state")
    assert "quarantine" not in caught.value.fix
    for k in range(3):
        (tmp_path / "empty" / f"{k}.txt").write_text("text")
    os.mkfifo(tmp_path / "empty" / "pipe")
    with pytest.raises(CohortError, match=r"none of the 4 files .* 3 not_an_image, 1 not_a_file"):
        build_cohort(tmp_path / "empty", images, tmp_path / "state")


def test_burned_in_text_alone_says_how_to_allow_it(tmp_path: Path, dicom: Write, images: Images) -> None:
    for k, modality in enumerate(("US", "US", "SEG")):
        dicom(tmp_path / "a" / f"{k}", k, Modality=modality)
    with pytest.raises(CohortError, match=r"--allow-burned-in, or allow_burned_in = true") as error:
        build_cohort(tmp_path / "a", images, tmp_path / "state")
    assert "2 ultrasound, 1 derived" in error.value.problem
    dicom(tmp_path / "a" / "3", 3, Modality="SEG")
    with pytest.raises(CohortError, match=r"quarantine\.csv"):
        build_cohort(tmp_path / "a", images, tmp_path / "state")


def test_second_build_reads_nothing(
    chest: Path, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_cohort(chest, images, tmp_path / "state")
    no_reading(monkeypatch)
    assert same(build_cohort(chest / "labels.csv", images, tmp_path / "state"), first)


def test_only_what_is_new_is_decoded(chest: Path, tmp_path: Path, png: Write, images: Images) -> None:
    first = build_cohort(chest, images, tmp_path / "state")
    decoded = len(first.images)
    (chest / "images" / "0.png").rename(chest / "images" / "moved.png")  # known content in another place
    shutil.copy(chest / "images" / "1.png", chest / "images" / "copy.png")  # once more, of another patient
    png(chest / "images" / "2.png", 1002)  # changed
    png(chest / "images" / "new.png", 1000)
    text = (
        (chest / "labels.csv")
        .read_text()
        .replace("images/0.png", "images/moved.png")
        .replace("images/3.png,sick", "images/3.png,well")
    )
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("images/4.png"))
    (chest / "labels.csv").write_text(text + "images/copy.png,well,Q,,,\nimages/new.png,new,Q,,,\n")
    second = build_cohort(chest, images, tmp_path / "state")
    assert len(second.images) == decoded + 2
    assert len(second) == 60 - 1 + 2 and (second.labels == "new").sum() == 1
    assert (second.labels == "sick").sum() == (first.labels == "sick").sum() - 1 - 0
    assert same(second, build_cohort(chest, images, tmp_path / "fresh"))


def test_order_depends_on_contents_only(chest: Path, tmp_path: Path, images: Images) -> None:
    """Not on the key of the hashes, on the order of decoding, nor on the file names."""
    first = build_cohort(chest, images, tmp_path / "state", workers=2)
    other = tmp_path / "elsewhere"
    shutil.copytree(chest, other)
    for k in range(60):
        (other / "images" / f"{k}.png").rename(other / "images" / f"z{99 - k}.png")
    text = (other / "labels.csv").read_text()
    lines = [text.splitlines()[0]]
    lines += [
        line.replace(f"images/{k}.png", f"images/z{99 - k}.png") for k, line in enumerate(text.splitlines()[1:61])
    ]
    (other / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert load_key(tmp_path / "state") != load_key(tmp_path / "state2")
    assert same(build_cohort(other, images, tmp_path / "state2", workers=1), first)


def test_settings_have_caches_of_their_own(chest: Path, tmp_path: Path, images: Images) -> None:
    folders = {
        build_cohort(chest, settings, tmp_path / "state").folder
        for settings in (images, Images(size=16), Images(size=32, channels=3), Images(size=32, window=(40.0, 80.0)))
    }
    assert len(folders) == 4


def test_nothing_is_written_into_the_source(tmp_path: Path, png: Write, images: Images) -> None:
    png(tmp_path / "x" / "1.png")
    with pytest.raises(CohortError, match="--state DIR"):
        build_cohort(tmp_path, images, tmp_path / ".polyclinic")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_journal_cut_anywhere_is_completed(chest: Path, tmp_path: Path, images: Images) -> None:
    undisturbed = build_cohort(chest, images, tmp_path / "undisturbed")
    whole = build_cohort(chest, images, tmp_path / "state")
    journal = whole.folder / store.JOURNAL
    content, pixels = journal.read_bytes(), whole.folder / store.IMAGES
    for cut in np.random.default_rng(0).integers(0, len(content), 3):
        journal.write_bytes(content[:cut])
        with pixels.open("ab") as file:
            file.write(b"half an image")
        assert same(build_cohort(chest, images, tmp_path / "state"), undisturbed)
        content = journal.read_bytes()
    for line in (b"garbage\n", b"[1]\n", b'{"path": 1}\n', b"\xff\n", b"null\n"):
        journal.write_bytes(content + line + content)
        assert same(build_cohort(chest, images, tmp_path / "state"), undisturbed)
        assert journal.read_bytes() == content
    os.truncate(pixels, pixels.stat().st_size // 2)
    assert same(build_cohort(chest, images, tmp_path / "state"), undisturbed)


def test_full_disk_loses_nothing(chest: Path, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH", 8)
    append, calls = store._append, []

    def full(file: BinaryIO, parts: list[bytes]) -> None:
        calls.append(parts)
        if len(calls) > 5:
            append(file, [part[: len(part) // 2] for part in parts])
            raise OSError(28, "No space left on device")
        append(file, parts)

    monkeypatch.setattr(store, "_append", full)
    with pytest.raises(StorageError, match="no space left"):
        build_cohort(chest, images, tmp_path / "state")
    monkeypatch.setattr(store, "_append", append)
    (folder,) = (tmp_path / "state" / "cohorts").iterdir()
    assert (folder / store.JOURNAL).read_bytes().count(b"\n") >= 16  # the two whole batches
    assert same(build_cohort(chest, images, tmp_path / "state"), build_cohort(chest, images, tmp_path / "fresh"))


def test_many_bytes_are_committed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files can hold much; the disk has them before the next one is read."""
    monkeypatch.setattr(store, "BATCH_BYTES", 30)
    with store.Store(tmp_path, stride=10) as opened:
        sizes = []
        for k in range(5):
            opened.add(str(k), (k, 0, 0), f"sha{k}", store.Record(Facts(), count=1), bytes(20))
            sizes.append((tmp_path / store.IMAGES).stat().st_size)
    assert sizes == [0, 40, 40, 80, 80] and (tmp_path / store.IMAGES).stat().st_size == 100
    assert (tmp_path / store.JOURNAL).read_bytes().count(b"\n") == 5


def test_a_state_directory_that_cannot_be_made(chest: Path, tmp_path: Path, images: Images) -> None:
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(StorageError, match="not a directory"):
            build_cohort(chest, images, state)


def test_hanging_and_crashing_decoders_are_quarantined_for_good(
    tmp_path: Path, png: Write, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = (
        "import ctypes, time\nfrom polyclinic.cohort import worker\nwhole = worker.decode\n"
        "def decode(data, intake, key):\n"
        "    if data == b'hang': time.sleep(1e6)\n"
        "    if data == b'crash': ctypes.string_at(0)\n"
        "    return whole(data, intake, key)\n"
        "worker.decode = decode\nworker.main()\n"
    )
    (tmp_path / "troubled_build_worker.py").write_text(trouble)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "WORKER", "troubled_build_worker")
    folder = tmp_path / "scans"
    for k in range(20):
        png(folder / "x" / f"{k}.png", k)
    (folder / "x" / "hang.png").write_bytes(b"hang")
    (folder / "x" / "crash.png").write_bytes(b"crash")
    cohort = build_cohort(folder, images, tmp_path / "state", timeout_s=2.0)
    assert len(cohort) == 20 and read_meta(cohort.folder)["quarantine"] == {"crashed": 1, "timeout": 1}
    no_reading(monkeypatch)
    assert read_meta(build_cohort(folder, images, tmp_path / "state").folder)["files"] == 22


def test_a_pipe_in_the_place_of_a_file_costs_its_deadline(
    tmp_path: Path, png: Write, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It blocks whoever opens it: no process but a worker may, and nothing is remembered of it."""
    folder = tmp_path / "scans"
    for k in range(3):
        png(folder / "x" / f"{k}.png", k)
    pipe, kept = folder / "x" / "1.png", (folder / "x" / "1.png").read_bytes()

    def scan_then_swap(path: Path) -> Scan:
        found = scan(path)
        pipe.unlink()
        os.mkfifo(pipe)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(build, "scan", scan_then_swap)
        cohort = build_cohort(folder, images, tmp_path / "state", timeout_s=1.0)
    assert len(cohort) == 2 and read_meta(cohort.folder)["quarantine"] == {"timeout": 1}
    pipe.unlink()
    pipe.write_bytes(kept)
    assert len(build_cohort(folder, images, tmp_path / "state")) == 3


BUILD = """
import sys
from pathlib import Path
from polyclinic.cohort import build_cohort, store
from polyclinic.study import Images
store.BATCH = 4
print("start", flush=True)
build_cohort(Path(sys.argv[1]), Images(size=32), Path(sys.argv[2]), workers=2,
             progress=lambda done, total: print(done, flush=True))
"""


def building(source: Path, state: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", BUILD, str(source), str(state)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for orphans in /proc")
def test_kill_9_at_random_moments(chest: Path, tmp_path: Path, images: Images) -> None:
    undisturbed = build_cohort(chest, images, tmp_path / "undisturbed")
    generator, workers = np.random.default_rng(1), set[int]()
    for moment in (0, 5, *generator.integers(1, 60, 3)):
        process = building(chest, tmp_path / "state")
        assert process.stdout is not None
        for line in process.stdout:
            workers |= set(children(process.pid))
            if line.strip() != "start" and int(line) >= moment:
                break
        time.sleep(float(generator.uniform(0, 0.02)))
        process.kill()
        process.wait()
        process.stdout.close()
    assert same(build_cohort(chest, images, tmp_path / "state"), undisturbed)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_interrupt_keeps_what_was_read(chest: Path, tmp_path: Path, images: Images) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cohort(chest, images, tmp_path / "state", progress=interrupt)
    calls: list[int] = []
    cohort = build_cohort(chest, images, tmp_path / "state", progress=lambda done, total: calls.append(done))
    assert len(cohort) == 60 and len(calls) <= 33


def test_two_builds_at_once(chest: Path, tmp_path: Path, images: Images) -> None:
    both = [building(chest, tmp_path / "state") for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(output.splitlines()) > 3 for output in outputs) == [False, True]  # one of them did it all
    (folder,) = (tmp_path / "state" / "cohorts").iterdir()
    assert (folder / store.JOURNAL).read_bytes().count(b"\n") == 62
    assert same(open_cohort(folder), build_cohort(chest, images, tmp_path / "other"))


def test_lost_or_damaged_files_of_a_built_cohort_are_errors(chest: Path, tmp_path: Path, images: Images) -> None:
    folder = build_cohort(chest, images, tmp_path / "state").folder
    content = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(CohortError, match="no built cohort"):
        open_cohort(folder)
    (folder / "index.npz").write_bytes(content)
    os.truncate(folder / store.IMAGES, 1000)
    with pytest.raises(CohortError, match="cut short"):
        open_cohort(folder)
    with pytest.raises(CohortError, match="no built cohort"):
        open_cohort(tmp_path)


def test_key_is_private_and_stays(tmp_path: Path) -> None:
    key = load_key(tmp_path / "state")
    path = tmp_path / "state" / "identity.key"
    assert load_key(tmp_path / "state") == key == path.read_bytes() and len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(key[:10])
    with pytest.raises(StorageError, match="10 bytes"):
        load_key(tmp_path / "state")


def test_keys_made_at_once_are_one(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom polyclinic.cohort.identity import load_key\n"
        "print(load_key(Path(sys.argv[1])).hex())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    assert len({process.communicate()[0] for process in both}) == 1
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_select_and_union(chest: Path, tmp_path: Path, images: Images) -> None:
    cohort = build_cohort(chest, images, tmp_path / "state")
    some = cohort.select([7, 3, 3])
    assert some.n_patients == 2 and some.images is cohort.images
    assert (some.pixels(slice(None)).numpy() == cohort.images[cohort.rows[np.isin(cohort.patients, [3, 7])]]).all()
    rest = cohort.select(np.setdiff1d(np.arange(25), [3, 7]))
    joined = union([some, rest])
    assert len(joined) == 60 and joined.n_patients == 25
    assert (joined.patients[: len(some)] == some.patients).all() and joined.patients[len(some)] == 2
    order = [0, len(some), 59, 1]
    expected = np.concatenate([some.pixels(slice(None)), rest.pixels(slice(None))])[order]
    assert (joined.pixels(order).numpy() == expected).all()
    assert (joined.select([2]).pixels([0]).numpy() == rest.pixels([0]).numpy()).all()
    assert len(cohort.select([])) == 0 and cohort.select([]).n_patients == 0
    with pytest.raises(IndexError):
        cohort.select([25])
    with pytest.raises(ValueError, match="sizes"):
        union([cohort, build_cohort(chest, Images(size=16), tmp_path / "state")])


def test_meta_and_index_hold_no_objects(chest: Path, tmp_path: Path, images: Images) -> None:
    folder = build_cohort(chest, images, tmp_path / "state").folder
    with np.load(folder / "index.npz", allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "fiU" for name in file.files)
        json.loads(str(file["meta"]))


def test_files_without_a_decoder_are_tried_again_when_decoders_change(
    tmp_path: Path, dicom: Write, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archive"
    dicom(folder / "1.dcm", 1)
    ds = dcmread(dicom(folder / "2.dcm", 2))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    ds.PixelData = encapsulate([b"\0\1"])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(folder / "2.dcm")
    for _ in range(2):
        cohort = build_cohort(folder, images, tmp_path / "state")
        assert read_meta(cohort.folder)["quarantine"] == {"no_decoder": 1}
        no_reading(monkeypatch)
    monkeypatch.setattr(build, "installed_decoders", lambda: ["a new one 1.0"])
    with pytest.raises(PolyclinicError, match="do not start"):  # it wants to read
        build_cohort(folder, images, tmp_path / "state")


def test_warnings_made_errors_do_not_reach_the_workers(
    samples: Path, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = build_cohort(samples, images, tmp_path / "state")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert same(build_cohort(samples, images, tmp_path / "strict"), usual)
