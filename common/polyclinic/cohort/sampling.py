"""The order of images in an epoch."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort.cohort import Cohort


def epoch(cohort: Cohort, batch_size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Image numbers of one epoch in batches of at most `batch_size`: every image once, in a new order.

    Batches differ by one image at most. A last batch of what is left over could hold two images, and a step on those
    would count as much as any other.
    """
    if len(cohort):
        yield from np.array_split(generator.permutation(len(cohort)), math.ceil(len(cohort) / batch_size))


def pair_epoch(cohort: Cohort, batch_size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Image numbers of one epoch over patients, in batches of at most `batch_size` patients: every patient once.

    Two images of each patient stand side by side: distinct where the patient has two, else the same one twice.
    """
    patients = cohort.n_patients
    if not patients:
        return
    starts = np.searchsorted(cohort.patients, np.arange(patients + 1))
    images = np.diff(starts)  # (patients,)
    first = generator.integers(images)
    second = (first + 1 + generator.integers(np.maximum(images - 1, 1))) % images
    pairs = starts[:-1, None] + np.stack([first, second], axis=1)  # (patients, 2)
    for chosen in np.array_split(generator.permutation(patients), math.ceil(patients / batch_size)):
        yield pairs[chosen].ravel()
