"""What a directory or a CSV file says a cohort is, hostile ones included."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from polyclinic.cohort.quarantine import Reason
from polyclinic.cohort.scan import Source, clean, locate, scan
from polyclinic.errors import CohortError

Png = Callable[..., Path]
ELSEWHERE = Path("/no/such/state")


def table(folder: Path, text: str) -> dict[str, Source]:
    folder.mkdir(exist_ok=True)
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return {source.relative: source for source in scan(locate(folder, ELSEWHERE)).sources}


def test_columns_mean_what_they_say(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "a" / "1.png")
    text = (
        "\ufeffimage,label,patient,site,view,scanner,split,age\n"
        'a/1.png,"x|y",P 1,"Ho Chi Minh, Vietnam",AP erect, Room 2,Train,33\n'
    )
    source = table(tmp_path, text)["a/1.png"]
    assert (source.patient, source.label, source.site) == ("P 1", "x|y", "Ho Chi Minh, Vietnam")
    assert (source.view, source.scanner, source.split, source.reason) == ("AP erect", "Room 2", "train", None)


def test_sex_and_age_are_read_and_what_means_nothing_is_counted(tmp_path: Path) -> None:
    rows = ["1.png,female,058Y", "2.png,M,93", "3.png,unknown,50+", "4.png,?,mid 50s", "5.png,Erika,", "6.png"]
    sources = table(tmp_path, "\n".join(["image,sex,age", *rows]))
    found = {name: (source.sex, source.age) for name, source in sources.items()}
    assert found == {
        "1.png": ("F", 58.0), "2.png": ("M", 90.0), "3.png": ("", None), "4.png": ("", None), "5.png": ("", None),
        "6.png": ("", None),
    }  # fmt: skip
    assert scan(locate(tmp_path, ELSEWHERE)).meaningless == {"age": 2, "sex": 1}


def test_missing_columns_are_empty_and_file_is_image(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "1.png")
    assert table(tmp_path, "file\n1.png\n")["1.png"] == Source("1.png", stat=scan_stat(tmp_path / "1.png"))


@pytest.mark.parametrize("by", [",", ";", "\t"])
def test_columns_are_separated_by_commas_semicolons_or_tabs(tmp_path: Path, png: Png, by: str) -> None:
    png(tmp_path / "1.png")
    text = f'image{by}label{by}patient\n1.png{by}"x{by} y"{by}P\n'
    source = table(tmp_path, text)["1.png"]
    assert (source.label, source.patient, source.reason) == (f"x{by} y".replace("\t", ""), "P", None)


def test_a_header_without_images_says_what_was_found_and_what_separates(tmp_path: Path) -> None:
    with pytest.raises(CohortError) as caught:
        table(tmp_path, "Path|label\na.png|x\n")
    assert "found: Path|label" in caught.value.problem and "semicolons or tabs" in caught.value.fix
    with pytest.raises(CohortError, match="rather than 'Image Index'"):
        table(tmp_path, "Image Index,label\na.png,x\n")


def scan_stat(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link.png", "linked/secret.png"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, png: Png, path: str) -> None:
    png(tmp_path / "secret.png")
    folder = tmp_path / "cohort"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (source,) = table(folder, f"image\n{path}\n").values()
    assert source.reason is Reason.OUTSIDE


def test_a_link_within_the_folder_is_followed(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert table(tmp_path, "image\nb.png\n")["b.png"].stat == scan_stat(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("gone.png", Reason.MISSING),
        ("a.png/b.png", Reason.MISSING),
        ("folder", Reason.NOT_A_FILE),
        ("pipe", Reason.NOT_A_FILE),
        ("loop", Reason.UNREADABLE),
        ("n" * 300, Reason.UNREADABLE),
        ("", Reason.NOT_A_FILE),
        ("a.png\0b", Reason.MISSING),
    ],
)
def test_rows_without_a_file(tmp_path: Path, png: Png, row: str, reason: Reason) -> None:
    png(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (source,) = table(tmp_path, f"image,label\n{row},x\n").values()
    assert source.reason is reason


def test_a_file_listed_twice_counts_once(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("image,label\na.png,x\n./a.png,y\n")
    sources = scan(tmp_path / "labels.csv").sources
    assert [(s.label, s.reason) for s in sources] == [("x", None), ("y", Reason.LISTED_TWICE)]


@pytest.mark.parametrize(
    "content", [b"picture,label\na.png,x\n", b"", b"image\n\xff\xfe.png\n", b'image\n"' + b"x" * 200_000]
)
def test_csv_files_that_cannot_be_read_say_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(CohortError, match=r"labels\.csv"):
        scan(locate(tmp_path, ELSEWHERE))


def test_ragged_rows_do_no_harm(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "a.png")
    png(tmp_path / "b.png")
    sources = table(tmp_path, "image,label\na.png\nb.png,x,more,cells\n")
    assert (sources["a.png"].label, sources["b.png"].label) == ("", "x")


def test_sources_that_are_none(tmp_path: Path, png: Png) -> None:
    with pytest.raises(CohortError, match="does not exist"):
        locate(tmp_path / "nowhere", ELSEWHERE)
    with pytest.raises(CohortError, match="neither"):
        locate(png(tmp_path / "a.png"), ELSEWHERE)


@pytest.mark.parametrize("state", [".", "state", "x/deep/.polyclinic"])
@pytest.mark.parametrize("source", [".", "labels.csv"])
def test_a_state_within_the_cohort_is_refused(tmp_path: Path, source: str, state: str) -> None:
    (tmp_path / "labels.csv").write_text("image\n")
    with pytest.raises(CohortError, match=r"nothing is to be written\n.*--state DIR"):
        locate(tmp_path / source, tmp_path / state)
    assert locate(tmp_path, tmp_path.parent / "state") == tmp_path / "labels.csv"


def test_directories_are_walked_whole_but_for_states_and_runs(tmp_path: Path, png: Png) -> None:
    for name in (
        "x/1.png",
        "x/deep/2.png",
        "y/3.png",
        "4.png",
        "x/state/cohorts/a/5.png",
        "run/6.png",
        "run/all/7.png",
    ):
        png(tmp_path / name)
    for name in ("x/state/identity.key", "run/study.toml", "run/events.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "z").symlink_to(tmp_path / "x")
    found = scan(tmp_path)
    assert [(s.relative, s.label) for s in found.sources if not s.reason] == [
        ("4.png", ""), ("x/1.png", "x"), ("x/deep/2.png", "x"), ("y/3.png", "y"),
    ]  # fmt: skip
    assert [(s.relative, s.reason) for s in found.sources if s.reason] == [("z", Reason.OUTSIDE)]


def test_a_directory_that_cannot_be_listed_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    listing = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [(s.relative, s.reason) for s in scan(tmp_path).sources] == [("locked", Reason.UNREADABLE)]


def test_names_that_are_not_utf8(tmp_path: Path, png: Png) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    folder.mkdir()
    png(tmp_path / "1.png").rename(folder / os.fsdecode(b"\xff.png"))
    (source,) = scan(tmp_path).sources
    assert source.reason is None and source.label == "t"


def test_each_of_many_labels_is_kept_whole(tmp_path: Path, png: Png) -> None:
    png(tmp_path / "a.png")
    label = "|".join(f"a finding with a long name, number {k}" for k in range(14))
    assert table(tmp_path, f'image,label\na.png,"{label}"\n')["a.png"].label == label


def test_words_are_fit_for_terminals() -> None:
    assert clean(" a\x1b]0;title\x07\tb\u202e ") == "a]0;title b"
    assert len(clean("x" * 1000)) == 64
