"""Checkpoints: the global tensors after each round, whole or not there, with nothing in them that a rerun would change.

`round-NNNN.safetensors` holds the tensors, `round-NNNN.json` what the next round must know of those before. The JSON
is written last and stands in the metadata of the tensors too: a pair that does not agree is not a checkpoint.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from polyclinic.artifacts import load_tensors, save_tensors
from polyclinic.errors import CheckpointError
from polyclinic.files import storage, write_atomic
from polyclinic.wire import Tensors

KEPT = 3
BEST = "best.safetensors"
FACTS = "checkpoint"
"""Key of the JSON in the metadata of the tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
        study: the study's hash.
        round: rounds finished, across stages; 0 before any.
        stage: the stage whose tensors these are.
        model: digest of the tensors.
        norms: of the updates accepted in this stage so far, by round and in order of site name.
        validation: loss on the sites' validation patients after each round of this stage but the newest.
    """

    study: str
    round: int
    stage: int
    model: str
    norms: list[float]
    validation: list[float] = field(default_factory=list)


def save(folder: Path, checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Write a checkpoint durably and drop those that are no longer kept.

    Raises:
        StorageError: the disk is full or cannot be written; the checkpoints before stand.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / f"round-{checkpoint.round:04d}.json", json.dumps(asdict(checkpoint), sort_keys=True)
    stored = {name: torch.from_numpy(value) for name, value in tensors.items()}
    save_tensors(path.with_suffix(".safetensors"), stored, {FACTS: text})
    write_atomic(path, text)
    kept = [path.stem for path in _paths(folder)[:KEPT]]
    for old in sorted(folder.glob("*round-*")):  # .json before .safetensors: no checkpoint stands without its tensors
        if old.stem not in kept:
            old.unlink(missing_ok=True)


def save_best(folder: Path, tensors: Tensors) -> None:
    """Keep the tensors that did best so far in a stage that may stop early."""
    save_tensors(folder / BEST, {name: torch.tensor(value) for name, value in tensors.items()}, {})


def load_best(folder: Path) -> Tensors:
    """The tensors that `save_best` kept last."""
    return {name: value.numpy() for name, value in sorted(load_tensors(folder / BEST)[0].items())}


def _paths(folder: Path) -> list[Path]:
    """The JSON of every checkpoint, newest first."""
    found = [path for path in folder.glob("round-*.json") if path.stem[6:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[6:]), reverse=True)


def newest(folder: Path, study: str, warn: Callable[[str], None]) -> tuple[Checkpoint, Tensors] | None:
    """The newest whole checkpoint of a study; None where no round was ever checkpointed.

    A damaged one is passed over with a warning: its round is made again, to the same bits.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or they are another study's.
    """
    for path in (paths := _paths(folder)):
        try:
            checkpoint, tensors = _load(path)
        except CheckpointError as error:
            warn(error.problem)
            continue
        if checkpoint.study != study:
            raise CheckpointError(
                f"{path.name} belongs to another study", "resume with the study the run was made with"
            )
        return checkpoint, tensors
    if paths:
        raise CheckpointError("every checkpoint of this run is damaged", "start the study again in a new folder")
    return None


def _load(path: Path) -> tuple[Checkpoint, Tensors]:
    fix = "nothing to do: the checkpoint before it is used"
    try:
        text = path.read_text()
        checkpoint = Checkpoint(**json.loads(text))
        tensors, metadata = load_tensors(path.with_suffix(".safetensors"))
    except (OSError, ValueError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path.name} or its tensors cannot be read", fix) from error
    if metadata.get(FACTS) != text or path.stem != f"round-{checkpoint.round:04d}":
        raise CheckpointError(f"{path.name} does not belong to its tensors", fix)
    return checkpoint, {name: value.numpy() for name, value in sorted(tensors.items())}
