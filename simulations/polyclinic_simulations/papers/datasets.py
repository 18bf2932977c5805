"""The tables' datasets as cohorts, and covid-ct regrouped by the document that its slices were printed in."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from polyclinic.cohort import Cohort, build_cohort
from polyclinic.errors import CohortError
from polyclinic.files import atomic, write_atomic
from polyclinic.study import Study
from polyclinic_simulations.papers.workshop import Workshop

BORDER = 0.15
"""Width of the rim that the border-only control sees, fraction of the side: no lung reaches it."""


def dataset(name: str, split: str, study: Study, at: Workshop) -> Cohort:
    """A dataset as a cohort.

    `split` "document" regroups covid-ct's patients by the document that their slices were printed in, so that no
    document is on both sides; a dataset whose name ends in "-border" has everything but the rim blackened.
    """
    folder = at.data / name.removesuffix("-border")
    if not folder.exists():
        raise CohortError(f"the dataset is not there: {folder}", "give the folder of all datasets as --data")
    if split == "document":
        folder = by_document(folder, at.folder / "by-document" / name)
    told = partial(at.reading, name)
    cohort = build_cohort(folder, study.images, at.folder / "state", progress=told)
    if not name.endswith("-border"):
        return cohort
    images = cohort.pixels(slice(None)).numpy()
    rim = round(BORDER * images.shape[-1])
    images[:, :, rim:-rim, rim:-rim] = 0
    return replace(cohort, images=images, rows=np.arange(len(images)))


def by_document(folder: Path, to: Path) -> Path:
    """The same dataset with documents as patients, and all documents of a patient as one.

    `source_file` before its -p<digits> names a slice's document. Some patients stand in several, some documents show
    several patients: what hangs together stays together, or a patient would be on both sides.
    """
    table = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    table["patient"] = together(table["patient"].tolist(), [document(name) for name in table["source_file"]])
    for image in table["image"]:
        if not (to / image).exists():
            (to / image).parent.mkdir(parents=True, exist_ok=True)
            with atomic(to / image) as file:  # a cohort's files must lie in its folder
                file.write((folder / image).read_bytes())
    write_atomic(to / "labels.csv", table[["image", "label", "patient"]].to_csv(index=False))
    return to


def together(patients: Sequence[str], documents: Sequence[str]) -> list[str]:
    """The group of each image: images that share a patient or a document, directly or over others, are of one.

    >>> together(["a", "a", "b", "c"], ["x", "y", "y", "z"])
    ['group 0', 'group 0', 'group 0', 'group 3']
    """
    found = pd.Series(range(len(patients)))
    while True:
        merged = found.groupby(list(patients)).transform("min").groupby(list(documents)).transform("min")
        if merged.equals(found):
            return [f"group {number}" for number in found]
        found = merged


def document(source_file: str) -> str:
    """
    >>> document("2020.01.24.919183-p27-132.png"), document("12.jpg")
    ('2020.01.24.919183', '12')
    """
    found = re.match(r"(.+?)-p\d+", source_file)
    return found[1] if found else source_file.rpartition(".")[0]
