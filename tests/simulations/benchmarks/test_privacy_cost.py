"""The benchmark of DP-SGD at a toy size; that what it compares gives the same gradients."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.methods.base import ViewBatch
from polyclinic.privacy import dpsgd
from polyclinic.privacy.dpsgd import PatientRecipe
from polyclinic.seeding import forked
from polyclinic.study import PatientPrivacy

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"


@pytest.mark.alone
def test_privacy_cost(tmp_path: Path) -> None:
    out = tmp_path / "privacy_cost.json"
    options = ["--batch", "4", "--physical", "2", "--repeats", "1", "--models", "mae, vit_tiny", "--out", str(out)]
    done = subprocess.run([sys.executable, FOLDER / "privacy_cost.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(out.read_text())["rows"]
    speeds = row["images_per_s"]
    assert speeds["private_times_slower"] == pytest.approx(speeds["plain"] / speeds["private"], rel=0.05)
    assert set(row["memory_mb_by_physical_batch"]) == {"private", "hooks", "ghost"}
    assert row["memory_mb_by_physical_batch"]["private"]["2"] > 5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # in the rivals
@pytest.mark.parametrize("way", ["hooks", "ghost"])
def test_its_rivals_sum_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark: dict[str, Any] = runpy.run_path(str(FOLDER / "privacy_cost.py"))
    _, method, module, batch = benchmark["build"]("mae, vit_tiny", 3)
    order = torch.arange(144).expand(3, -1)
    monkeypatch.setattr(method, "views", lambda one, _: ViewBatch((one.images,), one.patients, {"order": order[:1]}))
    sums = []
    for gradients in (dpsgd.Gradients, benchmark["GRADIENTS"][way]):
        monkeypatch.setattr(dpsgd, "Gradients", gradients)
        recipe = PatientRecipe(PatientPrivacy(mode="patient", clip=0.1))
        with forked(0), recipe.attached(module):
            sums.append(torch.cat([s.flatten() for s in recipe.clipped_sums(module, method, batch)[0]]))
    assert float((sums[0] - sums[1]).norm()) < 2e-3 * float(sums[1].norm())
