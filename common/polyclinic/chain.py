"""A file of entries that only grows, in which nobody can change what stands there unseen.

One JSON object a line. Each holds the SHA-256 of the line before it (`before`), so that an edited, removed or reordered
line breaks the chain; and the chain's end (lines and SHA-256 of the last) stands in a second file, so that a chain that
was cut short is found out as well. Who can write both files can write another history, and an old copy of both is
whole: keep a `head` where the site's administrators cannot write, and `holds` says whether the chain still leads there.

An entry is durable before `append` returns.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.errors import PolyclinicError
from polyclinic.files import locked, storage, write_atomic

START = "0" * 64
"""What stands before the first line."""
LONGEST = 1 << 22
"""Bytes of an entry at most: one of a thousand tensors has a thirtieth."""
FIX = "compare it with a backup; whoever changed it could write to the site's folder, and nothing more leaves till then"
PATIENCE_S = 60.0
"""For which one process waits for another that writes an entry."""

Entry = dict[str, Any]


class LedgerBroken(PolyclinicError):
    """The ledger is not the one that was written."""


@dataclass(frozen=True)
class Chain:
    """`name`.jsonl and `name`.end in `folder`, which is made when the first entry is."""

    folder: Path
    name: str

    @property
    def _lines(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def _end(self) -> Path:
        return self.folder / f"{self.name}.end"

    def append(self, facts: Mapping[str, Any] | Callable[[list[Entry]], Mapping[str, Any]]) -> int:
        """Add an entry, durably; its time and its place are added. Returns its number, counted from 1.

        Args:
            facts: of the entry; or what decides on them, given all entries, verified, while nobody else can add one.
                What it raises leaves the chain as it is.

        Raises:
            StorageError: it cannot be written: nothing may happen that it speaks of.
            LedgerBroken: the chain does not end where it did, or is broken at all where `facts` was to decide.
        """
        with storage(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone(), storage(self._lines):
            count, last = self._position()
            if callable(facts):
                facts = facts([entry for entry, _ in self._walk()])
            now = datetime.now(UTC).isoformat(timespec="seconds")
            line = json.dumps({"entry": count + 1, "time": now, **facts, "before": last}, sort_keys=True).encode()
            write_atomic(self._end, json.dumps({"entries": count, "sha256": last, "next": _sha(line)}))
            with self._lines.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            write_atomic(self._end, json.dumps({"entries": count + 1, "sha256": _sha(line)}))
        return count + 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with locked(self.folder, PATIENCE_S) as free:
            if not free:
                raise LedgerBroken("the ledger is in use for too long", "see which process holds the site's ledger")
            yield

    def _position(self) -> tuple[int, str]:
        """(entries, SHA-256 of the last). What a power cut left half written is cut off: it has not happened.

        Raises:
            LedgerBroken: the last entry is not the one that was noted as the end; nothing has been touched.
        """
        if not self._lines.exists():
            return self._agree(b"")
        with self._lines.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - LONGEST))
            tail = file.read()
            whole = tail[: tail.rfind(b"\n") + 1]
            found = self._agree(whole[:-1].rpartition(b"\n")[2])
            file.truncate(start + len(whole))
        return found

    def _agree(self, line: bytes) -> tuple[int, str]:
        """(entries, SHA-256 of the last), given the last line (b"": there is none), if it is the end that was noted.

        It may also be the one after: the machine died before that was noted.

        Raises:
            LedgerBroken: it is neither.
        """
        noted = self._noted()
        found = (_number(line), _sha(line)) if line else (0, START)
        if found not in ((noted["entries"], noted["sha256"]), (noted["entries"] + 1, noted.get("next"))):
            raise LedgerBroken(f"the ledger has {found[0]} entries and should end with entry {noted['entries']}", FIX)
        return found

    def _noted(self) -> Entry:
        """The end as it was noted: entries, SHA-256 of the last, and that of the one that was about to be written."""
        try:
            found: Entry = {"entries": 0, "sha256": START}
            if self._end.exists():
                found = json.loads(self._end.read_text())
            return {**found, "entries": int(found["entries"]), "sha256": str(found["sha256"])}
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerBroken("the ledger's end is not what was noted there", FIX) from error

    def entries(self) -> Iterator[Entry]:
        """Every entry, in order, as they stand; not verified."""
        return (entry for entry, _ in self.since(0))

    def since(self, start: int) -> Iterator[tuple[Entry, int]]:
        """The entries from byte `start` of the file on, each with the byte at which it ends; not verified."""
        if self._lines.exists():
            with self._lines.open("rb") as file:
                file.seek(start)
                for line in file:
                    if line.endswith(b"\n"):  # else a power cut has left it, and it has not happened
                        start += len(line)
                        yield dict(json.loads(line)), start

    def verify(self) -> int:
        """The number of entries, if each follows the one before and the last is the one that was noted.

        Raises:
            LedgerBroken: the text says at which line.
        """
        return self.head()[0]

    def verified(self) -> list[Entry]:
        """Every entry; raises as `verify`."""
        if not self.folder.exists():
            return []
        with self._alone():
            return [entry for entry, _ in self._walk()]

    def head(self) -> tuple[int, str]:
        """(entries, SHA-256 of the last): what `holds` is asked for later; raises as `verify`."""
        return self._shas()[-1]

    def holds(self, entries: int, sha256: str) -> bool:
        """Does this chain lead on from that head? It does not where an older copy was put in its place.

        Raises:
            LedgerBroken: as `verify`.
        """
        return (entries, sha256) in self._shas()

    def _shas(self) -> list[tuple[int, str]]:
        """All heads that the chain has had, the newest last; raises as `verify`."""
        found = [(0, START)]
        if self.folder.exists():
            with self._alone():
                found += enumerate((sha for _, sha in self._walk()), start=1)
        return found

    def _walk(self) -> Iterator[tuple[Entry, str]]:
        """Every entry with the SHA-256 of its line; raises as `verify`, in the end where the end is wrong."""
        line, last = b"", START
        if self._lines.exists():
            with self._lines.open("rb") as file:
                for number, text in enumerate(file, start=1):
                    if not text.endswith(b"\n"):  # a power cut has left it
                        break
                    line = text[:-1]
                    entry = _follower(line, number, last)
                    last = _sha(line)
                    yield entry, last
        self._agree(line)


def _sha(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _number(line: bytes) -> int:
    """Of an entry; 0 where the line is none."""
    try:
        return int(json.loads(line)["entry"])
    except (ValueError, KeyError, TypeError):
        return 0


def _follower(line: bytes, number: int, last: str) -> Entry:
    """The entry of that number, after a line of that SHA-256.

    Raises:
        LedgerBroken: the line is another.
    """
    try:
        entry = json.loads(line)
        if entry["entry"] == number and entry["before"] == last:
            return dict(entry)
    except (ValueError, KeyError, TypeError):
        pass
    raise LedgerBroken(f"entry {number} of the ledger was changed, removed, added or moved", FIX)
