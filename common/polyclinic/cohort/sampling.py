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
