"""Epochs, over a cohort made of arrays."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.cohort import Cohort
from polyclinic.cohort.sampling import epoch, pair_epoch


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


def patients_with(images: list[int]) -> Cohort:
    n = sum(images)
    numbers = np.repeat(np.arange(len(images), dtype=np.int32), images)
    return Cohort(Path("here"), np.zeros((n, 1, 16, 16), np.uint8), np.arange(n), numbers, *[np.full(n, "")] * 4)


@given(images=st.lists(st.integers(1, 6), max_size=30), batch=st.integers(1, 40), seed=st.integers(0, 5))
def test_pairs_show_every_patient_once_with_two_images_where_there_are_two(
    images: list[int], batch: int, seed: int
) -> None:
    sick = patients_with(images)
    batches = list(pair_epoch(sick, batch, np.random.default_rng(seed)))
    assert len(batches) == -(-len(images) // batch)
    assert all(len(part) <= 2 * batch for part in batches)
    pairs = np.concatenate([*batches, np.array([], np.int64)]).reshape(-1, 2)
    owners = sick.patients[pairs]
    assert (owners[:, 0] == owners[:, 1]).all()
    assert sorted(owners[:, 0].tolist()) == list(range(len(images)))
    assert ((pairs[:, 0] != pairs[:, 1]) == (np.array(images, int)[owners[:, 0]] > 1)).all()


def test_every_ordered_pair_of_images_is_equally_likely() -> None:
    generator, sick = np.random.default_rng(0), patients_with([1, 4, 2])
    drawn = [tuple(pair) for _ in range(3000) for pair in next(pair_epoch(sick, 3, generator)).reshape(-1, 2).tolist()]
    of_four = {pair: drawn.count(pair) for pair in set(drawn) if 1 <= pair[0] <= 4}
    assert len(of_four) == 12
    assert min(of_four.values()) > 190 and max(of_four.values()) < 310  # 250 on average
