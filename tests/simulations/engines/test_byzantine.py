"""What becomes of an update at an unreliable site, each against its formula."""

import numpy as np
import pytest

from polyclinic import wire
from polyclinic.faults import AnyFault, Scaling, SignFlip, UpdateNoise
from polyclinic.seeding import numpy_generator
from polyclinic.wire import Malformed, Tensors, pack_tensors, unpack_tensors
from polyclinic_simulations.engines.byzantine import changed, colluded, damaged

from ...tiny import same_bits


def drawn(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"weight": (3, 4), "bias": (4,), "scale": ()}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def flat(tensors: Tensors) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([value.ravel().astype(np.float64) for value in tensors.values()])


@pytest.mark.parametrize(
    ("fault", "factor"), [(SignFlip(kind="sign_flip"), -1), (Scaling(kind="scaling", factor=8), 8)]
)
def test_a_multiple_of_the_update(fault: AnyFault, factor: float) -> None:
    update = drawn(1)
    sent = changed(fault, update, numpy_generator(0))
    assert same_bits(sent, {name: np.float32(factor) * value for name, value in update.items()})


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_noise_is_of_the_norm_that_is_asked_and_of_no_direction(factor: float) -> None:
    update = {"a": np.full((200, 50), 0.5, np.float32), "b": np.zeros(30, np.float32)}
    fault = UpdateNoise(kind="noise", factor=factor)
    one, other = (flat(changed(fault, update, numpy_generator(seed))) - flat(update) for seed in (1, 2))
    norm = np.linalg.norm(flat(update))
    assert np.linalg.norm(one) == pytest.approx(factor * norm, rel=1e-5)
    for cosine in (one @ flat(update) / (factor * norm**2), one @ other / (factor * norm) ** 2):
        assert abs(cosine) < 0.05  # of standard deviation 0.01
    assert same_bits(changed(fault, update, numpy_generator(1)), changed(fault, update, numpy_generator(1)))


def test_colluding_sites_send_what_lies_z_deviations_below_their_mean() -> None:
    updates = [{"a": np.array([1.0, -2.0], np.float32)}, {"a": np.array([3.0, -2.0], np.float32)}]
    assert colluded(updates, 1.5)["a"].tolist() == [0.5, -2.0]  # mean (2, -2), deviation (1, 0)
    assert colluded(updates, 0.0)["a"].tolist() == [2.0, -2.0]
    assert same_bits(colluded([drawn(1)], 2.0), drawn(1))
    five = [drawn(seed) for seed in range(5)]
    found = flat(colluded(five, 0.7))
    for k in range(found.size):
        values = [float(flat(update)[k]) for update in five]
        mean = sum(values) / 5
        deviation = (sum((value - mean) ** 2 for value in values) / 5) ** 0.5
        assert found[k] == pytest.approx(mean - 0.7 * deviation, abs=1e-6)
    assert colluded([], 1.0) == {}


def test_damage_is_never_read_as_an_update() -> None:
    """Wherever it falls: the reader finds no tensors, or values that are not finite."""
    packed = pack_tensors(drawn(1))
    size = len(next(iter(packed.values())).data)
    reasons = set()
    for seed in range(4 * size):
        try:
            found = unpack_tensors(damaged(packed, numpy_generator(seed)))
            assert not all(np.isfinite(value).all() for value in found.values())
            reasons.add("not finite")
        except Malformed as reason:
            reasons.add(str(reason))
    assert {"not finite", "the tensors have no header", "the tensors' header cannot be read"} <= reasons
    assert same_bits(wire.unpack_tensors(packed), drawn(1))  # what was sent is not touched
