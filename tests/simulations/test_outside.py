"""A run's encoder on another cohort, beside sites whose cohorts may be gone."""

import json
from pathlib import Path

import pytest

from polyclinic.artifacts import save_encoder
from polyclinic.cohort import build_cohort
from polyclinic.encoders import ENCODERS
from polyclinic.errors import CohortError
from polyclinic.model import encoder_of
from polyclinic_simulations.outside import evaluate_outside

from ..tiny import TinyEncoder, open_run, tiny_study, write_cohort


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with an encoder, and no sites."""
    monkeypatch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
    study = tiny_study()
    open_run(tmp_path / "run", study)
    save_encoder(tmp_path / "run" / "encoder.safetensors", encoder_of(study, None), study)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("patients", "words", "cure"),
    [
        (6, {}, "more patients of each class: tested are 30% of its patients"),
        (20, {"spot": "", "clear": ""}, "a cohort with labels"),
        (20, {"spot": "clear"}, "patients of two classes"),
    ],
)
def test_what_cannot_be_measured_says_what_would_mend_it(
    patients: int, words: dict[str, str], cure: str, run: Path, tmp_path: Path
) -> None:
    labels = write_cohort(tmp_path / "cohort", patients) / "labels.csv"
    text = labels.read_text()
    for word, other in words.items():
        text = text.replace(word, other)
    labels.write_text(text)
    with pytest.raises(CohortError, match="no probe on cohort") as caught:
        evaluate_outside(run, tmp_path / "cohort", tmp_path / "state")
    assert cure in caught.value.fix
    assert "map" not in caught.value.fix


def test_a_folder_of_cohorts_is_none(run: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("south", "north")):
        write_cohort(tmp_path / "sites" / name, 20, seed)
    with pytest.raises(CohortError, match="holds some: north, south") as caught:
        evaluate_outside(run, tmp_path / "sites", tmp_path / "state")
    assert caught.value.fix == f"give one: --cohort {tmp_path / 'sites' / 'north'}"
    assert list(evaluate_outside(run, tmp_path / "sites" / "north", tmp_path / "state")[0])


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
