"""The cached tensors of a cohort and the journal that says what they are: both only ever grow.

    images.u8       raw uint8, one (channels, size, size) image after another
    journal.jsonl   one line a file: where it stood (keyed hash), its stat, its content's SHA-256, its facts, its rows

A file's line is written after its images have reached the disk, so a process that dies at any moment leaves at worst
images without a line, or half a line: both are cut off by the next build, which decodes those few files again.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from polyclinic.cohort.intake import Facts
from polyclinic.cohort.quarantine import Reason
from polyclinic.files import storage

IMAGES = "images.u8"
JOURNAL = "journal.jsonl"
BATCH = 64
"""Files between two commits: what a killed build may have to decode again."""
BATCH_BYTES = 64 << 20
"""Bytes of images after which a commit comes sooner: what a build holds in memory."""


@dataclass(frozen=True)
class Record:
    """What is known of one content: its facts, and its images or why it has none."""

    facts: Facts
    first: int = 0
    count: int = 0
    reason: Reason | None = None


class Store:
    """Opened by one process at a time (see build.py for the lock).

    Args:
        folder: of the cohort.
        stride: bytes of an image.
        decoders: those installed; files that lacked one are forgotten when others are.

    Attributes:
        records: content SHA-256 -> Record.
        memo: keyed hash of a path -> (stat, content SHA-256): an unchanged file is not even read.
    """

    def __init__(self, folder: Path, stride: int, decoders: Sequence[str] = ()) -> None:
        self._folder, self._stride, self._decoders = folder, stride, list(decoders)
        self.records: dict[str, Record] = {}
        self.memo: dict[str, tuple[tuple[int, ...], str]] = {}
        self.images = 0
        self._pixels: list[bytes] = []
        self._pending = 0
        self._lines: list[bytes] = []

    def __enter__(self) -> Self:
        with storage(self._folder):
            self._data = (self._folder / IMAGES).open("ab", buffering=0)
            self._journal = (self._folder / JOURNAL).open("ab", buffering=0)
            self._replay()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            self._data.close()
            self._journal.close()

    def _replay(self) -> None:
        """Read the journal up to the first line that is not whole or lacks its images, and cut off the rest."""
        stored, end = self._data.seek(0, os.SEEK_END) // self._stride, 0
        with (self._folder / JOURNAL).open("rb") as lines, suppress(ValueError, TypeError, KeyError, AttributeError):
            for line in lines:
                entry = json.loads(line)
                if not line.endswith(b"\n") or entry.get("first", 0) + entry.get("count", 0) > stored:
                    break
                self._learn(entry)
                end += len(line)
        os.ftruncate(self._journal.fileno(), end)
        os.ftruncate(self._data.fileno(), self.images * self._stride)

    def _learn(self, entry: dict[str, Any]) -> None:
        path, stat, sha, count = entry["path"], tuple(entry["stat"]), entry["sha"], entry.get("count", 0)
        if "facts" in entry and entry.get("decoders", self._decoders) == self._decoders:
            reason = Reason(entry["reason"]) if "reason" in entry else None
            first = entry.get("first", 0)
            self.records[sha] = Record(Facts(**entry["facts"]), first, count, reason)
            self.images = max(self.images, first + count)
        self.memo[path] = (stat, sha)

    def remembers(self, path: str, stat: tuple[int, ...]) -> bool:
        """Whether the file at this keyed path has not changed since its content was learnt."""
        then, sha = self.memo.get(path, ((), ""))
        return then == stat and sha in self.records

    def add(self, path: str, stat: tuple[int, ...], sha: str, record: Record | None, pixels: bytes = b"") -> None:
        """Note that the file with this keyed path holds the content `sha`, described by `record` unless it is known."""
        entry: dict[str, Any] = {"path": path, "stat": stat, "sha": sha}
        if record is not None and sha not in self.records:
            entry["facts"] = record.facts.to_json()
            if record.reason:
                entry["reason"] = record.reason
                if record.reason is Reason.NO_DECODER:
                    entry["decoders"] = self._decoders
            else:
                entry |= {"first": self.images, "count": len(pixels) // self._stride}
                self._pixels.append(pixels)
                self._pending += len(pixels)
        self._learn(entry)
        self._lines.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        if len(self._lines) >= BATCH or self._pending >= BATCH_BYTES:
            self.commit()

    def commit(self) -> None:
        """Bring what was added to the disk: the images first, then their lines.

        Raises:
            StorageError: the disk is full; what was committed before stands.
        """
        pixels, lines = self._pixels, self._lines
        self._pixels, self._pending, self._lines = [], 0, []
        with storage(self._folder):
            _append(self._data, pixels)
            _append(self._journal, lines)


def _append(file: BinaryIO, parts: list[bytes]) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[file.write(view) :]
    if parts:
        os.fsync(file.fileno())
