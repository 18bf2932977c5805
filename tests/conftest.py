"""What every test runs under."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from polyclinic import model

torch.set_num_threads(1)  # with more threads than free cores, small tensors wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for every process that a test starts: half of its processor time

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def own_encoder() -> Iterator[None]:
    """No test is given the untrained encoder that another kept: some put one of their own into the table."""
    yield
    model._initialised.cache_clear()
