"""Files that are either whole or not there: written beside, flushed, then renamed."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from polyclinic.errors import StorageError


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path`, or a limit on the size of files, into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left on the disk of {path.name}", "free some space and run again") from error
        if error.errno == errno.EFBIG:
            fix = "raise the limit (ulimit -f), or use another disk, and run again"
            raise StorageError(f"{path.name} is larger than a file may be here", fix) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"cannot write {path.name}: {error.strerror}", "make its folder writable") from error
        raise


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder that a person named at a terminal, and those above it, where it is not yet.

    Raises:
        StorageError: it cannot be made. It names the whole path: it is for that terminal, not for what leaves a site.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path} is not a directory, or lies in a file", "give another directory") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left to make {path}", "free some space and run again") from error
        fix = "give another directory, or make the one above it writable"
        raise StorageError(f"cannot make the directory {path}: {error.strerror}", fix) from error


@contextmanager
def atomic(path: Path, durable: bool = True, recycle: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error.

    It outlives a killed process in any case, and a power cut if `durable`. `recycle` names a file that is no longer
    needed and is written over, which is faster, as its pages are in memory already. Without `durable` a power cut can
    leave the old content under the new name: the file must say what it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            if recycle is not None and recycle.exists():
                recycle.replace(temporary)
            with temporary.open("r+b" if temporary.exists() else "wb") as file:
                yield file
                file.truncate()
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if not durable:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`, durably, all or nothing."""
    with atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_secret(path: Path, data: bytes) -> None:
    """As `write_atomic`, readable by its owner only from the first byte."""
    before = os.umask(0o077)
    try:
        write_atomic(path, data)
    finally:
        os.umask(before)


@contextmanager
def tentative(folders: Sequence[Path]) -> Iterator[None]:
    """Where the block ends in an error, remove those of `folders`, in this order, that it leaves empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
        raise


@contextmanager
def locked(path: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Whether this process alone works in the folder `path` meanwhile. A lock ends with its process, however that does.

    Where another process has it, it is tried for `patience_s` seconds.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + patience_s
        while not (free := _take(handle)) and time.monotonic() < until:
            time.sleep(0.1)
        yield free
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
