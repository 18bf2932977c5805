"""Every method trains a federation from DICOM files to an encoder that loads; MAE and SimCLR do in the other tests."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from polyclinic.artifacts import load_encoder

from .conftest import SITES, STUDY, polyclinic

HEAD, _, TAIL = STUDY.partition("[encoder]")
TAIL = TAIL[TAIL.index("[evaluation]") :]
STAGE = '\n[[stages]]\nkind = "pretrain"\nmethod = "{}"\nrounds = 2\nbatch_size = 16\n'
GENTLE = "local_epochs = 2\nviews = { crop = [0.8, 1.0], flip = false, rotation = 0.0, jitter = 0.1 }\n"
"""With which two rounds of a few steps teach something, whatever the seed."""


@pytest.mark.parametrize(
    ("encoder", "methods"),
    [("resnet18", ["simclr", "micle"]), ("resnet18", ["mlvicx"]), ("vit_tiny", ["mlvicx"]), ("vit_tiny", ["sssd"])],
)
def test_a_federation_learns(encoder: str, methods: list[str], patients: Path, state: Path, tmp_path: Path) -> None:
    stages = "".join(STAGE.format(method) + GENTLE for method in methods)
    (tmp_path / "study.toml").write_text(f'{HEAD}[encoder]\nname = "{encoder}"\n{stages}\n{TAIL}')
    arguments = ("simulate", tmp_path / "study.toml", "--data", patients, "--state", state, "--out", tmp_path / "run")
    done = polyclinic(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 2 * len(methods)
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    losses = metrics[(metrics["metric"] == "loss") & metrics["site"].isin(SITES)]
    assert len(losses) == len(SITES) * summary["rounds"]
    assert losses["value"].between(-1e3, 1e3).all()
    means = metrics[(metrics["metric"] == "loss") & metrics["site"].isna()].groupby("stage")["value"]
    assert (means.last() < means.first()).tolist() == [True] * len(methods), means.apply(list)
    features = load_encoder(tmp_path / "run")(torch.rand(2, 1, 32, 32))
    assert features.isfinite().all() and not torch.equal(features[0], features[1])


def test_micle_says_where_no_patient_has_two_images(patients: Path, state: Path, tmp_path: Path) -> None:
    for name in SITES:  # one image of each patient
        folder = tmp_path / "single" / name
        folder.mkdir(parents=True)
        for first in (patients / name).rglob("*_1.dcm"):
            (folder / first.name).write_bytes(first.read_bytes())
    (tmp_path / "study.toml").write_text(f'{HEAD}[encoder]\nname = "resnet18"\n{STAGE.format("micle")}\n{TAIL}')
    out = tmp_path / "run"
    done = polyclinic(
        "simulate", tmp_path / "study.toml", "--data", tmp_path / "single", "--state", state, "--out", out
    )
    assert done.returncode == 0, done.stderr
    warnings = json.loads((out / "summary.json").read_text())["warnings"]
    assert [f"{name}: no patient to train on has two images: micle trains as simclr" in warnings for name in SITES] == [
        True
    ] * 3
