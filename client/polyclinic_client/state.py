"""What a site keeps of a study between messages: the newest finished update, the optimizer's moments, what of the model
is the site's own (`personal`), and how far an unfinished round has come.

One folder a study, one file a round and kind. A round that is asked for again, from the same global tensors, is
answered with the update that was stored; from others it is trained again, from what the round before has left.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polyclinic import __version__
from polyclinic.artifacts import load_tensors, save_tensors
from polyclinic.errors import CheckpointError, StorageError
from polyclinic.files import storage
from polyclinic.training import pick_device

log = logging.getLogger(__name__)

KEPT = 2
"""Rounds kept: the newest, and the one that a repeated round starts from, which is older where the site missed some."""

KINDS = {"moments": "the optimizer's moments", "own": "the site's own tensors"}
"""What a round starts from, in words."""


_FILE = re.compile(r"(update|moments|own)-(?P<round>\d+)\.safetensors")


@dataclass(frozen=True)
class SiteState:
    """The state of one study at one site; `folder` is made when first written and holds nothing else."""

    folder: Path

    def update(self, round: int, model: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The stored update of a round that was trained from the global tensors `model`, and its facts; or None."""
        found = _read(self.folder / f"update-{round:04d}.safetensors")
        return found if found is not None and found[1].get("model") == model else None

    def midway(self, round: int, model: str) -> "Midway":
        """Of a round that trains from the global tensors `model`."""
        return Midway(self.folder / f"midway-{round:04d}.safetensors", model)

    def moments_before(self, round: int, stage: int) -> dict[str, Tensor] | None:
        """The optimizer's moments after the newest stored round before `round`, if one is of `stage`.

        Usually the round before; an older one where the site has missed a round.
        """
        found = self._newest("moments", round)
        return found[0] if found is not None and found[1]["stage"] == str(stage) else None

    def own_before(self, round: int) -> dict[str, Tensor]:
        """What of the model is the site's own after the newest stored round before `round`; nothing if there is none.

        Unlike the optimizer's moments it goes on from stage to stage.
        """
        found = self._newest("own", round)
        return {} if found is None else found[0]

    def keep(
        self,
        round: int,
        stage: int,
        update: dict[str, Tensor],
        facts: dict[str, str],
        moments: dict[str, Tensor],
        own: dict[str, Tensor] | None = None,
    ) -> None:
        """Store a finished round, the update last: where it stands, the others stand too. Older rounds go.

        Nothing waits for the disk. A file that a power cut leaves damaged is refused by its checksum, one that it
        leaves with the content of an older round by the round (or the global tensors) it was written for. If the round
        is asked for again it is made again; if it was closed, the next one starts from an older state, or none.
        """
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        made = {"stage": str(stage), "round": str(round)}
        kept = self._write("moments", round, moments, made)
        if own:
            kept |= self._write("own", round, own, made)
        kept |= self._write("update", round, update, facts)
        for path in self.folder.iterdir():
            if path not in kept:  # of an old round, of a later one of another run, or half written
                path.unlink(missing_ok=True)

    def _stored(self, kind: str, before: int) -> list[tuple[int, Path]]:
        """(round, file) of every stored round before `before`, newest first."""
        names = ((_FILE.fullmatch(path.name), path) for path in self.folder.glob(f"{kind}-*"))
        found = [(int(name["round"]), path) for name, path in names if name is not None]
        return sorted((pair for pair in found if pair[0] < before), reverse=True)

    def _newest(self, kind: str, before: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The newest undamaged file of a kind of a round before `before`, and its facts."""
        for made, path in self._stored(kind, before):
            found = _read(path)
            if found is not None and found[1].get("round") == str(made):
                return found
            log.warning("%s after round %d are damaged; older ones are used, or none", KINDS[kind], made)
        return None

    def _write(self, kind: str, round: int, tensors: dict[str, Tensor], facts: dict[str, str]) -> set[Path]:
        """Store a file; it and those of its kind that are still needed."""
        new, before = self.folder / f"{kind}-{round:04d}.safetensors", [path for _, path in self._stored(kind, round)]
        needed, older = before[: KEPT - 1], before[KEPT - 1 :]
        save_tensors(new, tensors, facts, durable=False, recycle=older[0] if older else None)
        return {new, *needed}


@dataclass(frozen=True)
class Midway:
    """How far a round has come, as in polyclinic.training; `SiteState.keep` removes the file."""

    path: Path
    model: str

    def load(self) -> dict[str, Tensor] | None:
        """What this version has noted of a round from the same global tensors."""
        found = _read(self.path)
        return found[0] if found is not None and self._facts.items() <= found[1].items() else None

    def save(self, note: dict[str, Tensor]) -> None:
        """Replace what was noted."""
        with storage(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_tensors(self.path, note, self._facts, durable=False)
        except StorageError as error:
            log.warning("how far the round has come is not noted: %s", error)

    @property
    def _facts(self) -> dict[str, str]:
        return {"model": self.model, "version": __version__, "device": pick_device().type}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """A stored file; one that is missing or damaged (a power cut) is as if the round had not been made."""
    try:
        return load_tensors(path)
    except (FileNotFoundError, CheckpointError):
        return None
