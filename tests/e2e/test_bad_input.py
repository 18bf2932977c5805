"""What people get wrong: each has its own message and exit code, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import SITES, STUDY, polyclinic


def simulate(study: Path, data: Path, tmp_path: Path, *more: object) -> tuple[int, str]:
    done = polyclinic("simulate", study, "--data", data, "--state", tmp_path / "s", "--out", tmp_path / "run", *more)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ('name = "tiny"', 'nmae = "tiny"', "nearest known key is 'name'"),
        ("rounds = 2", "rounds = -2", "rounds"),
        ('method = "mae"', 'method = "maee"', "mae"),
        ('name = "vit_tiny"', 'name = "resnet18"', "skip tokens"),
        ('kind = "pretrain"\nmethod = "mae"', 'kind = "finetune"', "evaluation.labels names 0 classes"),
        ('cohort = "beta"', 'cohort = "delta"', "'beta'"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(
    wrong: str, right: str, said: str, patients: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.toml").write_text(STUDY.replace(wrong, right, 1))
    code, error = simulate(tmp_path / "s.toml", patients, tmp_path)
    assert code == 2
    assert said in error
    assert "fix:" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def cohort_of_pngs(folder: Path, labels: list[str], patients: list[str]) -> None:
    folder.mkdir(parents=True)
    lines = ["image,label,patient"]
    for number, (label, patient) in enumerate(zip(labels, patients, strict=True)):
        Image.effect_noise((40, 40), 20 + number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{label},{patient}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def data(patients: Path, tmp_path: Path) -> Path:
    """The consortium's patients, to be spoilt."""
    shutil.copytree(patients, tmp_path / "data")
    return tmp_path / "data"


def test_an_empty_site(data: Path, study: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "beta")
    (data / "beta").mkdir()
    code, error = simulate(study, data, tmp_path)
    assert code == 2
    assert "beta" in error


def test_a_site_with_one_patient(data: Path, study: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "beta")
    cohort_of_pngs(data / "beta", ["normal"] * 3, ["p"] * 3)
    code, error = simulate(study, data, tmp_path)
    assert code == 2
    assert "beta" in error
    assert "patient" in error


def test_a_site_whose_files_all_go_to_quarantine(data: Path, study: Path, tmp_path: Path) -> None:
    for path in (data / "beta").rglob("*.dcm"):
        path.write_bytes(b"not an image")
    code, error = simulate(study, data, tmp_path)
    assert code == 2
    assert "beta" in error
    assert "not_an_image" in error


def test_one_class_leaves_out_the_probe_and_says_why(data: Path, study: Path, tmp_path: Path) -> None:
    for name in SITES:
        shutil.rmtree(data / name)
        cohort_of_pngs(data / name, ["normal"] * 8, [f"p{k}" for k in range(8)])
    done = polyclinic("simulate", study, "--data", data, "--state", tmp_path / "s", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "no comparison" in done.stdout
    assert (tmp_path / "run" / "report.html").exists()


def test_more_sites_needed_than_there_are(data: Path, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STUDY + "\n[aggregation]\nmin_sites = 9\n")
    code, error = simulate(tmp_path / "s.toml", data, tmp_path)
    assert code == 2
    assert "min_sites" in error


def test_a_run_directory_in_use_is_not_overwritten(study: Path, patients: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("kept")
    code, error = simulate(study, patients, tmp_path)
    assert code == 2
    assert "is not empty" in error
    assert "--resume" not in error  # there is no run in it
    (tmp_path / "run" / "study.toml").write_text("")
    code, error = simulate(study, patients, tmp_path)
    assert code == 2
    assert "--resume" in error
    assert (tmp_path / "run" / "precious.txt").read_text() == "kept"


def test_resuming_what_is_not_a_run(study: Path, patients: Path, tmp_path: Path) -> None:
    code, error = simulate(study, patients, tmp_path, "--resume")
    assert code == 2
    assert "no run to resume" in error


def test_resuming_with_another_study(study: Path, patients: Path, tmp_path: Path) -> None:
    from polyclinic.study import load_study
    from polyclinic_server.rundir import RunDir

    (tmp_path / "other.toml").write_text(STUDY.replace("seed = 3", "seed = 4"))
    RunDir(tmp_path / "run").create(load_study(tmp_path / "other.toml"))
    code, error = simulate(study, patients, tmp_path, "--resume")
    assert code == 2
    assert "another study" in error


BROKEN = """
from polyclinic_client import app
from polyclinic_simulations.engines.local import LocalGrid, FIRST_NODE
work, pull = app.answer, LocalGrid.pull_messages
def answer(order, tensors, site, progress=None):
    if site.name == "beta":
        raise RuntimeError("/data/secret/path")
    return work(order, tensors, site, progress)
def silent(self, ids):
    gamma = FIRST_NODE + 2
    return [m for m in pull(self, ids) if m.metadata.src_node_id != gamma or m.metadata.message_type == "query"]
app.answer, LocalGrid.pull_messages = answer, silent
"""


def test_a_site_that_raises_and_a_site_that_never_answers(patients: Path, tmp_path: Path) -> None:
    rows = 'rows = ["pixels", "random", "alone"]\n\n[aggregation]\nmin_sites = 1\nround_deadline_s = 0.5'
    (tmp_path / "s.toml").write_text(STUDY.replace('rows = ["pixels", "random"]', rows))
    run = tmp_path / "run"
    arguments = ("simulate", tmp_path / "s.toml", "--data", patients, "--state", tmp_path / "s", "--out", run)
    done = polyclinic(*arguments, "--json", code=BROKEN)
    assert done.returncode == 0, done.stderr
    assert "beta left out: the site failed: RuntimeError" in done.stderr
    assert "gamma left out: no answer" in done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["comparison"]) == ["pixels", "random", "federated", "alone:alpha", "alone:gamma"]
    assert [note for note in summary["notes"] if "no row alone:beta" in note]
    events = (run / "events.jsonl").read_text()
    assert events.count('"site_missing"') == 4  # three rounds and the last measurement
    assert "secret" not in events + done.stderr


def test_resuming_with_other_patients(study: Path, data: Path, tmp_path: Path) -> None:
    stop = "from polyclinic_server import rounds\ndef stop(*a): raise KeyboardInterrupt\nrounds._close = stop"
    arguments = ("simulate", study, "--data", data, "--state", tmp_path / "s", "--out", tmp_path / "run")
    stopped = polyclinic(*arguments, code=stop)
    assert stopped.returncode == 130
    assert f"--out {tmp_path / 'run'} --resume" in stopped.stderr
    shutil.rmtree(next(path for path in (data / "beta").iterdir() if path.is_dir()))
    code, error = simulate(study, data, tmp_path, "--resume")
    assert code == 2
    assert "the patients or images of site 'beta' have changed" in error
