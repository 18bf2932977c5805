"""Invented identities: what a real header would say of a person, so that tests can look for it where it must not be.

Every name is made of syllables that stand in no dictionary. Dates are drawn from a few days only, so that finding one
of their eight digits by chance among the figures of a report stays unlikely.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

SYLLABLES = (
    "vex", "quor", "zyb", "jund", "thwe", "kroz", "pflim", "wug", "yax", "drisk", "ghov", "nyx", "bruz", "tzem", "fjor",
    "skwi",
)  # fmt: skip
BIRTH_DATES = ("19310907", "19471129", "19580316", "19660823")
STUDY_DATES = ("20070214", "20091106", "20130531")
UID_ROOT = "2.25."
"""For UIDs that are random numbers (PS3.5 B.2)."""
IDENTIFYING = (
    "PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName", "InstitutionName",
    "InstitutionAddress", "OperatorsName", "StationName", "DeviceSerialNumber", "StudyInstanceUID", "SeriesInstanceUID",
    "SOPInstanceUID", "StudyID", "StudyDate",
)  # fmt: skip
"""Keywords whose values name a person, a place, a machine or a visit."""


def word(rng: np.random.Generator, syllables: int = 3) -> str:
    """An invented word, such as Quorzybvex."""
    return "".join(rng.choice(SYLLABLES, syllables).tolist()).capitalize()


def name(rng: np.random.Generator) -> str:
    """An invented person's name (PN, PS3.5 6.2.1)."""
    return f"{word(rng, 4)}^{word(rng)}"


def uid(rng: np.random.Generator) -> str:
    """A UID that no other draw gives."""
    return UID_ROOT + str(int.from_bytes(rng.bytes(15)))


def code(rng: np.random.Generator, prefix: str) -> str:
    """An invented number such as a hospital gives out."""
    return f"{prefix}{rng.integers(10**8, 10**9)}"


@dataclass(frozen=True)
class Place:
    """A hospital and its X-ray room."""

    institution: str
    address: str
    station: str
    serial: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Place":
        """Another hospital."""
        return cls(
            f"{word(rng)} Infirmary", f"{rng.integers(1, 99)} {word(rng)} Street, {word(rng)}", word(rng).upper(),
            code(rng, "SER"),
        )  # fmt: skip


@dataclass(frozen=True)
class Person:
    """A patient and the visit at which all images were made."""

    name: str
    id: str
    birth_date: str
    sex: str
    accession: str
    physician: str
    operator: str
    study_id: str
    study_uid: str
    study_date: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Person":
        """Another patient."""
        return cls(
            name=name(rng),
            id=code(rng, "PID"),
            birth_date=str(rng.choice(BIRTH_DATES)),
            sex=str(rng.choice(["F", "M", "O"], p=[0.49, 0.49, 0.02])),
            accession=code(rng, "ACC"),
            physician=name(rng),
            operator=name(rng),
            study_id=code(rng, "ST"),
            study_uid=uid(rng),
            study_date=str(rng.choice(STUDY_DATES)),
        )

    @property
    def file_stem(self) -> str:
        """The name as archives put it in a file's name."""
        return self.name.replace("^", "_")


def identifiers(folder: Path) -> set[str]:
    """Every invented identifier under `folder`: the values of the headers, the parts of names, and the files' names."""
    found: set[str] = set()
    for path in sorted(folder.rglob("*.dcm")):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(IDENTIFYING))
        values = {str(element.value) for element in header}
        found |= values | {path.stem, path.parent.name}
        found |= {part for value in values for part in value.split("^")}
    return found
