"""The columns of a CSV cohort: which there are, which of a file's are passed over, and what those may be meant as."""

import difflib
from collections.abc import Sequence

SEPARATORS = ",;\t"
COLUMNS = {
    "image": ("file", "filename", "filepath", "path", "imageindex", "imagename", "imagepath"),
    "label": ("labels", "diagnosis", "class", "category", "finding", "findinglabels", "target", "dx", "pathology"),
    "patient": ("patientid", "patientno", "pid", "subject", "subjectid", "participantid", "case", "caseid", "mrn"),
    "site": ("hospital", "institution", "centre", "center"),
    "view": ("viewposition", "projection"),
    "scanner": (
        "manufacturer", "manufacturermodel", "manufacturermodelname", "model", "modelname", "device", "devicename",
        "machine", "vendor", "equipment",
    ),
    "split": ("subset", "fold", "partition"),
    "sex": ("gender", "patientsex", "patientgender"),
    "age": ("ageyears", "patientage"),
}  # fmt: skip
"""Every column that is read, with other names that people give it, in small letters; of these only `file` is read."""
READ = {*COLUMNS, "file"}


def separator(header: str) -> str:
    r"""What separates the columns of a header line.

    >>> separator("image;label;patient\n"), separator("image\tlabel\n"), separator("image\n")
    (';', '\t', ',')
    """
    return max(SEPARATORS, key=header.count)


def meant_as(column: str, lacking: Sequence[str]) -> str:
    """The column of `lacking` that `column` may be meant as; "" where it is like none.

    >>> meant_as("Patient ID", ["label", "patient"]), meant_as("Patient Age", ["label", "patient"])
    ('patient', '')
    """
    names = {name: known for known in lacking for name in (known, *COLUMNS[known])}
    plain = "".join(c for c in column.lower() if c.isalnum())
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.85)  # "patientage" is no patient
    return names[near[0]] if near else ""


def passed_over(columns: Sequence[str]) -> str:
    """A warning that names every column that is not read; "" where all are.

    >>> passed_over(["image", "Diagnosis", "offset"])
    "columns of the CSV that are not read: 'Diagnosis' (if it is meant as `label`, name it so), 'offset'"
    """
    unread = [column for column in dict.fromkeys(columns) if column.strip() and column not in READ]
    lacking = [known for known in COLUMNS if known not in columns and not (known == "image" and "file" in columns)]
    hints = {column: meant_as(column, lacking) for column in unread}
    named = [
        f"{column!r}" + (f" (if it is meant as `{known}`, name it so)" if known else "")
        for column, known in hints.items()
    ]
    return f"columns of the CSV that are not read: {', '.join(named)}" if named else ""
