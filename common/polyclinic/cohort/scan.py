"""From a directory or a CSV file to the list of files that make a cohort. No file is opened here but the CSV."""

import csv
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from polyclinic.cohort import limits
from polyclinic.cohort.attributes import Meaningless, parse_age, parse_sex
from polyclinic.cohort.columns import meant_as, separator
from polyclinic.cohort.quarantine import Reason
from polyclinic.errors import CohortError

LABELS = "labels.csv"
OURS = ({"identity.key"}, {"study.toml", "events.jsonl"})
"""Files by which a state directory and a run are known."""


@dataclass(frozen=True)
class Source:
    """One file of a cohort as its directory or CSV row describes it.

    Attributes:
        relative: path within the cohort's folder; never stored or printed.
        patient: the CSV's identifier in clear, only ever in memory; "" where it has none.
        sex: F, M, O; "" where the CSV does not say.
        age: years; None where the CSV does not say.
        stat: (size, mtime_ns, ctime_ns), by which an unchanged file is known without reading it.
        reason: set where the file cannot even be read.
    """

    relative: str
    patient: str = ""
    label: str = ""
    site: str = ""
    view: str = ""
    scanner: str = ""
    split: str = ""
    sex: str = ""
    age: float | None = None
    stat: tuple[int, int, int] = (0, 0, 0)
    reason: Reason | None = None


@dataclass(frozen=True)
class Scan:
    """All files of a cohort, in the order of their relative paths.

    Attributes:
        root: the folder that relative paths start from.
        from_csv: labels come from a CSV file rather than from sub-directories.
        has_patients: the CSV names at least one patient.
        columns: of the CSV, as its header names them.
        meaningless: cells of `sex` and `age` that say neither that nor "unknown", by column.
    """

    root: Path
    sources: list[Source]
    from_csv: bool
    has_patients: bool
    columns: list[str] = field(default_factory=list)
    meaningless: Counter[str] = field(default_factory=Counter)


def locate(source: Path, state: Path) -> Path:
    """The CSV file or the directory that `source` means, resolved.

    Raises:
        CohortError: there is nothing there, or `state` lies in its folder, where nothing is to be written.
    """
    path = source.resolve()
    folder = path if path.is_dir() else path.parent
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() == ".csv")):
        problem = "is neither a directory nor a CSV file" if path.exists() else "does not exist"
        raise CohortError(
            f"the cohort {source} {problem}", "give a directory of images or a CSV file with an `image` column"
        )
    if state.resolve().is_relative_to(folder):
        raise CohortError(
            f"the state directory {state} lies in the folder of the cohort {source}, where nothing is to be written",
            "keep it elsewhere: --state DIR",
        )
    return path / LABELS if (path / LABELS).is_file() else path


def scan(path: Path) -> Scan:
    """The files of a located cohort; states and runs in its directory are left out. Takes a stat a file, reads none."""
    if path.is_dir():
        return Scan(path, sorted(_walk(path), key=lambda s: s.relative), from_csv=False, has_patients=False)
    rows, columns = _rows(path)
    meaningless = Counter[str]()
    sources = sorted(_sources(rows, path.parent, meaningless), key=lambda s: s.relative)
    has_patients, named = any(s.patient for s in sources), [clean(column) for column in columns]
    return Scan(path.parent, sources, from_csv=True, has_patients=has_patients, columns=named, meaningless=meaningless)


def clean(text: str, longest: int = limits.MAX_TEXT) -> str:
    """A word fit for lists and terminals: control characters gone, white space single, length capped.

    >>> clean("  AP\\x1b[31m  erect\\n")
    'AP[31m erect'
    """
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())[:longest]


def _walk(root: Path) -> Iterator[Source]:
    """Every file below `root` but those of states and runs; its label is the first directory on its way.

    A directory that cannot be listed or is a link stands for what may be in it, with the reason.
    """
    unlisted: list[str] = []
    for folder, folders, names in os.walk(root, onerror=lambda error: unlisted.append(os.fspath(error.filename))):
        here = Path(folder)
        if any(marks <= set(names) for marks in OURS):
            folders.clear()
            continue
        folders.sort()
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*names, *links]:
            relative = os.path.relpath(here / name, root)
            parts = PurePosixPath(relative).parts
            source = Source(relative, label=clean(parts[0]) if len(parts) > 1 else "")
            yield replace(source, reason=Reason.OUTSIDE) if name in links else _with_stat(root, source)
    for folder in unlisted:
        yield Source(os.path.relpath(folder, root), reason=Reason.UNREADABLE)


def _sources(rows: list[dict[str, str]], root: Path, meaningless: Counter[str]) -> Iterator[Source]:
    seen: set[str] = set()
    for row in rows:
        relative = os.path.normpath((row.get("image") or row.get("file") or "").strip().replace("\0", ""))
        label = "|".join(clean(word) for word in (row.get("label") or "").split("|")[: limits.MAX_LABELS])
        site, view, scanner, split = (clean(row.get(name) or "") for name in ("site", "view", "scanner", "split"))
        sex, age = _attributes(row, meaningless)
        patient = (row.get("patient") or "").strip()
        source = Source(relative, patient, label, site, view, scanner, split.lower(), sex, age)
        yield replace(source, reason=Reason.LISTED_TWICE) if relative in seen else _with_stat(root, source)
        seen.add(relative)


def _attributes(row: dict[str, str], meaningless: Counter[str]) -> tuple[str, float | None]:
    """Sex and age of a row; cells without a meaning are counted by column."""
    sex, age = "", None
    try:
        sex = parse_sex(row.get("sex") or "")
    except Meaningless:
        meaningless["sex"] += 1
    try:
        age = parse_age(row.get("age") or "")
    except Meaningless:
        meaningless["age"] += 1
    return sex, age


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows and columns of a CSV file with a header; its columns are separated by commas, semicolons or tabs.

    Raises:
        CohortError: it is not a UTF-8 CSV file with an `image` (or `file`) column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = separator(file.readline())
            file.seek(0)
            reader = csv.DictReader(file, restval="", delimiter=delimiter)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CohortError(f"cannot read {path.name}: {type(error).__name__}", "save it as a UTF-8 CSV file") from error
    if not {"image", "file"} & set(columns):
        found = ", ".join(clean(c) for c in columns[:8]) or "none"
        near = next((clean(column) for column in columns if meant_as(column, ["image"])), "")
        raise CohortError(
            f"{path.name} has no `image` column (found: {found})",
            f"name the column of file paths `image`{f' rather than {near!r}' if near else ''}; "
            "columns are separated by commas, semicolons or tabs",
        )
    return rows, columns


def _with_stat(root: Path, source: Source) -> Source:
    """`source` with its stat, or with the reason why it cannot be read."""
    parts = PurePosixPath(source.relative).parts
    if os.path.isabs(source.relative) or ".." in parts:  # noqa: PTH117
        return replace(source, reason=Reason.OUTSIDE)
    path = root / source.relative
    try:
        status = path.lstat()
        if not path.resolve(strict=True).is_relative_to(root):
            return replace(source, reason=Reason.OUTSIDE)
        if stat.S_ISLNK(status.st_mode):
            status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return replace(source, reason=Reason.MISSING)
    except (OSError, RuntimeError, ValueError):  # no permission, a name too long, a loop of links
        return replace(source, reason=Reason.UNREADABLE)
    if not stat.S_ISREG(status.st_mode):
        return replace(source, reason=Reason.NOT_A_FILE)
    return replace(source, stat=(status.st_size, status.st_mtime_ns, status.st_ctime_ns))
