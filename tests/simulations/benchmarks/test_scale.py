"""The benchmark of many sites at a toy size: what its rows are made of, and that both sides train the same model."""

import importlib
import importlib.util
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

import polyclinic
from polyclinic import encoders
from polyclinic.model import _initialised, build_stage

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"

pytestmark = pytest.mark.alone


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's functions."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "scale.py"))


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`vit_tiny` as it is in a Python that starts with small_encoder on its path."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    runpy.run_path(str(FOLDER / "small_encoder" / "sitecustomize.py"))
    spec = sys.meta_path[0].find_spec("polyclinic.encoders", polyclinic.__path__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(encoders.ENCODERS, "vit_tiny", module.ENCODERS["vit_tiny"])
    _initialised.cache_clear()
    yield
    _initialised.cache_clear()  # or the next test would be given it


@pytest.mark.usefixtures("small_encoder")
def test_a_study_of_the_small_encoder_leaves_its_marks(
    scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic_simulations.simulate._conclude", lambda *given: {})
    scale["write_images"](tmp_path / "images", 3 * scale["PATIENTS"])
    times = scale["ours"]("local", 3, 2, tmp_path)
    assert len(times["marks"]) == 3
    assert len(times["trained_s"]) == 2
    assert 0 < sum(times["trained_s"]) < times["marks"][-1] - times["marks"][0]
    assert times["kept_mb"] == pytest.approx(3 * 2 * 3 * 0.9, abs=6)  # sites, rounds, tensors in MB; and checkpoints
    table = (tmp_path / "run" / "metrics.csv").read_text()
    assert table.count(f",images,{scale['TRAINED']}.0") == 6


def test_figures_from_known_times(scale: Any) -> None:
    times = {"imported": 11.0, "marks": [14.0, 20.0, 22.0, 26.0], "trained_s": [9.0, 2.0, 4.0]}
    course = [(10.0, 0.0, 0.0), (20.0, 10.0, 4.0), (30.0, 20.0, 8.0)]
    found = scale["figures"](times, 10.0, 27.5, course, sites=10, abreast=2)
    assert found["setup_s"] == 4
    assert found["rounds_s"] == [6, 2, 4]
    assert found["training_s"] == 0.3
    assert found["overhead_s"] == 0.15  # 0.3 s a site and round by the clock, two sites at once
    assert (found["processor_s"], found["leader_s"]) == (0.3, 0.12)
    assert (found["after_s"], found["wall_s"]) == (1.5, 17.5)


def test_a_row_that_is_there_is_not_made_again(scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_one(contender: str, encoder: str, sites: int, rounds: int, cores: int) -> dict[str, Any]:
        asked.append((contender, sites))
        return {"contender": contender, "encoder": encoder, "sites": sites}

    monkeypatch.setitem(scale["main"].__globals__, "run_one", run_one)
    for sites in (["10"], ["10", "20"]):
        options = ["--sites", *sites, "--contenders", "local", "flower", "--out", str(tmp_path / "scale.json")]
        monkeypatch.setattr(sys, "argv", ["", *options])
        scale["main"]()
    assert asked == [("local", 10), ("flower", 10), ("local", 20), ("flower", 20)]
    assert len(json.loads((tmp_path / "scale.json").read_text())["rows"]) == 4


@pytest.mark.usefixtures("small_encoder")
def test_plain_flower_trains_the_studys_model(scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER / "plain_flower"))
    plain = importlib.import_module("pretrain")
    scale["write_images"](tmp_path / "images", 2 * scale["PATIENTS"])
    before = build_stage(scale["make_study"](1, 1), 0)[1].state_dict()
    content = RecordDict({"arrays": ArrayRecord(before), "config": ConfigRecord({"data": str(tmp_path / "images")})})
    context = Context(1, 1, {"partition-id": 1}, RecordDict(), {})
    reply = plain.client(Message(content, 1, "train"), context).content
    after = reply.array_records["arrays"].to_torch_state_dict()
    assert after.keys() == before.keys()
    assert not np.allclose(after["head.0.weight"], before["head.0.weight"])
    assert reply.metric_records["metrics"]["num-examples"] == scale["TRAINED"]
    assert len(plain.load_images(tmp_path / "images", 0)) == scale["TRAINED"]
