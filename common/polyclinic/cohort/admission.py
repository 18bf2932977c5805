"""Which of the files that were read are in the cohort, with which patient and label, and why the others are not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from polyclinic.cohort import limits
from polyclinic.cohort.columns import passed_over
from polyclinic.cohort.identity import keyed
from polyclinic.cohort.index import Member
from polyclinic.cohort.quarantine import Entry, Reason
from polyclinic.cohort.scan import LABELS, Scan, Source
from polyclinic.cohort.store import Record

CLASSES_WARNING = "sub-directories are taken as classes, and every image as a patient of its own"
NO_PATIENTS_WARNING = "the CSV names no patients: every image counts as a patient of its own"
MANY_FOLDERS_WARNING = f"more than {limits.MAX_CLASSES} sub-directories: they are not taken as classes"
COHORTS_WARNING = f"a sub-directory has a {LABELS} of its own, which is not read here: is each one a cohort by itself?"
ONE_PATIENT_WARNING = "more than half of the images carry one patient identifier: was it blanked on de-identification?"


@dataclass
class Admission:
    """The verdict on every file of a cohort.

    Attributes:
        own_patients: at least one image stands for a patient of its own, having no identifier.
    """

    members: list[Member] = field(default_factory=list)
    quarantine: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    own_patients: bool = False


def admit(found: Scan, contents: Sequence[tuple[str, Record] | Reason], key: bytes) -> Admission:
    """Sort the files of a scan into members and quarantine.

    `contents` gives for each file its (SHA-256, record), or the reason why it was not read.

    A tree in which DICOM files are at least as many as PNG and JPEG files is an archive: its directories may be
    named after patients, so they label nothing, and an image file without a header has no patient. A CSV's own
    identifier goes before the header's.
    """
    admission = Admission()
    read = [record for record in (c[1] for c in contents if not isinstance(c, Reason)) if not record.reason]
    kinds = Counter(record.facts.kind for record in read)
    archive = kinds["dicom"] > 0 and kinds["dicom"] >= kinds["raster"]
    classes = {source.label for source in found.sources} - {""}
    keep_label = found.from_csv or not (archive or len(classes) > limits.MAX_CLASSES)
    own = not (archive or found.has_patients)
    for source, content in zip(found.sources, contents, strict=True):
        member = _member(source if keep_label else replace(source, label=""), content, own, key)
        if isinstance(member, Member):
            admission.members.append(member)
        else:
            admission.quarantine.append(member)
    admission.own_patients = own and any(m.record.facts.kind == "raster" for m in admission.members)
    admission.warnings = _warnings(found, admission, too_many=len(classes) > limits.MAX_CLASSES and not archive)
    return admission


def _member(source: Source, content: tuple[str, Record] | Reason, own: bool, key: bytes) -> Member | Entry:
    name = keyed(key, "path", source.relative)
    if isinstance(content, Reason):
        return Entry(name, content)
    sha, record = content
    if source.patient:
        patient = keyed(key, "patient", source.patient)
    elif own and record.facts.kind == "raster":
        patient = name
    else:
        patient = record.facts.patient
    reason = record.reason or (None if patient else Reason.NO_PATIENT)
    if reason:
        return Entry(name, reason, record.facts.modality, record.facts.transfer_syntax)
    return Member(source, sha, record, patient)


def _warnings(found: Scan, admission: Admission, too_many: bool) -> list[str]:
    warnings = []
    if admission.own_patients:
        warnings.append(NO_PATIENTS_WARNING if found.from_csv else CLASSES_WARNING)
    if too_many and not found.from_csv:
        warnings.append(MANY_FOLDERS_WARNING)
    if not found.from_csv and any(source.relative.endswith(f"/{LABELS}") for source in found.sources):
        warnings.append(COHORTS_WARNING)
    images = Counter[str]()
    for member in admission.members:
        images[member.patient] += member.record.count
    if len(images) > 1 and 2 * max(images.values()) > images.total() > 10:
        warnings.append(ONE_PATIENT_WARNING)
    for column, count in sorted(found.meaningless.items()):
        warnings.append(f"values of the column {column!r} that mean nothing are taken as unknown: {count}")
    return [*warnings, *filter(None, [passed_over(found.columns)])]


def summary(quarantine: Sequence[Entry]) -> str:
    """Reasons and their counts in words.

    >>> summary([Entry("a", Reason.DAMAGED), Entry("b", Reason.DAMAGED), Entry("c", Reason.TIMEOUT)])
    '2 damaged, 1 timeout'
    """
    counts = Counter(entry.reason.value for entry in quarantine)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
