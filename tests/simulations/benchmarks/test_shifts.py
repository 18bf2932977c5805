"""Whether shifts are real: the benchmark at its smallest, and each shift of pixels on radiographs where they are."""

import csv
import json
import os
import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from polyclinic.cohort import Cohort, build_cohort
from polyclinic.simulation import LabelShift, MixShift, PixelShift, Shift
from polyclinic.study import Images

from ...tiny import in_memory

FOLDER = Path(__file__).parents[3] / "simulations" / "benchmarks"
DATA = Path(os.environ.get("POLYCLINIC_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
NAME = "nih-chestxray8-subset"
KINDS = get_args(PixelShift)


@pytest.fixture(scope="module")
def shifts() -> Any:
    """The benchmark's functions by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return runpy.run_path(str(FOLDER / "shifts.py"))


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Every eighth image, small."""
    source = DATA / NAME
    if not source.is_dir():
        pytest.skip(f"needs radiographs: set POLYCLINIC_DATA to the folder that holds {NAME}")
    folder = tmp_path_factory.mktemp("radiographs") / "cohort"
    (folder / "images").mkdir(parents=True)
    with (source / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))[::8]
    for row in rows:
        shutil.copy(source / row["image"], folder / row["image"])
    lines = ["image,label,patient", *(f"{row['image']},{row['label']},{row['patient']}" for row in rows)]
    (folder / "labels.csv").write_text("\n".join(lines))
    return build_cohort(folder, Images(size=48), folder.with_name("state"), workers=1)


@pytest.fixture(scope="module")
def unshifted(radiographs: Cohort, shifts: Any) -> list[float]:
    """At severity 0, by seed."""
    images = radiographs.pixels(slice(None)).numpy()
    return [shifts["domain_auc"](images, radiographs.patients, "noise", 0.0, seed) for seed in range(4)]


def test_unshifted_radiographs_are_not_told_apart(unshifted: list[float]) -> None:
    assert np.mean(unshifted) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_is_seen_on_radiographs_the_better_the_stronger_it_is(
    kind: str, radiographs: Cohort, unshifted: list[float], shifts: Any
) -> None:
    images = radiographs.pixels(slice(None)).numpy()
    found = [shifts["domain_auc"](images, radiographs.patients, kind, s, 0) for s in (0.2, 0.5, 1.0)]
    assert all(stronger > weaker - 0.01 for weaker, stronger in pairwise([unshifted[0], *found]))
    assert found[1] > unshifted[0] + 0.1
    assert found[2] > 0.95


def test_the_benchmark_keeps_the_phantoms_curves_beside_what_it_held(
    shifts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = shifts["main"].__globals__
    monkeypatch.setitem(known, "SEVERITIES", (0.0, 1.0))
    monkeypatch.setitem(known, "build_cohort", lambda *given: build_cohort(*given, workers=1))
    out, point = tmp_path / "shifts.json", {"mean": 0.25, "half": 0.125, "seeds": [0.2, 0.3]}
    out.write_text(json.dumps({"shifts": {NAME: {"auc": {"noise": {"0": point, "1": point}}, "share": {}}}}))
    options = ["--patients=10", "--size=24", "--seeds=1", f"--state={tmp_path / 'state'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["", *options])
    shifts["main"]()
    kept = json.loads(out.read_text())["shifts"]
    assert kept[NAME]["auc"]["noise"]["1"] == point
    assert set(kept["phantom"]["auc"]) == set(KINDS)
    assert len({points["0"]["mean"] for points in kept["phantom"]["auc"].values()}) == 1  # no kind changes an image
    assert kept["phantom"]["auc"]["noise"]["1"] == {"mean": 1.0, "half": None, "seeds": [1.0]}
    shares = {kind: [point["mean"] for point in points.values()] for kind, points in kept["phantom"]["share"].items()}
    assert set(shares) == set(get_args(MixShift)) | set(get_args(LabelShift))
    assert shares["label_noise"] == shares["label_policy"] == [0, 1]
    assert all(shares[kind][1] == 0 < shares[kind][0] for kind in ("prevalence", "view_mix", "sex_mix"))
    assert shares["age_mix"][1] < shares["age_mix"][0]
    said = capsys.readouterr().out
    assert f"| {NAME}, auc | 0 | 1 |\n|---|---|---|\n| noise | 0.250 ± 0.125 | 0.250 ± 0.125 |" in said


def test_a_share_is_of_those_that_the_shift_is_about(shifts: Any) -> None:
    """Half of the patients are "spot": at severity 0.5, a third of those who still come."""
    cohort = in_memory(2000, images=1)
    rare = Shift(kind="prevalence", severity=0.5, value="spot")
    policy = Shift(kind="label_policy", severity=0.5, value="spot", becomes="clear")
    assert shifts["share"](cohort, rare, 0) == pytest.approx(1 / 3, abs=0.05)
    assert shifts["share"](cohort, policy, 0) == pytest.approx(0.5, abs=0.05)
