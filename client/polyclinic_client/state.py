"""What a site keeps of a study between messages: the newest finished update, the optimizer's moments, and how far an
unfinished round has come.

One folder a study, one file a round and kind. A round that is asked for again, from the same global tensors, is
answered with the update that was stored; from others it is trained again, from the moments of the round before.
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
"""Rounds kept: the newest, and the one that a repeated round starts from."""


_FILE = re.compile(r"(update|moments)-(?P<round>\d+)\.safetensors")


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
        stored = {int(path.stem.partition("-")[2]): path for path in self.folder.glob("moments-*.safetensors")}
        for made in sorted((made for made in stored if made < round), reverse=True):
            found = _read(stored[made])
            if found is not None and found[1].get("round") == str(made):
                return found[0] if found[1]["stage"] == str(stage) else None
            log.warning("the optimizer's moments after round %d are damaged; older ones are used, or none", made)
        return None

    def keep(
        self, round: int, stage: int, update: dict[str, Tensor], facts: dict[str, str], moments: dict[str, Tensor]
    ) -> None:
        """Store a finished round, the update last: where it stands, the moments stand too. Older rounds go.

        Nothing waits for the disk. A file that a power cut leaves damaged is refused by its checksum, one that it
        leaves with the content of an older round by the round (or the global tensors) it was written for. If the round
        is asked for again it is made again; if it was closed, the next one starts from older moments, or none.
        """
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write("moments", round, moments, {"stage": str(stage), "round": str(round)})
        self._write("update", round, update, facts)
        for path in self.folder.iterdir():
            made = _FILE.match(path.name)
            if made is None or not round - KEPT < int(made["round"]) <= round:
                path.unlink(missing_ok=True)  # of an old round, of a later one of another run, or half written

    def _write(self, kind: str, round: int, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        new, old = (self.folder / f"{kind}-{number:04d}.safetensors" for number in (round, round - KEPT))
        save_tensors(new, tensors, facts, durable=False, recycle=old)


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
