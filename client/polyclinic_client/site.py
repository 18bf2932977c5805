"""A hospital as its node sees it: a name, a cohort, and a folder for what must outlive a message."""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import Cohort, open_cohort
from polyclinic.cohort.cohort import Stack
from polyclinic.cohort.identity import load_key
from polyclinic.cohort.index import read_meta
from polyclinic.errors import CohortError, Refused
from polyclinic.files import storage, write_atomic
from polyclinic.privacy.ledger import Cap, PrivacyLedger, cohort_id
from polyclinic.seeding import seed_for
from polyclinic.stages import Finetune
from polyclinic.study import Study


@dataclass(frozen=True)
class Site:
    """Name, cohort, and the state folder, in which each study keeps its rounds.

    Attributes:
        privacy: the folder of the privacy ledger; None: in the state folder.
        caps: the site's own on what that ledger may come to.
        truth: (stored,) of a simulated site whose labels were changed: those before, by row. None: nobody has.
    """

    name: str
    cohort: Cohort
    state: Path
    privacy: Path | None = None
    caps: tuple[Cap, ...] = ()
    truth: NDArray[np.str_] | None = field(default=None, compare=False)

    @property
    def spending(self) -> PrivacyLedger:
        """What the site has spent of its patients' privacy."""
        return PrivacyLedger(self.privacy or self.state / "privacy")

    def cohort_id(self, patients: Cohort) -> str:
        """By which the privacy ledger names a set of the site's patients; nobody else can tell who they are."""
        key = load_key(self.privacy or self.state / "privacy")
        return cohort_id(key, patients.fingerprints(key))

    def approves(self, study_hash: str) -> bool:
        """Any study: that it is simulated is the researcher's own decision."""
        return True

    def serve(self, text: str) -> "Site":
        """Itself: a simulated site takes part in whatever is simulated."""
        return self

    def leaving(self, kind: str, content: object) -> None:
        """Nothing leaves a simulation."""

    def split(self, study: Study) -> tuple[Cohort, Cohort]:
        """(train, test) cohorts by patient: the same in every round of a study, and no stage trains on test."""
        from polyclinic.evaluation import split_patients  # imports torch, which most commands of a site do not need

        seed, private = seed_for(study.seed, "split", site=self.name), study.privacy.mode == "patient"
        return split_patients(self.cohort, study.evaluation, seed, private)

    def unpaired(self, study: Study) -> bool:
        """Whether a stage is MICLe, and no patient to train on has the two images that it wants."""
        return any(stage.method == "micle" for stage in study.stages) and self.split(study)[0].unpaired

    def measured(self, cohort: Cohort) -> Cohort:
        """Some of the site's patients as a study's rows are measured on them: by the labels as they were built."""
        return cohort if self.truth is None else replace(cohort, labels=self.truth[cohort.rows])

    def labelled(self, study: Study, stage: Finetune) -> tuple[Cohort, Cohort | None]:
        """(train, validation) of a finetune stage: the same patients in every finetune stage that asks for as many.

        Raises:
            CohortError: no training patient has a label.
        """
        from polyclinic.evaluation import labelled_patients

        seed = seed_for(study.seed, "labels", site=self.name)
        return labelled_patients(self.split(study)[0], study.evaluation, stage, seed, study.privacy.mode == "patient")


class OwnImages(Stack):
    """The images of some rows of a cohort in place of the cohort's own; no other row may be asked for.

    Attributes:
        shape: of the cohort's images, so that rows mean the same in both.
    """

    def __init__(self, images: NDArray[np.uint8], rows: NDArray[np.int64], stored: int) -> None:
        """`images` (n, channels, size, size) are those of `rows` (n), ascending, of `stored` in all."""
        super().__init__([images])
        self._rows = rows
        self.shape = (stored, *images.shape[1:])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return super().__getitem__(np.searchsorted(self._rows, rows))


def write_site(
    folder: Path,
    name: str,
    cohort: Path,
    patients: list[int] | None = None,
    labels: list[str] | None = None,
    images: str | None = None,
) -> None:
    """Make a state folder that `open_site` opens: a site over all patients of a built cohort, or over some.

    Args:
        labels: of the site's images, in place of the cohort's; a simulation may change them.
        images: the file in `folder` that holds the site's images in ascending order of their rows, in place of the
            cohort's; the same.

    Raises:
        Refused: the folder is of a site with other patients. They would be split anew, and who trained would test.
    """
    facts = {"name": name, "cohort": str(cohort), "patients": patients, "digest": read_meta(cohort)["digest"]}
    facts |= {"labels": labels, "images": images}
    path = folder / "site.json"
    if path.exists() and not _same(json.loads(path.read_text()), facts):
        raise Refused(
            f"the patients or images of site {name!r} have changed since this run began",
            "start a new run with another --out, or put the cohort back as it was",
        )
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(facts))
    open_site.cache_clear()


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a site is the one it was; where its cohort is kept may change."""
    return all(before.get(key) == value for key, value in now.items() if key != "cohort")


@lru_cache(maxsize=8)
def open_site(folder: Path) -> Site:
    """The site that a state folder describes. Cached: a process that serves many messages opens it once.

    Raises:
        CohortError: the cohort is gone, or is no longer the one that the site was made with.
    """
    facts = json.loads((folder / "site.json").read_text())
    cohort = open_cohort(Path(facts["cohort"]))
    if read_meta(cohort.folder)["digest"] != facts["digest"]:
        raise CohortError("the cohort has changed since the site was made", "make the site anew, for a new study")
    if facts["patients"] is not None:
        cohort = cohort.select(facts["patients"])
    truth = None
    if facts.get("labels") is not None:
        truth = np.full(len(cohort.images), "", cohort.labels.dtype)
        truth[cohort.rows] = cohort.labels
        cohort = replace(cohort, labels=np.array(facts["labels"], np.str_))
    if facts.get("images") is not None:
        cohort = replace(cohort, images=_own_images(folder / facts["images"], cohort))
    return Site(facts["name"], cohort, folder, truth=truth)


def _own_images(path: Path, cohort: Cohort) -> OwnImages:
    rows = np.sort(cohort.rows)
    try:
        images = np.memmap(path, np.uint8, "r", shape=(len(rows), *cohort.images.shape[1:]))
    except (OSError, ValueError) as error:
        raise CohortError(f"the site's own images are gone or cut short: {path.name}", "run with --resume") from error
    return OwnImages(images, rows, len(cohort.images))
