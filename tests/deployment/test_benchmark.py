"""The benchmark of rounds without work, at a toy size; how fast the sides are, is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "simulations" / "benchmarks" / "deployment.py"

pytestmark = [pytest.mark.deployed, pytest.mark.slow, pytest.mark.timeout(600)]


def test_counts_seconds_processes_and_bytes_of_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "deployment.json"
    command = [sys.executable, BENCHMARK, "--sites", "2", "--rounds", "3", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    ours, flowers = json.loads(out.read_text())["contenders"]
    assert (ours["contender"], flowers["contender"]) == ("polyclinic", "flower")
    for side in (ours, flowers):
        assert len(side["rounds"]) == 2
        assert side["seconds"] > 0
        assert side["processes"] >= 2  # one a site
        assert 92 < side["megabytes"] < 94  # 23 MB to each site, and back
