"""A cohort: patients and their images, memory-mapped. Training sees nothing else of a site's archive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


class Stack:
    """Several image arrays one after another as if they were one, without copying them.

    >>> stack = Stack([np.zeros((2, 1, 4, 4), np.uint8), np.ones((3, 1, 4, 4), np.uint8)])
    >>> stack[np.array([0, 4, 1])].max(axis=(1, 2, 3)).tolist()
    [0, 1, 0]
    """

    def __init__(self, parts: Sequence[NDArray[np.uint8] | Stack]) -> None:
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError("cohorts of different image sizes or channels cannot be joined")
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of):
            here = part_of == number
            out[here] = self._parts[number][rows[here] - self._starts[number]]
        return out


SAID = ("labels", "sites", "views", "splits", "scanners", "sexes", "ages")
"""What a cohort says of each image."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """Patients and their images.

    Attributes:
        folder: where it was built; of several joined, the first one's.
        images: (stored, channels, size, size) uint8, read-only, in the order of decoding;
            some may belong to no patient here.
        rows: (images,) image k of this cohort is `images[rows[k]]`; sorted by patient.
        patients: (images,) patient number from 0, ascending, without gaps.
        labels, sites, views, splits: (images,) "" where unknown; several labels are joined by "|".
        scanners: (images,) "" where unknown; scanner-1, scanner-2, ... where headers alone tell machines
            apart. Empty: unknown of all.
        sexes: (images,) F, M or O; "" where unknown. Empty: unknown of all.
        ages: (images,) years, NaN where unknown, 90 for all above 89. Empty: unknown of all.
    """

    folder: Path
    images: NDArray[np.uint8] | Stack
    rows: NDArray[np.int64]
    patients: NDArray[np.int32]
    labels: NDArray[np.str_]
    sites: NDArray[np.str_]
    views: NDArray[np.str_]
    splits: NDArray[np.str_]
    scanners: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))
    sexes: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))
    ages: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        """Fill in what is unknown of all."""
        for name in ("scanners", "sexes"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.full(len(self), ""))
        if not len(self.ages):
            object.__setattr__(self, "ages", np.full(len(self), np.nan))

    def __len__(self) -> int:
        """Images."""
        return len(self.rows)

    @property
    def unpaired(self) -> bool:
        """Whether no patient has two images."""
        return len(self) == self.n_patients

    @property
    def n_patients(self) -> int:
        """Patients, each with one or more images."""
        return int(self.patients[-1]) + 1 if len(self) else 0

    def pixels(self, index: Sequence[int] | NDArray[Any] | torch.Tensor | slice) -> torch.Tensor:
        """(k, channels, size, size) uint8: a copy of the images numbered by `index` (k)."""
        import torch  # here, so that the processes that read files need not

        rows = self.rows[index if isinstance(index, slice) else np.asarray(index, np.int64)]
        return torch.from_numpy(np.ascontiguousarray(self.images[rows]))

    def fingerprints(self, key: bytes) -> list[str]:
        """Of each patient a keyed hash of the first image's pixels, hexadecimal: nobody else's images change it."""
        first = self.images[self.rows[np.searchsorted(self.patients, np.arange(self.n_patients))]]
        return [hashlib.blake2b(image.tobytes(), digest_size=16, key=key).hexdigest() for image in first]

    def select(self, patients: Sequence[int] | NDArray[Any]) -> Cohort:
        """The cohort of these patients, renumbered from 0 in ascending order, on the same images.

        Raises:
            IndexError: a patient that is not here.
        """
        wanted = np.unique(np.asarray(patients, np.int64))
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.n_patients:
            raise IndexError(f"patients {wanted[0]}..{wanted[-1]} of {self.n_patients}")
        keep = np.isin(self.patients, wanted)
        numbers = np.searchsorted(wanted, self.patients[keep]).astype(np.int32)
        said = {name: getattr(self, name)[keep] for name in SAID}
        return replace(self, rows=self.rows[keep], patients=numbers, **said)


def union(cohorts: Sequence[Cohort]) -> Cohort:
    """Several cohorts as one: the patients of the first, then of the second, and so on; no image is copied.

    Raises:
        ValueError: none are given, or their images differ in size or channels.
    """
    if not cohorts:
        raise ValueError("no cohorts to join")
    row_starts = np.cumsum([0, *(len(cohort.images) for cohort in cohorts)])
    patient_starts = np.cumsum([0, *(cohort.n_patients for cohort in cohorts)])
    said = {name: np.concatenate([getattr(cohort, name) for cohort in cohorts]) for name in SAID}
    return Cohort(
        folder=cohorts[0].folder,
        images=Stack([cohort.images for cohort in cohorts]),
        rows=np.concatenate([c.rows + start for c, start in zip(cohorts, row_starts, strict=False)]),
        patients=np.concatenate(
            [(c.patients + start).astype(np.int32) for c, start in zip(cohorts, patient_starts, strict=False)]
        ),
        **said,
    )
