"""Checkpoints: whole or not there, the same bytes for the same state, damaged ones passed over."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.artifacts import save_tensors
from polyclinic.errors import CheckpointError, StorageError
from polyclinic.wire import Tensors, digest
from polyclinic_server import checkpoints
from polyclinic_server.checkpoints import KEPT, Checkpoint
from polyclinic_server.rounds import run_study
from polyclinic_server.rundir import RunDir
from polyclinic_simulations.engines.local import LocalGrid

from ..tiny import SIMCLR, SITES, events, honest, measured, open_run, same_bits, tiny_study

SEATS = dict.fromkeys(SITES, 10)
STUDY = tiny_study(stages=[{**SIMCLR, "rounds": 5}])


def grid() -> LocalGrid:
    return LocalGrid({name: honest(name) for name in SITES})


def made(round: int) -> tuple[Checkpoint, Tensors]:
    rng = np.random.default_rng(round)
    tensors = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in "ab"}
    return Checkpoint("hash", round, 0, digest(tensors), [0.1, 0.2 + round]), tensors


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def names(*rounds: int) -> list[str]:
    return [f"round-{round:04d}.{kind}" for round in rounds for kind in ("json", "safetensors")]


def test_the_newest_comes_back_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for round in range(6):
        checkpoints.save(tmp_path, *made(round))
        found = checkpoints.newest(tmp_path, "hash", pytest.fail)
        assert found is not None
        assert found[0] == made(round)[0]
        assert same_bits(found[1], made(round)[1])
    assert stored(tmp_path) == names(*range(6 - KEPT, 6))


def test_rounds_count_beyond_four_digits(tmp_path: Path) -> None:
    for round in range(9_998, 10_003):
        checkpoints.save(tmp_path, *made(round))
        found = checkpoints.newest(tmp_path, "hash", pytest.fail)
        assert found is not None
        assert found[0].round == round
    assert len(stored(tmp_path)) == 2 * KEPT


def test_nothing_in_a_checkpoint_depends_on_when_or_where(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        checkpoints.save(tmp_path / folder, *made(3))
    assert stored(tmp_path / "one") == names(3)
    for name in names(3):
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        assert str(tmp_path).encode() not in data
    facts = json.loads((tmp_path / "one" / "round-0003.json").read_text())
    assert set(facts) == {"study", "round", "stage", "model", "norms", "best"}


def test_the_norms_are_stored_once_and_an_earlier_form_is_read(tmp_path: Path) -> None:
    """Those of a thousand sites over fifty rounds are a megabyte in every checkpoint."""
    checkpoint, tensors = made(3)
    checkpoints.save(tmp_path, checkpoint, tensors)
    path, text = tmp_path / "round-0003.safetensors", (tmp_path / "round-0003.json").read_text()
    assert b"norms" not in path.read_bytes()
    save_tensors(path, {name: torch.from_numpy(value) for name, value in tensors.items()}, {"checkpoint": text})
    found = checkpoints.newest(tmp_path, "hash", pytest.fail)
    assert found is not None
    assert found[0] == checkpoint
    save_tensors(path, {name: torch.from_numpy(value) for name, value in tensors.items()}, {"checkpoint": text + " "})
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        checkpoints.newest(tmp_path, "hash", lambda text: None)


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / ".round-0002.safetensors.4711.tmp").write_bytes(b"half")
    (tmp_path / "round-0000.safetensors").write_bytes(b"an older one whose facts went first")
    (tmp_path / "notes.txt").write_text("not ours")
    checkpoints.save(tmp_path, *made(2))
    assert stored(tmp_path) == ["notes.txt", *names(2)]


def test_none_where_there_was_never_any(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere", "hash", pytest.fail) is None
    tmp_path.joinpath("round-x.json").write_text("{}")
    assert checkpoints.newest(tmp_path, "hash", pytest.fail) is None


def test_another_studys_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, *made(1))
    with pytest.raises(CheckpointError, match="belongs to another study"):
        checkpoints.newest(tmp_path, "other", pytest.fail)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Put the round before in its place."""
    path.write_bytes(path.with_name(path.name.replace("0005", "0004")).read_bytes())


DAMAGE = {
    "tensors cut": lambda f: cut(f / "round-0005.safetensors", 0.7),
    "tensors empty": lambda f: cut(f / "round-0005.safetensors", 0),
    "tensors flipped": lambda f: flip(f / "round-0005.safetensors"),
    "tensors gone": lambda f: (f / "round-0005.safetensors").unlink(),
    "tensors of another round": lambda f: swap(f / "round-0005.safetensors"),
    "facts cut": lambda f: cut(f / "round-0005.json", 0.7),
    "facts empty": lambda f: cut(f / "round-0005.json", 0),
    "facts of another round": lambda f: swap(f / "round-0005.json"),
    "both of another round": lambda f: [swap(f / name) for name in names(5)],
    "a norm changed": lambda f: (f / "round-0005.json").write_text(
        (f / "round-0005.json").read_text().replace('"norms": [0.', '"norms": [1.')
    ),
    "facts are a list": lambda f: (f / "round-0005.json").write_text("[]"),
    "facts are not text": lambda f: (f / "round-0005.json").write_bytes(b"\xff\xfe\x00"),
    "facts are a folder": lambda f: ((f / "round-0005.json").unlink(), (f / "round-0005.json").mkdir()),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """A finished run."""
    from polyclinic.encoders import ENCODERS

    from ..tiny import TinyEncoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "resnet18", lambda encoder, images: TinyEncoder(images.channels))
        run = open_run(tmp_path_factory.mktemp("whole"), STUDY)
        run_study(grid(), STUDY, run, SEATS)
    yield run


def copied(whole: RunDir, folder: Path) -> RunDir:
    import shutil

    shutil.copytree(whole.path, folder)
    return RunDir(folder)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "folder" not in name])
def test_a_damaged_one_is_passed_over_and_its_round_made_again(damage: str, whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "run")
    DAMAGE[damage](run.checkpoints)
    run_study(grid(), STUDY, run, SEATS)
    (warning,) = events(run, "warning")
    assert "round-0005.json" in warning["text"]
    assert str(tmp_path) not in warning["text"]
    assert events(run, "run_resumed")[-1]["round"] == 4
    assert stored(run.checkpoints) == stored(whole.checkpoints)
    for path in whole.checkpoints.iterdir():
        assert (run.checkpoints / path.name).read_bytes() == path.read_bytes()
    assert measured(run) == measured(whole)


def test_two_damaged_ones_are_passed_over(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "run")
    for round in (4, 5):
        cut(run.checkpoints / f"round-{round:04d}.safetensors", 0.5)
    run_study(grid(), STUDY, run, SEATS)
    assert len(events(run, "warning")) == 2
    for path in whole.checkpoints.iterdir():
        assert path.name.startswith("round-0003") or (run.checkpoints / path.name).read_bytes() == path.read_bytes()


def test_all_damaged_ends_the_run(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "run")
    for path in run.checkpoints.glob("*.safetensors"):
        cut(path, 0.5)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged") as error:
        run_study(grid(), STUDY, run, SEATS)
    assert error.value.exit_code == 1
    assert len(events(run, "warning")) == KEPT


def full_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The disk is full at the call `calls` of fsync, and stays so."""
    left, fsync = calls, os.fsync

    def failing(file: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("calls", range(1, 14, 2))
def test_a_full_disk_ends_the_run_and_it_goes_on_later(
    calls: int, whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path / "run", STUDY)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="no space left on the disk") as error:
        full_after(patch, calls)
        run_study(grid(), STUDY, run, SEATS)
    assert error.value.exit_code == 1
    assert not list(run.path.rglob("*.tmp"))
    run_study(grid(), STUDY, RunDir(run.path), SEATS)
    assert measured(run) == measured(whole)
    for path in whole.checkpoints.iterdir():
        assert (run.checkpoints / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands where the folder should")
    with pytest.raises(OSError, match="exists"):
        checkpoints.save(tmp_path / "checkpoints", *made(1))
