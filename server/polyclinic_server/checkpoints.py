"""Checkpoints: the global tensors after each round, whole or not there, with nothing in them that a rerun would change.

`round-NNNN.safetensors` holds the tensors, `round-NNNN.json` what the next round must know of those before. The JSON
is written last and names the tensors' digest: a pair that does not agree is not a checkpoint.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from polyclinic.artifacts import load_tensors, save_tensors
from polyclinic.errors import CheckpointError
from polyclinic.files import write_atomic
from polyclinic.wire import Tensors, digest

KEPT = 3


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
        study: the study's hash.
        round: rounds finished, across stages; 0 before any.
        stage: the stage whose tensors these are.
        model: digest of the tensors.
        norms: of the updates accepted in this stage so far, by round and in order of site name.
    """

    study: str
    round: int
    stage: int
    model: str
    norms: list[float]


def save(folder: Path, checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Write a checkpoint durably and drop those that are no longer kept."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"round-{checkpoint.round:04d}"
    save_tensors(folder / f"{stem}.safetensors", {n: torch.from_numpy(v) for n, v in tensors.items()}, {})
    write_atomic(folder / f"{stem}.json", json.dumps(asdict(checkpoint), sort_keys=True))
    for path in sorted(folder.glob("round-*.json"))[:-KEPT]:
        path.unlink(missing_ok=True)
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def newest(folder: Path, study: str, warn: Callable[[str], None]) -> tuple[Checkpoint, Tensors] | None:
    """The newest whole checkpoint of a study; None where no round was ever checkpointed.

    A damaged one is passed over with a warning: its round is made again, to the same bits.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or they are another study's.
    """
    paths = sorted(folder.glob("round-*.json"), reverse=True)
    for path in paths:
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
        checkpoint = Checkpoint(**json.loads(path.read_text()))
        tensors = {name: value.numpy() for name, value in load_tensors(path.with_suffix(".safetensors"))[0].items()}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name} cannot be read", fix) from error
    if digest(dict(sorted(tensors.items()))) != checkpoint.model:
        raise CheckpointError(f"{path.name} does not match its tensors", fix)
    return checkpoint, dict(sorted(tensors.items()))
