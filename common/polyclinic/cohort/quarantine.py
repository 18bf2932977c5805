"""Why a file is not in the cohort: a closed set of reasons, so that no list or card can carry a header's text."""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from polyclinic.cohort.intake import Facts
from polyclinic.files import write_atomic


class Reason(StrEnum):
    """A reason, as it stands in quarantine.csv; `MEANING` says each in a line."""

    MISSING = "missing"
    OUTSIDE = "outside"
    LISTED_TWICE = "listed_twice"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    NOT_AN_IMAGE = "not_an_image"
    NO_PIXELS = "no_pixels"
    NO_PATIENT = "no_patient"
    BURNED_IN = "burned_in"
    ULTRASOUND = "ultrasound"
    SECONDARY_CAPTURE = "secondary_capture"
    DERIVED = "derived"
    TOO_LARGE = "too_large"
    NO_DECODER = "no_decoder"
    UNSUPPORTED = "unsupported"
    DAMAGED = "damaged"
    CONSTANT = "constant"
    TIMEOUT = "timeout"
    CRASHED = "crashed"


MEANING = {
    Reason.MISSING: "the CSV names a file that is not there",
    Reason.OUTSIDE: "the path leaves the cohort's folder (absolute, `..`, or a link)",
    Reason.LISTED_TWICE: "the CSV names the file again; its first row counts",
    Reason.NOT_A_FILE: "a folder, pipe, socket or device",
    Reason.UNREADABLE: "the system refuses to read it",
    Reason.NOT_AN_IMAGE: "by its content neither DICOM (no DICM prefix) nor PNG nor JPEG",
    Reason.NO_PIXELS: "DICOM without pixel data: a DICOMDIR, a report, a presentation state",
    Reason.NO_PATIENT: "no patient identifier: it could be in training and test at once",
    Reason.BURNED_IN: "Burned In Annotation is YES: text in the pixels may name the patient",
    Reason.ULTRASOUND: "ultrasound, which usually shows the patient's name in the pixels",
    Reason.SECONDARY_CAPTURE: "a screenshot or scan, which may show the patient's name in the pixels",
    Reason.DERIVED: "computed from images: a segmentation, dose or parametric map",
    Reason.TOO_LARGE: "more bytes or pixels than are decoded (see limits.py)",
    Reason.NO_DECODER: "no decoder for its transfer syntax is installed; the extra `gpl-decoders` adds some",
    Reason.UNSUPPORTED: "a photometric interpretation or bit layout outside the documented order",
    Reason.DAMAGED: "cannot be parsed, or its pixels cannot be decoded",
    Reason.CONSTANT: "every pixel has the same value",
    Reason.TIMEOUT: "could not be read and decoded in time",
    Reason.CRASHED: "its decoder ended the worker process",
}

BURNED_IN_REASONS = frozenset({Reason.BURNED_IN, Reason.ULTRASOUND, Reason.SECONDARY_CAPTURE})
"""What `allow_burned_in` lets through."""


class Unusable(Exception):
    """Raised while one file is read; carries the reason, and nothing of the file but its facts."""

    def __init__(self, reason: Reason, facts: Facts | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.facts = facts or Facts()


@dataclass(frozen=True)
class Entry:
    """One quarantined file: `id` is a keyed hash of its relative path."""

    id: str
    reason: Reason
    modality: str = ""
    transfer_syntax: str = ""


def counts(entries: Iterable[Entry]) -> dict[str, int]:
    """Files by reason, the most frequent first."""
    return dict(Counter(entry.reason.value for entry in entries).most_common())


def write_quarantine(path: Path, entries: Iterable[Entry]) -> None:
    """Replace quarantine.csv: id, reason, modality, transfer_syntax, meaning."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "reason", "modality", "transfer_syntax", "meaning"])
    for entry in sorted(entries, key=lambda e: (e.reason, e.id)):
        writer.writerow([entry.id, entry.reason.value, entry.modality, entry.transfer_syntax, MEANING[entry.reason]])
    write_atomic(path, text.getvalue())
