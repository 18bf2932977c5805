"""A run's encoder on another cohort, beside sites whose cohorts may be gone."""

import json
from pathlib import Path

import pytest

from polyclinic.artifacts import save_encoder
from polyclinic.cohort import build_cohort
from polyclinic.encoders import ENCODERS
from polyclinic.model import encoder_of
from polyclinic_simulations.outside import evaluate_outside

from ..tiny import TinyEncoder, open_run, tiny_study, write_cohort


def test_a_sites_cohort_that_cannot_be_opened_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are known are still counted, of the sites whose cohorts can be read."""
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    study, run = tiny_study(), tmp_path / "run"
    open_run(run, study)
    save_encoder(run / "encoder.safetensors", encoder_of(study, None), study)
    elsewhere = write_cohort(tmp_path / "elsewhere", 20, seed=1)
    cohorts = {
        name: build_cohort(write_cohort(tmp_path / name, 4, seed), study.images, tmp_path / "states" / name).folder
        for name, seed in (("same", 1), ("damaged", 2), ("short", 3), ("gone", 4))
    }
    (cohorts["damaged"] / "index.npz").write_bytes(b"torn")
    (cohorts["short"] / "images.u8").write_bytes(b"")
    (cohorts["gone"]).rename(tmp_path / "moved")
    for name, folder in cohorts.items():
        (run / "sites" / name).mkdir(parents=True)
        (run / "sites" / name / "site.json").write_text(json.dumps({"cohort": str(folder)}))
    rows, known = evaluate_outside(run, elsewhere, tmp_path / "state")
    assert list(rows) == ["pixels", "random", "federated"]
    assert known == 8  # four patients' images, two each
