"""Seeds: every random choice that may be repeated comes from the study's seed and a named purpose.

Two engines, or a run and its resumption, make the same choices because they ask for the same
(purpose, site, stage, round). Privacy noise and the sampling of patients under privacy never come from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # commands that only draw numbers need not wait for torch
    import torch


def seed_for(seed: int, purpose: str, *, site: str = "", stage: int = 0, round: int = 0) -> int:
    """A 63-bit seed, a hash of all arguments.

    >>> seed_for(7, "views", site="north", round=3) == seed_for(7, "views", site="north", round=3)
    True
    >>> seed_for(7, "views", site="north") == seed_for(7, "views", site="south")
    False
    """
    text = repr((seed, purpose, site, stage, round)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def torch_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` in the state that `seed` gives."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


def numpy_generator(seed: int) -> np.random.Generator:
    """A numpy generator in the state that `seed` gives."""
    return np.random.default_rng(seed)


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Run what takes no generator (initialisation, drop path) from `seed`; torch's own state is left as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
