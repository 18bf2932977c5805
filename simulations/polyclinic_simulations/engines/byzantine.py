"""What unreliable and hostile sites make of an update before it is sent."""

from collections.abc import Sequence

import numpy as np
from flwr.app import Array
from numpy.random import Generator

from polyclinic.faults import AnyFault, Scaling, SignFlip, UpdateNoise
from polyclinic.wire import Packed, Tensors

LEAST_DAMAGE = 8
"""Bytes, of which four are all those of one float32, wherever they are."""


def changed(fault: AnyFault, update: Tensors, rng: Generator) -> Tensors:
    """The update u as the site sends it: -u, factor u, or u + factor |u| g/|g| with g drawn from N(0, 1)."""
    with np.errstate(invalid="ignore", over="ignore"):  # training may have diverged; the gate is to see that
        match fault:
            case SignFlip():
                return {name: -value for name, value in update.items()}
            case Scaling():
                return {name: value * np.float32(fault.factor) for name, value in update.items()}
            case UpdateNoise():
                drawn = {name: rng.standard_normal(value.shape, np.float32) for name, value in update.items()}
                step = np.float32(fault.factor * _norm(update) / _norm(drawn))
                return {name: value + step * drawn[name] for name, value in update.items()}
    return update


def _norm(tensors: Tensors) -> float:
    squares = (float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())
    return float(np.sqrt(sum(squares)))


def damaged(packed: Packed, rng: Generator) -> Packed:
    """With a stretch of set bits, which is NaN in the tensors and no JSON before them; or random throughout."""
    [(name, array)] = packed.items()
    data = np.frombuffer(array.data, np.uint8).copy()
    if rng.random() < 0.5:
        start = int(rng.integers(0, data.size - LEAST_DAMAGE + 1))
        data[start : start + max(LEAST_DAMAGE, data.size // 100)] = 0xFF
    else:
        data = rng.integers(0, 256, data.size, dtype=np.uint8)
    return Packed({name: Array(array.dtype, tuple(array.shape), array.stype, data.tobytes())})


def colluded(updates: Sequence[Tensors], z: float) -> Tensors:
    """mean - z std of the updates, weight by weight, with the std of a population.

    Source: Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning",
    arXiv 1902.06156.
    """
    common = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for name in updates[0] if updates else ():
            each = np.stack([update[name] for update in updates]).astype(np.float64)  # (sites, *weights)
            common[name] = (each.mean(axis=0) - z * each.std(axis=0)).astype(np.float32)
    return common
