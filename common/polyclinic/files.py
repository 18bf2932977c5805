"""Files that are either whole or not there: written beside, flushed, then renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from polyclinic.errors import StorageError


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path` into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left on the disk of {path.name}", "free some space and run again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"cannot write {path.name}: {error.strerror}", "make its folder writable") from error
        raise


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path`, durably, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`, durably, all or nothing."""
    with atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
