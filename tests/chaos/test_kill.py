"""kill -9 at any moment, then on: final tensors, checkpoints and metrics are those of an undisturbed run."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cohort import build_cohort
from polyclinic.files import write_atomic
from polyclinic.study import Study
from polyclinic_client.site import write_site

from ..tiny import SIMCLR, events, measured, open_run, tiny_study, write_cohort

SITES = {"east": 8, "north": 10, "west": 12}
SECOND = {**SIMCLR, "rounds": 2, "projection": 4, "temperature": 0.5}
UNLABELLED = {"labels": {"ignore": ["clear", "spot"]}}
"""No probes, which take time; the health figures ride with training as well."""
SIMCLR_TWICE = tiny_study(stages=[{**SIMCLR, "rounds": 3}, SECOND], evaluation=UNLABELLED)
MAE = {"kind": "pretrain", "method": "mae", "rounds": 2, "batch_size": 8, "decoder_depth": 1, "decoder_width": 32}
MASKED = tiny_study(encoder={"name": "vit_tiny"}, stages=[MAE], evaluation={**UNLABELLED, "every": 0})


class Victim:
    """A process that leads studies in forks of itself."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("victim.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def lead(self, run: Path, kill: list[Any] | float | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"run": str(run), "kill": kill}) + "\n")
        self.process.stdin.flush()
        ended: dict[str, Any] = json.loads(self.process.stdout.readline())
        return ended

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    process = Victim()
    yield process
    process.close()


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built cohorts by site."""
    folder = tmp_path_factory.mktemp("cohorts")
    images = SIMCLR_TWICE.images
    return {
        name: build_cohort(write_cohort(folder / name, n, seed=n), images, folder / "state", workers=1).folder
        for name, n in SITES.items()
    }


def prepare(folder: Path, study: Study, cohorts: dict[str, Path]) -> Path:
    """A run directory with its sites, as `simulate` leaves it before the first round."""
    open_run(folder, study)
    for name, cohort in cohorts.items():
        write_site(folder / "sites" / name, name, cohort)
    write_atomic(folder / "seats.json", json.dumps(SITES))
    return folder


@pytest.fixture(scope="module")
def whole(cohorts: dict[str, Path], victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An undisturbed run, and the seconds that it took."""
    run = prepare(tmp_path_factory.mktemp("whole") / "run", SIMCLR_TWICE, cohorts)
    ended = victim.lead(run)
    assert ended["code"] == 0
    return run, ended["seconds"]


def assert_as_undisturbed(run: Path, whole: Path) -> None:
    assert (run / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    for name in kept:
        assert (run / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes(), name
    rows = measured(run)
    assert rows == measured(whole)
    assert len({row[:4] for row in rows}) == len(rows)
    assert events(run)[-1]["event"] == "run_finished"  # and every line before it is whole
    for state in (run / "sites").iterdir():
        files = sorted(path.name for path in state.rglob("*.safetensors"))
        assert files == sorted(path.name for path in (whole / "sites" / state.name).rglob("*.safetensors"))


STEP, FSYNC = "polyclinic.training:Plain.step", "os:fsync"
MOMENTS = {
    "before anything": ["polyclinic_server.checkpoints:newest", 1, "before"],
    "before the first checkpoint": ["polyclinic_server.checkpoints:save", 1, "before"],
    "the first step of training": [STEP, 1, "before"],
    "in the middle of training": [STEP, 17, "after"],
    "the last training": [STEP, 30, "before"],
    "a site has trained and not stored": ["polyclinic_client.state:SiteState.keep", 4, "before"],
    "a site has stored and not answered": ["polyclinic_client.state:SiteState.keep", 5, "after"],
    "a site's moments stand and its update does not": ["polyclinic_client.state:save_tensors", 14, "before"],
    "half a site's moments are written": ["polyclinic.artifacts:_blocks", 60, "yield"],
    "half a site's moments are written over older ones": ["polyclinic.artifacts:_blocks", 585, "yield"],
    "an update is being checked": ["polyclinic_server.gate:_chunks", 30, "after"],
    "half an update is folded": ["polyclinic_server.aggregation.fedavg:_steps", 15, "after"],
    "the fold is being closed": ["polyclinic_server.aggregation.fedavg:FedAvg.close", 2, "before"],
    "between metrics and checkpoint": ["polyclinic_server.checkpoints:save", 3, "before"],
    "a checkpoint's tensors stand and its facts do not": ["polyclinic_server.checkpoints:write_atomic", 4, "before"],
    "a checkpoint stands and the oldest is not gone": ["polyclinic_server.checkpoints:write_atomic", 5, "after"],
    "the last round of a stage": ["polyclinic_server.checkpoints:save", 4, "after"],
    "the next stage is being set up": ["polyclinic_server.rounds:initial_tensors", 1, "before"],
    "metrics are being written": ["polyclinic_server.rundir:RunDir.metrics", 11, "after"],
    "the last measurement": ["polyclinic_client.work:evaluate", 17, "before"],
    "before the encoder is saved": ["polyclinic_server.app:save_encoder", 1, "before"],
    "the encoder is saved and nobody told": ["polyclinic_server.app:save_encoder", 1, "after"],
    "as a file is made durable, later": [FSYNC, 9, "before"],
    "as a file has been made durable": [FSYNC, 14, "after"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(
    moment: str, whole: tuple[Path, float], cohorts: dict[str, Path], victim: Victim, tmp_path: Path
) -> None:
    run = prepare(tmp_path / "run", SIMCLR_TWICE, cohorts)
    assert victim.lead(run, MOMENTS[moment])["code"] == -signal.SIGKILL
    assert victim.lead(run)["code"] == 0
    assert_as_undisturbed(run, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_at_random_moments(
    seed: int, whole: tuple[Path, float], cohorts: dict[str, Path], victim: Victim, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    run = prepare(tmp_path / "run", SIMCLR_TWICE, cohorts)
    codes = [victim.lead(run, rng.uniform(0.02, 0.4 * whole[1]))["code"] for _ in range(6)]
    assert codes.count(-signal.SIGKILL) > 0
    assert set(codes) <= {0, -signal.SIGKILL}
    assert victim.lead(run)["code"] == 0
    assert_as_undisturbed(run, whole[0])


@pytest.mark.slow
def test_killed_within_masked_autoencoding(cohorts: dict[str, Path], victim: Victim, tmp_path: Path) -> None:
    undisturbed, run = (prepare(tmp_path / name, MASKED, cohorts) for name in ("whole", "run"))
    assert victim.lead(undisturbed)["code"] == 0
    assert victim.lead(run, [STEP, 8, "before"])["code"] == -signal.SIGKILL
    assert victim.lead(run)["code"] == 0
    assert_as_undisturbed(run, undisturbed)


def test_a_site_that_lost_its_state_between_rounds_ends_elsewhere_and_still_ends(
    whole: tuple[Path, float], cohorts: dict[str, Path], victim: Victim, tmp_path: Path
) -> None:
    import shutil

    run = prepare(tmp_path / "run", SIMCLR_TWICE, cohorts)
    assert victim.lead(run, ["polyclinic_server.checkpoints:save", 3, "after"])["code"] == -signal.SIGKILL
    for folder in (run / "sites" / "north").iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    assert victim.lead(run)["code"] == 0
    assert (run / "encoder.safetensors").read_bytes() != (whole[0] / "encoder.safetensors").read_bytes()
