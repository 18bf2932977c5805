"""The outbound ledger: everything that has left the site, in order, where nobody can change it unseen.

One JSON object a line. Each holds the SHA-256 of the line before it (`before`), so that an edited, removed or reordered
line breaks the chain; and the ledger's end (lines and SHA-256 of the last) stands in a second file, so that a ledger
that was cut short is found out as well. Who can write both files can write another history: copy `ledger.end` to where
the site's administrators cannot, and `verify` says whether the ledger still leads there.

An entry is durable before what it speaks of leaves. One that names what then did not leave (the machine died) is
possible; the opposite is not.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
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
"""For which an entry waits for another process that writes one."""


class LedgerBroken(PolyclinicError):
    """The ledger is not the one that was written."""


@dataclass(frozen=True)
class Ledger:
    """The ledger in `folder`, which is made when the first entry is."""

    folder: Path

    @property
    def _lines(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def _end(self) -> Path:
        return self.folder / "ledger.end"

    def append(self, facts: Mapping[str, Any]) -> None:
        """Add an entry, durably; its time and its place are added.

        Raises:
            StorageError: it cannot be written: nothing may leave.
            LedgerBroken: the ledger does not end where it did.
        """
        with storage(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.folder, PATIENCE_S) as free:
            if not free:
                raise LedgerBroken("the ledger is in use for too long", "see which process holds the site's ledger")
            count, last = self._position()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            line = json.dumps({"entry": count + 1, "time": now, **facts, "before": last}, sort_keys=True).encode()
            write_atomic(self._end, json.dumps({"entries": count, "sha256": last, "next": _sha(line)}))
            with storage(self._lines), self._lines.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            write_atomic(self._end, json.dumps({"entries": count + 1, "sha256": _sha(line)}))

    def _position(self) -> tuple[int, str]:
        """(entries, SHA-256 of the last). What a power cut left half written is cut off: it has not left.

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
        found = (int(json.loads(line)["entry"]), _sha(line)) if line else (0, START)
        if found not in ((noted["entries"], noted["sha256"]), (noted["entries"] + 1, noted.get("next"))):
            raise LedgerBroken(f"the ledger has {found[0]} entries and should end with entry {noted['entries']}", FIX)
        return found

    def _noted(self) -> dict[str, Any]:
        """The end as it was noted: entries, SHA-256 of the last, and that of the one that was about to be written."""
        try:
            found: dict[str, Any] = {"entries": 0, "sha256": START}
            if self._end.exists():
                found = json.loads(self._end.read_text())
            return {**found, "entries": int(found["entries"]), "sha256": str(found["sha256"])}
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerBroken("the ledger's end is not what was noted there", FIX) from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every entry, in order, as they stand; not verified."""
        return (entry for entry, _ in self.since(0))

    def since(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The entries from byte `start` of the file on, each with the byte at which it ends; not verified."""
        if self._lines.exists():
            with self._lines.open("rb") as file:
                file.seek(start)
                for line in file:
                    if line.endswith(b"\n"):  # else a power cut has left it, and it has not left
                        start += len(line)
                        yield dict(json.loads(line)), start

    def verify(self) -> int:
        """The number of entries, if each follows the one before and the last is the one that was noted.

        Raises:
            LedgerBroken: the text says at which line.
        """
        line, last = b"", START
        data = self._lines.read_bytes() if self._lines.exists() else b""
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
            if not _follows(line, number, last):
                raise LedgerBroken(f"entry {number} of the ledger was changed, removed, added or moved", FIX)
            last = _sha(line)
        return self._agree(line)[0]

    def to_csv(self) -> str:
        """A line an entry, for who keeps records of processing: what left, when, for which study, how much."""
        columns = ["entry", "time", "to", "kind", "study", "stage", "round", "patients", "tensors", "bytes", "metrics"]
        columns += ["version", "error"]
        text = io.StringIO()
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for entry in self.entries():
            metrics = "; ".join(f"{name} {value:.6g}" for name, value in entry.get("metrics", {}).items())
            table.writerow({**entry, "tensors": len(entry.get("tensors", [])), "metrics": metrics})
        return text.getvalue()


def _sha(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _follows(line: bytes, number: int, last: str) -> bool:
    """Is this the entry of that number, after one of that SHA-256?"""
    try:
        entry = json.loads(line)
        return bool(entry["entry"] == number and entry["before"] == last)
    except (ValueError, KeyError, TypeError):
        return False
