"""Pretraining, then fine-tuning, from DICOM files to a classifier's scores; sites that cannot take part in it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import save_file

from polyclinic.artifacts import load_classifier
from polyclinic.encoders import build_encoder
from polyclinic.seeding import forked
from polyclinic.study import Encoder, Images

from ..tiny import events
from .conftest import SITES, STUDY, polyclinic

HEAD, _, _ = STUDY.partition("[[stages]]")
STAGES = """
[[stages]]
kind = "pretrain"
method = "mae"
rounds = 1
batch_size = 16

[[stages]]
kind = "finetune"
rounds = 3
batch_size = 16
{settings}
"""
TAIL = """
[evaluation]
test_fraction = 0.5
rows = {rows}
labels = {labels}
""" + "".join(f'\n[[simulation.site]]\nname = "{name}"\ncohort = "{name}"\n' for name in SITES)
LABELS = '{ well = ["normal"], ill = ["nodule", "consolidation", "effusion"] }'


def tail(*rows: str) -> str:
    """The study after its stages, with these rows beside `federated`."""
    return TAIL.replace("{labels}", LABELS).replace("{rows}", json.dumps(rows))


def run(folder: Path, patients: Path, state: Path, *rows: str, settings: str = "") -> tuple[int, str]:
    (folder / "study.toml").write_text(HEAD + STAGES.format(settings=settings) + tail(*rows))
    done = polyclinic("simulate", folder / "study.toml", "--data", patients, "--state", state, "--out", folder / "run")
    return done.returncode, done.stdout + done.stderr


def test_a_study_that_fine_tunes_reports_its_classifiers(patients: Path, state: Path, tmp_path: Path) -> None:
    code, said = run(tmp_path, patients, state, "random", "scratch", "pooled")
    assert code == 0, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["classifier"]) == ["federated", "scratch", "pooled"]
    assert list(summary["comparison"]) == ["random", *summary["classifier"]]
    assert summary["operating"]
    assert "Fine-tuned classifier" in said
    assert load_classifier(tmp_path / "run").classes == ["ill", "well"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the fine-tuned classifier is worth" in page
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv", keep_default_na=False)
    own = metrics[(metrics["metric"] == "classifier_auc") & (metrics["site"] == "")]
    assert own["round"].tolist() == [2, 3, 4]  # the head that fine-tuning starts from is not measured
    assert "classifier" in (tmp_path / "run" / "MODEL_CARD.md").read_text()


def test_fine_tuning_alone_from_a_file_whose_path_nobody_sees(patients: Path, state: Path, tmp_path: Path) -> None:
    with forked(0):
        encoder = build_encoder(Encoder(name="vit_tiny"), Images(size=32))
    secret = tmp_path / "Jane Doe"
    secret.mkdir()
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, secret / "w.safetensors")
    init = 'init = { file = "Jane Doe/w.safetensors", family = "polyclinic" }\n'
    stage = STAGES[STAGES.index('[[stages]]\nkind = "finetune"') :].format(settings="")
    (tmp_path / "study.toml").write_text(HEAD.rstrip() + "\n" + init + stage + tail())
    out = tmp_path / "run"
    done = polyclinic("simulate", tmp_path / "study.toml", "--data", patients, "--state", state, "--out", out)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((out / "summary.json").read_text())["classifier"]) == ["federated"]
    for path in (out / name for name in ("encoder.safetensors", "report.html", "MODEL_CARD.md", "summary.json")):
        assert b"Jane" not in path.read_bytes(), path.name
    assert b"Jane" in (out / "study.toml").read_bytes()  # the search can find it


def test_a_site_without_labels_is_left_out_by_name_and_the_others_go_on(
    patients: Path, state: Path, tmp_path: Path
) -> None:
    for name in SITES:
        (tmp_path / name).symlink_to(patients / name)
    (tmp_path / "beta").unlink()
    (tmp_path / "beta").mkdir()
    for number, file in enumerate(sorted((patients / "beta").rglob("*.dcm"))):
        shutil.copyfile(file, tmp_path / "beta" / f"{number}.dcm")  # and no labels.csv
    code, said = run(tmp_path, tmp_path, state, "alone")
    assert code == 0, said
    refused = events(tmp_path / "run", "update_refused")
    own = [event for event in refused if "row" not in event]
    assert [(event["round"], event["site"]) for event in own] == [(2, "beta"), (3, "beta"), (4, "beta")]
    assert all("no training patient has a label" in event["reason"] for event in own)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    [note] = [note for note in summary["notes"] if note.startswith("no row alone:beta: ")]
    assert "could not be trained on it: " in note
    assert "no training patient has a label" in note  # the site's own reason
    assert "federated" in summary["classifier"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("label_fraction = 0", "label_fraction is 0"),
        ("layer_decay = 1.5", "layer_decay is 1.5"),
        ('method = "simclr"', "kind"),
    ],
)
def test_wrong_settings_are_refused(settings: str, said: str, patients: Path, state: Path, tmp_path: Path) -> None:
    code, printed = run(tmp_path, patients, state, settings=settings)
    assert code == 2
    assert said in printed
