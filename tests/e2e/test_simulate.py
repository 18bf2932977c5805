"""`polyclinic simulate` as a researcher runs it."""

import csv
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.artifacts import load_encoder, load_tensors
from polyclinic_simulations.phantom import identifiers

from .conftest import SITES, polyclinic

RUN_FILES = {
    "study.toml", "summary.json", "metrics.csv", "events.jsonl", "checkpoints", "encoder.safetensors",
    "MODEL_CARD.md", "report.html",
}  # fmt: skip


def encoder_bytes(run: Path) -> bytes:
    return (run / "encoder.safetensors").read_bytes()


def test_leaves_the_run_directory_that_is_promised(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= RUN_FILES
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["comparison"]) == ["pixels", "random", "federated"]
    assert set(summary["sites"]) == set(SITES)
    assert summary["rounds"] == 3
    assert summary["bytes_sent"] > 0
    assert all(0 <= row["auc_low"] <= row["auc"] <= row["auc_high"] <= 1 for row in summary["comparison"].values())


def test_metrics_hold_every_round_and_site_once(finished: Path) -> None:
    rows = table(finished)
    losses = [(row["round"], row["site"]) for row in rows if row["metric"] == "loss"]
    assert sorted(losses) == sorted((str(r), site) for r in (1, 2, 3) for site in ("", *SITES))
    keys = [tuple(row[k] for k in ("stage", "round", "site", "metric")) for row in rows]
    assert len(keys) == len(set(keys))


def test_the_loss_of_mae_falls(finished: Path) -> None:
    first, last = (
        float(row["value"])
        for row in table(finished)
        if (row["metric"], row["stage"], row["site"]) == ("loss", "0", "")
    )
    assert last < first


def test_keeps_nothing_that_only_going_on_would_need(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "round-0003.json",
        "round-0003.safetensors",
    ]
    weights = {path.relative_to(finished).as_posix() for path in finished.rglob("*.safetensors")}
    assert weights == {"encoder.safetensors", "checkpoints/round-0003.safetensors"}


def test_prints_the_table_and_where_the_report_is(finished: Path) -> None:
    printed = (finished.parent / "printed.txt").read_text()
    assert "federated" in printed
    assert "report.html" in printed


def test_the_encoder_loads_in_one_line(finished: Path) -> None:
    features = load_encoder(finished)(torch.rand(2, 1, 32, 32))
    assert features.shape == (2, 192)


def test_no_identifier_and_no_path_of_an_image_is_anywhere(finished: Path, patients: Path, state: Path) -> None:
    secrets = {s.encode() for name in SITES for s in identifiers(patients / name) if len(s) >= 4}
    assert len(secrets) > 100
    assert occurring(b"..." + next(iter(secrets)) + b"...", secrets)
    searched = 0
    for path in [*finished.parent.rglob("*"), *state.rglob("*")]:
        if path.is_file():
            found = occurring(path.read_bytes(), secrets)
            assert not found, f"{path.name} holds {found[:3]}"
            searched += 1
    assert searched > 20


def occurring(data: bytes, secrets: set[bytes]) -> list[bytes]:
    """Those of `secrets` (three bytes or longer) that stand in `data`: each is compared only where its start stands."""
    starts: dict[bytes, list[bytes]] = {}
    for secret in secrets:
        starts.setdefault(secret[:3], []).append(secret)
    looked_for = np.zeros(1 << 24, bool)
    looked_for[[int.from_bytes(start, "little") for start in starts]] = True
    letters = np.frombuffer(data, np.uint8).astype(np.uint32)
    places = np.flatnonzero(looked_for[letters[:-2] | letters[1:-1] << 8 | letters[2:] << 16]) if len(data) > 2 else ()
    return sorted({s for at in places for s in starts[data[at : at + 3]] if data.startswith(s, at)})


def test_the_same_study_gives_the_same_bits(finished: Path, study: Path, patients: Path, tmp_path: Path) -> None:
    # Another state directory: other HMAC keys, other rows on disk.
    done = polyclinic("simulate", study, "--data", patients, "--state", tmp_path / "s", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert encoder_bytes(tmp_path / "run") == encoder_bytes(finished)


MOMENTS = {
    "in training": "from polyclinic.training import Plain as m; name = 'step'",
    "while the rows are made": "from polyclinic_simulations import simulate as m; name = 'row'",
}
"""The other moments stand in tests/chaos."""

KILL = """
import os, signal
from unittest import mock
{moment}
inner, left = getattr(m, name), {calls}
def deadly(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)
mock.patch.object(m, name, deadly).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_as_undisturbed(
    moment: str, finished: Path, study: Path, patients: Path, state: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    calls = random.Random(moment).randint(2, 3)  # the same for each moment, so that a failure repeats
    arguments = ("simulate", study, "--data", patients, "--state", state, "--out", run)
    killed = polyclinic(*arguments, code=KILL.format(moment=MOMENTS[moment], calls=calls))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = polyclinic(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert encoder_bytes(run) == encoder_bytes(finished)
    last = "checkpoints/round-0003.safetensors"
    assert (run / last).read_bytes() == (finished / last).read_bytes()
    assert (run / last).with_suffix(".json").read_bytes() == (finished / last).with_suffix(".json").read_bytes()
    assert measured(run) == measured(finished)


def table(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def measured(run: Path) -> list[dict[str, str]]:
    """All metrics but times, sorted: a resumed round may come in another order of lines."""
    rows = [row for row in table(run) if row["metric"] != "seconds"]
    return sorted(rows, key=lambda row: list(row.values()))


def test_a_checkpoint_truncated_by_hand_is_passed_over(
    finished: Path, study: Path, patients: Path, state: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("simulate", study, "--data", patients, "--state", state, "--out", run)
    polyclinic(*arguments, code=KILL.format(moment=MOMENTS["while the rows are made"], calls=1))
    newest = run / "checkpoints" / "round-0003.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = polyclinic(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "round-0003" in done.stderr
    assert load_tensors(newest)[0].keys() == load_tensors(finished / "checkpoints" / "round-0003.safetensors")[0].keys()
    assert encoder_bytes(run) == encoder_bytes(finished)
