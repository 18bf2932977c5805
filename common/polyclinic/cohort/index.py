"""The index: which stored image belongs to which patient, with its words. Written whole, opened in milliseconds."""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort.cohort import Cohort
from polyclinic.cohort.intake import VERSION, Intake
from polyclinic.cohort.scan import Source
from polyclinic.cohort.store import IMAGES, Record
from polyclinic.errors import CohortError
from polyclinic.files import atomic

INDEX = "index.npz"
WORDS = ("labels", "sites", "views", "scanners", "splits", "sexes")
"""Of a Cohort."""
FACTS = ("modalities", "photometric")


@dataclass(frozen=True)
class Member:
    """A file that is in the cohort: its source, its content, and its patient's keyed HMAC."""

    source: Source
    sha: str
    record: Record
    patient: str


def write_index(folder: Path, members: Sequence[Member], stored: int, meta: dict[str, Any]) -> None:
    """Replace the index. Images are sorted by content, path and frame; patients by their first image.

    So the order is the same whatever the key of the HMACs, the order of decoding, and the cohort's history. `meta`
    gains `digest`, a SHA-256 of what a study sees: patients, the contents of their files, labels, splits, and sexes,
    ages and a table's scanners where they are known, since a simulation may deal patients by them.
    """
    members = sorted(members, key=lambda m: (m.sha, m.source.relative))
    numbers: dict[str, int] = {}
    of_patient = [numbers.setdefault(m.patient, len(numbers)) for m in members]
    order = sorted(range(len(members)), key=of_patient.__getitem__)  # stable: images keep their order
    counts = np.array([members[i].record.count for i in order])
    sexes, ages = [_sex(members[i]) for i in order], [_age(members[i]) for i in order]
    seen = [
        [of_patient[i], members[i].sha, members[i].source.label, members[i].source.split]
        + ([sex, age] if sex or age is not None else [])
        + ([members[i].source.scanner] if members[i].source.scanner else [])
        for i, sex, age in zip(order, sexes, ages, strict=True)
    ]
    meta = {**meta, "digest": hashlib.sha256(json.dumps(seen).encode()).hexdigest()}
    rows = [np.arange(r.first, r.first + r.count) for r in (members[i].record for i in order)]
    arrays: dict[str, NDArray[Any]] = {
        "rows": np.concatenate(rows).astype(np.int64),
        "patients": np.repeat(np.array([of_patient[i] for i in order], np.int32), counts),
        "stored": np.array(stored, np.int64),
        "meta": np.array(json.dumps(meta)),
        "ages": np.repeat(np.array(ages, np.float64), counts),  # None becomes NaN
    }
    words = {name: [word(members[i]) for i in order] for name, word in _WORD_OF.items()}
    words["scanners"] = _scanners([members[i] for i in order])
    for name, said in words.items():
        vocabulary, codes = np.unique(said, return_inverse=True)
        arrays |= {name: vocabulary, f"{name}_code": np.repeat(codes.astype(np.int32), counts)}
    for side in ("height", "width"):
        arrays[side] = np.repeat(np.array([getattr(members[i].record.facts, side) for i in order], np.int32), counts)
    with atomic(folder / INDEX) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _sex(member: Member) -> str:
    return member.source.sex or member.record.facts.sex


def _age(member: Member) -> float | None:
    return member.record.facts.age if member.source.age is None else member.source.age


def _scanners(members: Sequence[Member]) -> list[str]:
    """The CSV's word for each image's machine; for those that only headers know, numbers in the images' order.

    A simulated site is named after its scanner and draws from its name: under a header's keyed word, the same files
    would train to other weights in another state directory.
    """
    said = {m.source.scanner for m in members}
    free = (name for number in itertools.count(1) if (name := f"scanner-{number}") not in said)
    names = {"": ""}
    found = []
    for member in members:
        machine = member.record.facts.scanner
        if not member.source.scanner and machine not in names:
            names[machine] = next(free)
        found.append(member.source.scanner or names[machine])
    return found


_WORD_OF: dict[str, Callable[[Member], str]] = {
    "labels": lambda m: m.source.label,
    "sites": lambda m: m.source.site,
    "views": lambda m: m.source.view or m.record.facts.view,
    "splits": lambda m: m.source.split,
    "sexes": _sex,
    "modalities": lambda m: m.record.facts.modality,
    "photometric": lambda m: m.record.facts.photometric,
}


def open_cohort(folder: Path) -> Cohort:
    """A built cohort; its images stay on disk until they are asked for.

    Raises:
        CohortError: there is none in `folder`, another version built it, or its files do not belong together.
    """
    arrays = _load(folder)
    intake = Intake.from_json(json.loads(str(arrays["meta"]))["intake"])
    if intake.version != VERSION:
        raise CohortError(f"the cohort in {folder.name} was built by another version", "build the cohort again")
    shape = (int(arrays["stored"]), intake.channels, intake.size, intake.size)
    words = {name: _words(arrays, name) for name in WORDS}
    try:
        images = np.memmap(folder / IMAGES, np.uint8, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise CohortError(
            f"the images of the cohort in {folder.name} are cut short", "build the cohort again"
        ) from error
    return Cohort(folder, images, arrays["rows"], arrays["patients"], **words, ages=arrays["ages"])


def read_facts(folder: Path) -> dict[str, NDArray[Any]]:
    """What open_cohort leaves out, for the card: modalities, photometric, height and width of every image."""
    arrays = _load(folder)
    words = {name: _words(arrays, name) for name in FACTS}
    return {**words, "height": arrays["height"], "width": arrays["width"]}


def require_patients(folder: Path) -> None:
    """Refuse a cohort in which images stand for patients of their own: no promise to patients holds for it.

    Raises:
        CohortError: it is one.
    """
    if read_meta(folder)["own_patients"]:
        raise CohortError(
            "nothing says which images are of one patient, and a promise of privacy is one to patients",
            "name the patients: in labels.csv, the column `patient`",
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """How the cohort was built: intake, files, files_used, quarantine, warnings, own_patients, digest."""
    meta: dict[str, Any] = json.loads(str(_load(folder)["meta"]))
    return meta


def _words(arrays: dict[str, NDArray[Any]], name: str) -> NDArray[np.str_]:
    return np.asarray(arrays[name][arrays[f"{name}_code"]])


def _load(folder: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(io.BytesIO((folder / INDEX).read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        problem = f"there is no built cohort in {folder.name}, or its index is damaged"
        raise CohortError(problem, "build it: polyclinic cohort inspect DIR") from error
