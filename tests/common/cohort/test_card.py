"""The data-fitness card, and the command that prints it."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from scipy.fft import dctn

from polyclinic.cohort import Cohort, build_cohort, cli
from polyclinic.cohort.card import _near_duplicates, card_html, make_card
from polyclinic.cohort.duplicates import NEAR, near_duplicates, perceptual_hashes
from polyclinic.errors import PolyclinicError, Refused, StudyError
from polyclinic.study import Images

Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, dicom: Write, png: Write) -> Path:
    """Nine usable files of seven patients, one of three frames, and two for quarantine."""
    rows = ["image,label,patient,site"]
    for k in range(8):
        dicom(tmp_path / "a" / f"{k}.dcm", k, Modality="DX" if k < 5 else "CR", PatientID=f"P{k % 7}")
        rows.append(f"{k}.dcm,{'x|y' if k == 0 else 'x'},,north & south")
    frames = np.random.default_rng(0).integers(0, 999, (3, 30, 50)).astype(np.uint16)
    dicom(tmp_path / "a" / "film.dcm", frames, PatientID="P1", Modality="XA", PhotometricInterpretation="MONOCHROME1")
    (tmp_path / "a" / "text.txt").write_text("text")
    (tmp_path / "a" / "labels.csv").write_text("\n".join([*rows, "film.dcm,,,", "text.txt,,,", "gone.dcm,,,"]))
    return tmp_path / "a"


def test_card_counts(folder: Path, tmp_path: Path, images: Images) -> None:
    cohort = build_cohort(folder, images, tmp_path / "state")
    card = make_card(cohort.folder)
    assert json.loads(json.dumps(card)) == card
    assert (card["files"], card["files_used"], card["images"], card["patients"]) == (11, 9, 11, 7)
    assert card["quarantine"] == {"not_an_image": 1, "missing": 1}
    assert card["labels"] == {
        "x": {"images": 8, "patients": 7},
        "": {"images": 3, "patients": 1},
        "y": {"images": 1, "patients": 1},
    }
    assert card["modalities"] == {"DX": 5, "CR": 3, "XA": 3}
    assert card["photometric"] == {"MONOCHROME2": 8, "MONOCHROME1": 3}
    assert card["sites"] == {"north & south": 8, "": 3}
    assert card["images_per_patient"] == {"mean": 1.57, "most": 4, "patients_by_images": {"1": 5, "2": 1, "4": 1}}
    assert card["sizes"]["height"] == {"least": 24, "median": 24, "most": 30} and card["sizes"]["different"] == 2
    assert len(card["histogram"]) == 32 and sum(card["histogram"]) == pytest.approx(1, abs=1e-3)
    html = card_html(card)
    assert "north &amp; south" in html and "<svg" in html and "http" not in html and "<script" not in html


def test_card_of_some_patients(folder: Path, tmp_path: Path, images: Images) -> None:
    cohort = build_cohort(folder, images, tmp_path / "state")
    film = cohort.patients[cohort.labels == ""][0]
    card = make_card(cohort.folder, cohort.select([film]))
    assert (card["images"], card["patients"], card["modalities"]) == (4, 1, {"XA": 3, "DX": 1})
    assert card["files"] == 11 and card["selection"] and not make_card(cohort.folder)["selection"]
    assert "files of the whole source" in card_html(card)


def smooth(n: int, size: int = 32) -> np.ndarray:
    """(n, 1, size, size) smooth random images."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 16, 16)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse])[
        :, None
    ]


def made(images: np.ndarray) -> Cohort:
    n = len(images)
    words = np.full(n, "", np.str_)
    return Cohort(Path("here"), images, np.arange(n), np.arange(n, dtype=np.int32), words, words, words, words)


def pairs(cohort: Cohort) -> list[tuple[int, int]]:
    return sorted(pair for first, second in near_duplicates(cohort) for pair in zip(first, second, strict=True))


def test_hashes_and_pairs_against_a_plain_twin() -> None:
    images = smooth(60)
    images[40] = np.clip(images[3] * 0.8 + 20, 0, 255)  # another exposure
    images[41] = np.clip(images[3].astype(int) + np.random.default_rng(1).integers(-2, 3, images[3].shape), 0, 255)
    cohort = made(images)
    hashes = []
    for image in images[:, 0].astype(float):
        low = dctn(image)[:12, :12].ravel()[1:]
        hashes.append(low > np.median(low))
    assert (perceptual_hashes(cohort) != np.array(hashes)).mean() < 0.01  # ties of rounding at the median
    distance = (perceptual_hashes(cohort)[:, None] != perceptual_hashes(cohort)[None]).sum(axis=2)
    expected = [(i, j) for i in range(60) for j in range(i + 1, 60) if distance[i, j] <= NEAR]
    assert pairs(cohort) == expected
    assert {(3, 40), (3, 41), (40, 41)} <= set(expected) and len(expected) < 8


def test_pairs_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.concatenate([smooth(30), smooth(30)])
    whole = pairs(made(images))
    monkeypatch.setattr("polyclinic.cohort.duplicates.BLOCK", 7)
    assert pairs(made(images)) == whole
    assert {(k, k + 30) for k in range(30)} <= set(whole)


def test_copies_are_counted_without_keeping_their_pairs() -> None:
    """4,000 equal images make eight million pairs: 128 MB if they were kept."""
    n = 4000
    copies = made(np.repeat(smooth(1), n, axis=0))
    copies = replace(copies, patients=np.arange(n) // 2, labels=np.array(["x" * 64, "y", "y", "y"] * (n // 4)))
    tracemalloc.start()
    counted = _near_duplicates(copies)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    every = n * (n - 1) // 2
    across = {"across_patients": every - n // 2, "across_labels": (n // 4) * (3 * n // 4)}
    assert counted == {"pairs": every, **across, "bits": NEAR}
    assert peak < 32 << 20


def test_copies_on_both_sides_of_the_split_are_counted() -> None:
    cohort = made(np.concatenate([smooth(12), smooth(12)[:5], smooth(1)]))
    for tested in ([0, 12], [0, 12, 17], [3, 4, 16], [], list(range(18))):
        test = cohort.select(tested)
        expected = sum((one in tested) != (other in tested) for one, other in pairs(cohort))
        assert _near_duplicates(cohort, test)["across_split"] == expected
    assert "across_split" not in _near_duplicates(cohort)


def run(*arguments: object) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_inspect_json_is_the_card_and_nothing_else(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("cohort", "inspect", folder, "--json", "--state", tmp_path / "state", "--size", 32)
    out, err = capfd.readouterr()
    card = json.loads(out)
    assert (card["files"], card["images"], card["patients"]) == (11, 11, 7)
    assert card["quarantine"] == {"not_an_image": 1, "missing": 1} and err == ""


def test_inspect_fits_eighty_columns(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("cohort", "inspect", folder, "--state", tmp_path / "state", "--html", tmp_path / "card.html")
    out, _ = capfd.readouterr()
    for word in ("11, of which 9 used", "not_an_image", "MONOCHROME2", "north & south", "quarantine.csv", "DX"):
        assert word in out
    assert max(len(line) for line in out.splitlines() if "quarantine.csv" not in line) <= 80
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")


def test_inspect_options_reach_the_build(
    folder: Path, tmp_path: Path, dicom: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    dicom(folder / "screen.dcm", 50, Modality="US")
    with (folder / "labels.csv").open("a") as file:
        file.write("\nscreen.dcm,,,\n")
    options = ("--state", tmp_path / "state", "--json", "--channels", 3, "--window=40,400")
    counts = []
    for allow in ((), ("--allow-burned-in",)):
        run("cohort", "inspect", folder, *options, *allow)
        counts.append(json.loads(capfd.readouterr().out))
    assert [card["images"] for card in counts] == [11, 12] and counts[0]["quarantine"]["ultrasound"] == 1
    assert counts[0]["tensor"] == [3, 96, 96]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--size", 3), StudyError),
        (("--channels", 2), StudyError),
        (("--window", "lung"), StudyError),
        (("--window", "1,2,3"), StudyError),
        (("--window", "40,-1"), StudyError),
    ],
)
def test_inspect_refuses_bad_options(
    folder: Path, tmp_path: Path, options: tuple[object, ...], error: type[PolyclinicError]
) -> None:
    with pytest.raises(error):
        run("cohort", "inspect", folder, "--state", tmp_path / "state", *options)
    assert not (tmp_path / "state").exists()


def test_which_finds_the_file_of_an_id(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("cohort", "inspect", folder, "--json", "--state", tmp_path / "state")
    (listed,) = (tmp_path / "state" / "cohorts").glob("*/quarantine.csv")
    (row,) = [line for line in listed.read_text().splitlines() if "not_an_image" in line]
    capfd.readouterr()
    run("cohort", "which", folder, row.split(",")[0], "--state", tmp_path / "state")
    assert capfd.readouterr().out.strip() == str(folder / "text.txt")
    with pytest.raises(Refused, match="no file"):
        run("cohort", "which", folder, "0" * 32, "--state", tmp_path / "state")
