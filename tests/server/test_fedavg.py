"""The fold: against a slow twin in float64, in every order, at its bounds."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from polyclinic_server.aggregation import RULES
from polyclinic_server.aggregation.fedavg import CHUNK, LARGEST_VALUE, LARGEST_WEIGHT, STEP, FedAvg, weight_of

from ..tiny import same_bits

Update = dict[str, NDArray[np.float32]]

SHAPES = {"a.weight": (3, 4), "b": (), "c": (0, 5), "d": (7,)}


def draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], scale: float = 1.0) -> Update:
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def fold(start: Update, updates: list[Update], weights: list[int]) -> Update:
    rule = FedAvg(start)
    for update, weight in zip(updates, weights, strict=True):
        rule.add(update.items(), weight)
    return rule.close(start)


def slow_mean(start: Update, updates: list[Update], weights: list[int]) -> dict[str, NDArray[np.float64]]:
    """w + sum_k (n_k / n) delta_k with exact sums, a value at a time."""
    total = sum(weights)
    mean = {}
    for name, value in start.items():
        flat = [
            math.fsum(float(u[name].flat[i]) * w for u, w in zip(updates, weights, strict=True)) / total
            for i in range(value.size)
        ]
        mean[name] = value.astype(np.float64) + np.array(flat).reshape(value.shape)
    return mean


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 65_536), min_size=1, max_size=6),
    st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
    st.sampled_from([0.0, 1.0]),  # from zero, the rounding to fixed point is all that is left
)
def test_is_the_weighted_mean(seed: int, weights: list[int], scale: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    start = draw(rng, SHAPES, size)
    updates = [draw(rng, SHAPES, scale) for _ in weights]
    new, exact = fold(start, updates, weights), slow_mean(start, updates, weights)
    for name, value in new.items():
        assert value.dtype == np.float32
        assert value.shape == start[name].shape
        # Each delta is rounded by half a step; the result is the float32 next to the sum.
        error = np.abs(value - exact[name])
        assert (error <= STEP / 2 + np.spacing(np.abs(exact[name]).astype(np.float32))).all()


def test_has_the_same_bits_in_every_order() -> None:
    rng = np.random.default_rng(0)
    start = draw(rng, SHAPES)
    arrivals = [(draw(rng, SHAPES, 10.0**-k), int(rng.integers(1, 65_536))) for k in range(5)]
    results = [fold(start, *map(list, zip(*order, strict=True))) for order in itertools.permutations(arrivals)]
    assert all(same_bits(results[0], other) for other in results)
    # Float sums do depend on the order, or the above would show nothing.
    floats = {sum(u["d"] * np.float32(w) for u, w in order).tobytes() for order in itertools.permutations(arrivals)}
    assert len(floats) > 1


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunks_meet_at_their_edges(size: int) -> None:
    rng = np.random.default_rng(size)
    start, one, two = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
    new = fold({"x": start}, [{"x": one}, {"x": two}], [1, 3])["x"]
    expected = (start + (one.astype(np.float64) + 3 * two.astype(np.float64)) / 4).astype(np.float32)
    assert np.abs(new - expected).max() <= np.spacing(np.float32(8))


def test_one_update_of_a_power_of_two_is_exact() -> None:
    start = {"x": np.array([1.0, -2.0], np.float32)}
    assert fold(start, [{"x": np.array([0.5, 2.0**-20], np.float32)}], [3])["x"].tolist() == [1.5, -2.0 + 2.0**-20]


def test_weights_that_could_overflow_are_refused_and_nothing_is_added() -> None:
    start = {"x": np.zeros(2, np.float32)}
    rule = FedAvg(start)
    rule.add({"x": np.ones(2, np.float32)}.items(), LARGEST_WEIGHT - 2)
    with pytest.raises(OverflowError):
        rule.add({"x": np.ones(2, np.float32)}.items(), 2)
    rule.add({"x": np.zeros(2, np.float32)}.items(), 1)
    mean = (LARGEST_WEIGHT - 2) / (LARGEST_WEIGHT - 1)
    assert rule.close(start)["x"].tolist() == [np.float32(mean)] * 2


def test_the_largest_values_and_weights_fit() -> None:
    largest = np.nextafter(np.float32(LARGEST_VALUE), np.float32(0))
    for value in (largest, -largest):
        new = fold({"x": np.zeros(1, np.float32)}, [{"x": np.array([value])}] * 2, [LARGEST_WEIGHT // 2 - 1] * 2)
        assert new["x"].tolist() == [value]


def test_weightings() -> None:
    patients = [1, 4, 100, 65_536]
    assert [weight_of(n, "patients") for n in patients] == patients
    assert [weight_of(n, "equal") for n in patients] == [1, 1, 1, 1]
    assert [weight_of(n, "tempered") / 1024 for n in patients] == [1, 2, 10, 256]
    with pytest.raises(KeyError):
        weight_of(1, "by height")


def test_rules_are_found_by_name() -> None:
    assert RULES["fedavg"] is FedAvg
