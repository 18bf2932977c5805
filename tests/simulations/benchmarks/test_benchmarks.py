"""Each benchmark runs at a toy size and leaves the figures its README names; how fast it is, is not tested here."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyclinic.study import resolve

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads a benchmark's file by name; returns its functions."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a benchmark by name with options, as from the command line; returns what it has kept."""

    def run(name: str, options: str) -> Any:
        out = tmp_path / "kept" / f"{name}.json"
        command = [sys.executable, FOLDER / f"{name}.py", *options.split(), "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        kept = json.loads(out.read_text())
        machine = kept.pop("machine")
        assert {"date", "cpu", "cores", "units", "memory_gb", "load", "python", "versions"} == set(machine)
        assert str(tmp_path) not in out.read_text()
        return kept

    return run


def test_overhead(run: Any) -> None:
    kept = run("overhead", "--sites 2 --patients 4 --rounds 2")
    assert len(kept["engine_s"]) == 3  # two rounds, and what follows the last
    assert len(kept["bare_s"]) == 2
    assert kept["images_a_site_and_round"] > 2
    assert {"ratio_of_totals", "ratio_median_of_rounds", "extra_s_a_site_and_round"} < set(kept)


def test_overhead_from_known_times(load: Any) -> None:
    seconds = {"engine": [(2, 1), (3, 2), (1, 1)], "bare": [(1, 1), (2, 1)]}  # (clock, processor)
    found = load("overhead")["figures"](SimpleNamespace(**seconds, images=[40, 40]), sites=2)
    assert found["images_a_site_and_round"] == 20
    assert found["bare_images_per_s"] == 26.7
    assert found["ratio_of_totals"] == found["ratio_of_processor_totals"] == 2
    assert found["ratio_median_of_rounds"] == 1.5
    assert found["extra_s_a_site_and_round"] == 0.75
    assert found["extra_processor_s_a_site_and_round"] == 0.5


def test_simclr_speed(run: Any) -> None:
    kept = run("simclr_speed", "--images 16 --batch 4 --threads 1 --repeats 1 --loading 2")
    rows = kept["images_per_s"]
    assert len(rows) == 6
    assert min(rows.values()) > 0
    ours = max(rows[name] for name in rows if name.startswith("polyclinic"))
    assert kept["ratio"] == round(ours / rows["lightly, group norm, 2 workers"], 2)
    assert kept["ratio_in_bf16"] == round(ours / rows["lightly, group norm, 2 workers, bf16"], 2)


def test_pool_first(run: Any) -> None:
    kept = run("pool_first", "--batch 2 --repeats 1")
    assert set(kept["seconds"]) == {"literal", "pool first"}
    assert kept["ratio"] > 5  # with two images and one repeat
    measured = json.loads((FOLDER / "results" / "pool_first.json").read_text())
    assert measured["ratio"] >= measured["goal"] == 20


def test_empty_work(run: Any) -> None:
    [bare] = run("empty_work", "--sizes 2x1 --rounds 2 --contenders bare --watched 2")["runs"]
    assert bare["contender"] == "bare"
    assert bare["wall_s"] == pytest.approx(bare["imports_s"] + bare["before_rounds_s"] + bare["rounds_s"], abs=0.02)
    assert min(bare["peaks_mb"]) == bare["peak_mb"] > 10


def test_empty_work_through_the_real_rounds(load: Any) -> None:
    times = load("empty_work")["local"](2, 1, 2)  # stops unless every round has added 1
    assert times["imported"] <= times["first_round"] < time.monotonic()


def test_fold_memory(run: Any) -> None:
    kept = run("fold_memory", "--sites 6 --tensors 2 --contenders polyclinic")
    [ours] = kept["runs"]
    assert ours["taken_models"] == pytest.approx(ours["taken_mb"] / kept["model_mb"], abs=0.1)


def test_fold_memory_of_flower(load: Any) -> None:
    """Its round adds up; its memory shows only in a process that has none to spare."""
    assert load("fold_memory")["measure"]("flower", 2, 1) >= 0


def test_cohort_speed(run: Any) -> None:
    kept = run("cohort_speed", "--images 40 --repeats 1 --syntaxes 2 --patients 2 --large-files 1 --factor 2")
    assert kept["opening"]["images"] == 40
    assert 0 < kept["opening"]["median_ms"] <= kept["opening"]["worst_ms"]
    assert len({row["transfer_syntax"] for row in kept["building"]}) == 2
    for row in kept["building"]:
        assert row["ratio"] == pytest.approx(row["cohort_images_per_s"] / row["plain_images_per_s"], abs=0.05, rel=0.1)


def test_methods_makes_a_row_for_each_method_and_none_twice(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*methods: str) -> list[dict[str, Any]]:
        folders = ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "methods.json")]
        monkeypatch.setattr(sys, "argv", ["", "--rounds", "1", "--patients", "6", *folders, "--methods", *methods])
        load("methods")["main"]()
        return list(json.loads((tmp_path / "methods.json").read_text())["rows"])

    [row] = made("mae")
    low, high = row["trained"][1:]
    assert 0 <= low <= row["trained"][0] <= high <= 1
    assert row["rank"] > 1
    assert len(row["loss"]) == 2
    known, other = made("sssd", "mae")
    assert known == row
    assert (other["method"], other["encoder"]) == ("sssd", "vit_tiny")


def test_methods_has_a_study_for_every_row(load: Any) -> None:
    found = load("methods")
    for dataset, method, encoder, seed in found["rows"](list(found["BATCH_SIZE"]), list(found["FAMILIES"]), 1):
        study = resolve(found["plain_study"](dataset, method, encoder, seed, 20))
        assert [stage.method for stage in study.stages][-1] == method
        assert len(study.stages) == 1 + (method == "micle")
