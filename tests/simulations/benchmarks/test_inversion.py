"""Gradient inversion at its smallest: one patient is found in a bare update, and not in a private one."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"


@pytest.fixture
def inversion(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's functions by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "inversion.py"))


def test_a_patient_is_found_in_a_bare_update_only(
    inversion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "inversion.json"
    sizes = {"patients": 1, "seeds": 2, "size": 24, "steps": 150}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["", *options, f"--out={out}"])
    inversion["main"]()
    kept = json.loads(out.read_text())
    seen = [(row["seed"], row["update"]) for row in kept["rows"]]
    assert seen == [(0, "bare"), (0, "private"), (1, "bare"), (1, "private")]
    assert kept["correlation"]["bare"]["lowest"] > 0.8
    assert kept["correlation"]["private"]["highest"] < 0.3
    assert out.with_suffix(".html").read_text().count("data:image/png;base64,") == 3


def test_likeness_knows_the_same_image_and_an_empty_one(inversion: Any) -> None:
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert inversion["likeness"](image, image) == {"correlation": 1.0, "psnr_db": 100.0}
    assert inversion["likeness"](torch.full_like(image, 0.5), image)["correlation"] == 0.0
    assert inversion["likeness"](image + 0.1, image)["psnr_db"] == pytest.approx(20.0)
