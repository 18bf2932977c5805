"""Building a cohort: scan, read what is new, write the index. Safe to kill at any moment and to run twice at once."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.cohort import limits
from polyclinic.cohort.admission import admit, summary
from polyclinic.cohort.cohort import Cohort
from polyclinic.cohort.identity import keyed, load_key
from polyclinic.cohort.index import open_cohort, write_index
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.pool import Pool, installed_decoders
from polyclinic.cohort.quarantine import BURNED_IN_REASONS, Reason, counts, write_quarantine
from polyclinic.cohort.scan import Scan, Source, locate, scan
from polyclinic.cohort.store import Record, Store
from polyclinic.errors import CohortError
from polyclinic.files import storage

if TYPE_CHECKING:
    from polyclinic.study import Images

QUARANTINE = "quarantine.csv"
Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


def build_cohort(
    source: Path,
    images: Images,
    state: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    allow_burned_in: bool = False,
    timeout_s: float = limits.TIMEOUT_S,
) -> Cohort:
    """The cohort of a directory or a CSV file, built where it is not yet, completed where it is not whole.

    Files are read by worker processes; a second build reads only files that are new or changed, and decodes only
    contents that it has not met. What cannot be used goes to quarantine.csv in the cohort's folder.

    Args:
        source: a directory with labels.csv, a CSV file, a directory of classes, or a tree of DICOM files.
        images: how files become tensors.
        state: the run's or site's state directory: caches, quarantine lists and the key of the HMACs live there.
        workers: processes; as many as there are processors by default.
        progress: called with (files done, files in all).
        allow_burned_in: let in what may show a patient's name in its pixels: ultrasound, secondary captures, and files
            that say so. Only the site can know that they do not.
        timeout_s: seconds for one file.

    Raises:
        CohortError: there is no such source, the state lies within it, or nothing in it can be used; it counts the
            reasons.
        StorageError: the disk is full or cannot be written; what was read so far is kept.
    """
    path, state = locate(source, state), state.resolve()
    intake = Intake(images.size, images.channels, images.window, allow_burned_in)
    key = load_key(state)
    folder = state / "cohorts" / keyed(key, "cohort", json.dumps([os.fspath(path), asdict(intake)]))
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder):
        found = scan(path)
        with Store(folder, intake.stride, installed_decoders()) as store:
            unread = _read(found, store, key, intake, max(1, workers or _processors()), timeout_s, progress)
        _conclude(folder, found, store, unread, key, intake)
    return open_cohort(folder)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a cohort at a time; the lock ends with the process, however that ends."""
    with storage(folder):
        file = (folder / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is building this cohort: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(
    found: Scan, store: Store, key: bytes, intake: Intake, workers: int, timeout_s: float, progress: Progress | None
) -> dict[int, Reason]:
    """Bring everything readable into the store; why the other files were not read, by position in the scan."""
    unread = {position: s.reason for position, s in enumerate(found.sources) if s.reason}
    new = [
        p
        for p, s in enumerate(found.sources)
        if not s.reason and not store.remembers(keyed(key, "path", s.relative), s.stat)
    ]
    total = len(found.sources)
    setup = {"intake": asdict(intake), "key": key.hex(), "known": list(store.records)}
    replies = _replies(setup, workers, timeout_s, [found.root / found.sources[p].relative for p in new])
    with closing(replies):  # and with it the workers, whatever happens here
        for done, (number, reply, pixels) in enumerate(replies, start=total - len(new) + 1):
            if reason := _keep(found.sources[new[number]], reply, pixels, store, key):
                unread[new[number]] = reason
            if progress:
                progress(done, total)
    return unread


def _replies(
    setup: dict[str, Any], workers: int, timeout_s: float, paths: Sequence[Path]
) -> Generator[tuple[int, dict[str, Any], bytes], None, None]:
    """What Pool.read gives; the content that ended a worker is then hashed by another, to be known next time."""
    ended: dict[int, Reason] = {}
    with closing(Pool(setup, workers, timeout_s).read(paths)) as replies:
        for number, reply, pixels in replies:
            if reply.get("reason") in (Reason.TIMEOUT, Reason.CRASHED) and not reply.get("killed"):
                ended[number] = reply["reason"]
            else:
                yield number, reply, pixels
    numbers = list(ended)
    with closing(Pool({**setup, "known": None}, workers, timeout_s).read([paths[n] for n in numbers])) as replies:
        for position, reply, _ in replies:
            yield numbers[position], {**reply, "reason": ended[numbers[position]]}, b""


def _keep(source: Source, reply: dict[str, Any], pixels: bytes, store: Store, key: bytes) -> Reason | None:
    """Store one reply; a reason where the file's content remains unknown and is to be tried again next time."""
    reason = Reason(reply.pop("reason")) if "reason" in reply else None
    if "sha" not in reply:
        return reason
    sha, stat = reply.pop("sha"), tuple(reply.pop("stat"))
    record = Record(Facts(**reply), reason=reason) if reason or reply else None
    store.add(keyed(key, "path", source.relative), stat, sha, record, pixels)
    return None


def _conclude(folder: Path, found: Scan, store: Store, unread: dict[int, Reason], key: bytes, intake: Intake) -> None:
    """Write quarantine.csv and the index.

    Raises:
        CohortError: there is nothing to index.
    """
    contents: list[tuple[str, Record] | Reason] = []
    for position, source in enumerate(found.sources):
        if position in unread:
            contents.append(unread[position])
        else:
            _, sha = store.memo[keyed(key, "path", source.relative)]
            contents.append((sha, store.records[sha]))
    admission = admit(found, contents, key)
    write_quarantine(folder / QUARANTINE, admission.quarantine)
    if not found.sources:
        what = "the CSV of the cohort lists no files" if found.from_csv else "the folder of the cohort holds no files"
        raise CohortError(what, "give a folder of DICOM, PNG or JPEG files, or a CSV file that lists some")
    if not admission.members:
        problem = f"none of the {len(found.sources)} files of the cohort can be used: {summary(admission.quarantine)}"
        burned_in = sum(entry.reason in BURNED_IN_REASONS for entry in admission.quarantine)
        raise CohortError(problem, _ALLOW if 2 * burned_in > len(admission.quarantine) else _FIX)
    meta = {
        "intake": asdict(intake),
        "files": len(found.sources),
        "files_used": len(admission.members),
        "quarantine": counts(admission.quarantine),
        "warnings": admission.warnings,
        "own_patients": admission.own_patients,
    }
    write_index(folder, admission.members, store.images, meta)


_FIX = f"{QUARANTINE}, in the cohort's folder under the state directory, lists each file with what its reason means"
_ALLOW = (
    "if the burned-in text is harmless, allow it: "
    "--allow-burned-in, or allow_burned_in = true under the site in the study"
)
