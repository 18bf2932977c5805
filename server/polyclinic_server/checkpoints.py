"""Checkpoints: the global tensors after each round, whole or not there, with nothing in them that a rerun would change.

`round-NNNN.safetensors` holds the tensors, with what the rule of aggregation remembers under the prefix `rule/`, and
`round-NNNN.json` what else the next round must know of those before. The JSON is written last and its SHA-256 stands in
the metadata of the tensors: a pair that does not agree is not a checkpoint.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from polyclinic.artifacts import load_tensors, save_tensors
from polyclinic.errors import CheckpointError
from polyclinic.files import storage, write_atomic
from polyclinic.wire import Tensors, digest

KEPT = 3
BEST = "best-{:04d}.safetensors"
STATE = "rule/"
"""Prefix of what is no global tensor, whose names have no slash."""
FACTS = "checkpoint"
"""Key of the JSON's SHA-256 in the metadata of the tensors; checkpoints of 0.1.0 may have the JSON itself there."""


@dataclass(frozen=True)
class Best:
    """The tensors that did best on the sites' validation patients, in a stage that may stop early.

    Attributes:
        measured: the round in which they were measured, which started from them; 0 where none were.
        model: their digest.
        losses: what each site measured.
    """

    measured: int = 0
    model: str = ""
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
        study: the study's hash.
        round: rounds finished, across stages; 0 before any.
        stage: the stage whose tensors these are.
        model: digest of the tensors.
        norms: of the updates accepted in this stage so far, by round and in order of site name.
        best: the stage's best round so far.
    """

    study: str
    round: int
    stage: int
    model: str
    norms: list[float]
    best: Best = field(default_factory=Best)


def save(folder: Path, checkpoint: Checkpoint, tensors: Tensors, state: Tensors | None = None) -> None:
    """Write a checkpoint durably, with the rule's `state` if it has any, and drop those that are no longer kept.

    Raises:
        StorageError: the disk is full or cannot be written; the checkpoints before stand.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / f"round-{checkpoint.round:04d}.json", json.dumps(asdict(checkpoint), sort_keys=True)
    together = {**tensors, **{STATE + name: value for name, value in (state or {}).items()}}
    stored = {name: torch.from_numpy(value) for name, value in together.items()}
    save_tensors(path.with_suffix(".safetensors"), stored, {FACTS: _sha256(text)})
    write_atomic(path, text)
    for old in folder.glob("best-*"):
        if old.name != BEST.format(checkpoint.best.measured):
            old.unlink(missing_ok=True)
    drop(folder, KEPT)


def drop(folder: Path, kept: int) -> None:
    """Remove all checkpoints but the newest `kept`."""
    names = [path.stem for path in _paths(folder)[:kept]]
    for old in sorted(folder.glob("*round-*")):  # .json before .safetensors: no checkpoint stands without its tensors
        if old.stem not in names:
            old.unlink(missing_ok=True)


def save_best(folder: Path, measured: int, tensors: Tensors) -> None:
    """Keep the tensors that did best so far; those before go with the next checkpoint, which no longer names them."""
    path = folder / BEST.format(measured)
    save_tensors(path, {name: torch.tensor(value) for name, value in tensors.items()}, {})


def load_best(folder: Path, best: Best) -> Tensors:
    """The tensors that a checkpoint names as the best.

    Raises:
        CheckpointError: they are damaged or gone.
    """
    found, _ = load_tensors(folder / BEST.format(best.measured))
    tensors = {name: value.numpy() for name, value in sorted(found.items())}
    if digest(tensors) != best.model:
        raise CheckpointError("the best tensors are not those that the checkpoint names", "start the study again")
    return tensors


def load_state(folder: Path, checkpoint: Checkpoint) -> Tensors:
    """What the rule of aggregation remembered when the checkpoint was made.

    Raises:
        CheckpointError: it is damaged or gone.
    """
    found, _ = load_tensors(folder / f"round-{checkpoint.round:04d}.safetensors")
    return {name.removeprefix(STATE): v.numpy() for name, v in sorted(found.items()) if name.startswith(STATE)}


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
        facts = json.loads(text)
        checkpoint = Checkpoint(**{**facts, "best": Best(**facts["best"])})
        tensors, metadata = load_tensors(path.with_suffix(".safetensors"))
    except (OSError, ValueError, TypeError, KeyError, CheckpointError) as error:
        raise CheckpointError(f"{path.name} or its tensors cannot be read", fix) from error
    if metadata.get(FACTS) not in (_sha256(text), text) or path.stem != f"round-{checkpoint.round:04d}":
        raise CheckpointError(f"{path.name} does not belong to its tensors", fix)
    return checkpoint, {n: value.numpy() for n, value in sorted(tensors.items()) if not n.startswith(STATE)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
