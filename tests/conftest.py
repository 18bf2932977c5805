"""What every test runs under."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # with more threads than free cores, small tensors wait for each other

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("quick")
