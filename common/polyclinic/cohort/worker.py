"""The process that opens files: one request a line on standard input, one frame a reply on standard output.

    request   {"path": ...} as JSON, one line
    reply     length of the JSON and of the pixels (two big-endian uint32 and uint64), the JSON, the pixels

It is a process of its own because decoders hang and crash, and it is started by its module's name rather than through
`multiprocessing`, which would import the caller's program, torch included, in every worker. Decoders print what they
like, header values among it: both output streams lead nowhere but for the replies.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Container
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from polyclinic.cohort import limits
from polyclinic.cohort.intake import Facts, Intake
from polyclinic.cohort.pool import FRAME
from polyclinic.cohort.quarantine import Reason, Unusable


def main() -> None:
    """Serve requests until standard input ends. Its first line holds {"intake", "key", "known", "timeout_s"}."""
    replies = _silence()
    sys.modules["requests"] = None  # type: ignore[assignment]  # pydicom would import it, slowly, to download test files
    setup = json.loads(sys.stdin.buffer.readline())
    intake, key = Intake.from_json(setup["intake"]), bytes.fromhex(setup["key"])
    known = None if setup["known"] is None else frozenset(setup["known"])
    _send(replies, {}, [])  # started
    for line in sys.stdin.buffer:
        # Kills this process should its parent be gone when a decoder hangs; the parent itself is stricter.
        signal.alarm(int(2 * setup["timeout_s"]) + 1)
        reply, images = answer(json.loads(line)["path"], intake, key, known)
        signal.alarm(0)
        _send(replies, reply, images)


def _send(replies: BinaryIO, reply: dict[str, Any], images: list[NDArray[np.uint8]]) -> None:
    text, pixels = json.dumps(reply).encode(), b"".join(image.tobytes() for image in images)
    replies.write(FRAME.pack(len(text), len(pixels)) + text + pixels)
    replies.flush()


def _silence() -> BinaryIO:
    """The stream for replies; all other output is dropped. No core dumps, bounded memory."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > limits.MAX_MEMORY:
        with suppress(OSError, ValueError):  # macOS does not know this limit
            resource.setrlimit(resource.RLIMIT_AS, (limits.MAX_MEMORY, hard))
    return replies


def answer(
    path: str, intake: Intake, key: bytes, known: Container[str] | None
) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
    """The reply to one request and its images, each (channels, size, size).

    The reply holds `reason` if the file is unusable; `sha` and `stat` once it has been read; its facts unless its
    content is among the `known`, or those are None: then nothing is decoded.
    """
    try:
        data, stat = _read(path)
    except Unusable as error:
        return {"reason": error.reason}, []
    except OSError:
        return {"reason": Reason.UNREADABLE}, []
    except MemoryError:
        return {"reason": Reason.TOO_LARGE}, []
    identity: dict[str, Any] = {"sha": hashlib.sha256(data).hexdigest(), "stat": stat}
    if known is None or identity["sha"] in known:
        return identity, []
    try:
        images, facts = decode(data, intake, key)
    except Unusable as error:
        return {**identity, **error.facts.to_json(), "reason": error.reason}, []
    return {**identity, **facts.to_json()}, images


def _read(path: str) -> tuple[bytes, tuple[int, int, int]]:
    with open(path, "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if status.st_size > limits.MAX_BYTES:
            raise Unusable(Reason.TOO_LARGE)
        return file.read(), (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def decode(data: bytes, intake: Intake, key: bytes) -> tuple[list[NDArray[np.uint8]], Facts]:
    """The images of a file by what its first bytes say it is.

    Raises:
        Unusable: whatever is wrong with it.
    """
    try:
        if data[128:132] == b"DICM":
            from polyclinic.cohort import dicom  # pydicom takes a quarter of a second to import

            return dicom.read(data, intake, key)
        from polyclinic.cohort import raster

        if data.startswith(raster.MAGIC):
            return raster.read(data, intake)
    except Unusable:
        raise
    except MemoryError as error:
        raise Unusable(Reason.TOO_LARGE) from error
    except Exception as error:  # a damaged file can raise anything in a parser or decoder
        raise Unusable(Reason.DAMAGED) from error
    raise Unusable(Reason.NOT_AN_IMAGE)


if __name__ == "__main__":
    main()
