"""Epochs, over a cohort made of arrays."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.cohort import Cohort
from polyclinic.cohort.sampling import epoch


def cohort(n: int) -> Cohort:
    return Cohort(
        Path("here"), np.zeros((n, 1, 16, 16), np.uint8), np.arange(n), np.arange(n, dtype=np.int32),
        *[np.full(n, "")] * 4,
    )  # fmt: skip


@given(n=st.integers(0, 50), batch=st.integers(1, 60))
def test_epoch_shows_every_image_once(n: int, batch: int) -> None:
    batches = list(epoch(cohort(n), batch, np.random.default_rng(0)))
    assert sorted(np.concatenate([*batches, np.array([], np.int64)]).tolist()) == list(range(n))
    again = list(epoch(cohort(n), batch, np.random.default_rng(0)))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


@given(n=st.integers(1, 50), batch=st.integers(1, 60))
def test_batches_are_as_few_and_as_even_as_can_be(n: int, batch: int) -> None:
    sizes = [len(part) for part in epoch(cohort(n), batch, np.random.default_rng(0))]
    assert len(sizes) == -(-n // batch) and max(sizes) <= batch and max(sizes) - min(sizes) <= 1


def test_epochs_differ() -> None:
    generator = np.random.default_rng(0)
    first, second = (np.concatenate(list(epoch(cohort(50), 8, generator))) for _ in range(2))
    assert (first != second).any()
