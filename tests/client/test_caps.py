"""Caps hold in the processes that they are for."""

import os
import subprocess
import sys

import pytest

from polyclinic_client import caps
from polyclinic_client.policy import Policy

TRY = """
import sys
from polyclinic_client import caps
from polyclinic_client.policy import Policy
caps.limit_memory(Policy(memory_gb=float(sys.argv[1])))
import torch
print(torch.get_num_threads(), torch.cuda.is_available())
torch.nn.Linear(64, 64)(torch.zeros(8, 64)).sum().backward()
try:
    torch.zeros(3_000_000_000, dtype=torch.uint8)
except RuntimeError as error:
    print("memory" in str(error))
print(caps.peak_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_torch_computes_within_its_caps_and_not_beyond() -> None:
    """A cap of 2 GB leaves room for torch and refuses 3 GB; threads and GPUs are those of the environment."""
    environment = {**os.environ, **caps.environment(Policy(threads=2, gpu=False))}
    done = subprocess.run(
        [sys.executable, "-c", TRY, "2.0"], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    threads, cuda, refused, peak = done.stdout.split()
    assert (threads, cuda, refused) == ("2", "False", "True")
    assert 50 < float(peak) < 2000


def test_only_what_is_capped_is_set() -> None:
    assert caps.environment(Policy()) == {}
    limits = caps.environment(Policy(threads=3, gpu=False))
    assert limits == {"CUDA_VISIBLE_DEVICES": "", **dict.fromkeys(caps.THREADS, "3")}


def test_without_a_cap_the_systems_own_limit_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caps.resource, "setrlimit", lambda *_: pytest.fail("a limit was set"))
    caps.limit_memory(Policy())


def test_a_cap_is_never_above_the_systems_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(caps.sys, "platform", "linux")
    monkeypatch.setattr(caps.resource, "getrlimit", lambda _: (1000, 10**9))
    monkeypatch.setattr(caps.resource, "setrlimit", lambda _, limits: found.append(limits))
    caps.limit_memory(Policy(memory_gb=2.0))
    caps.limit_memory(Policy(memory_gb=0.5))
    assert found == [(10**9, 10**9), (5 * 10**8, 10**9)]
