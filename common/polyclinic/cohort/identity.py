"""Patient identifiers and file paths are kept only as keyed HMAC-SHA256; the key never leaves the site's state."""

import hmac
import os
import secrets
from pathlib import Path

from polyclinic.errors import StorageError
from polyclinic.files import make_folder, storage

KEY_BYTES = 32


def load_key(state: Path) -> bytes:
    """The site's key, made on first use: `state/identity.key`, 32 random bytes, readable by its owner only.

    The key appears under its name complete or not at all, and whoever comes second reads what the first one made.

    Raises:
        StorageError: it cannot be written, `state` is no directory, or what stands there is not a key.
    """
    path = state / "identity.key"
    make_folder(state, mode=0o700)
    with storage(path):
        if not path.exists():
            try:
                _make_key(path)
            except (PermissionError, FileNotFoundError) as error:  # the latter in /proc
                problem = f"nothing can be written into the state directory {state}: {error.strerror}"
                raise StorageError(problem, "give another directory, or make it writable") from error
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"{path.name} holds {len(key)} bytes instead of {KEY_BYTES}",
            "restore it from a backup, or remove it together with the cohorts beside it, which are then built anew",
        )
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def keyed(key: bytes, purpose: str, text: str) -> str:
    """HMAC-SHA256 of `text`, 128 bits as 32 hexadecimal digits; equal texts of two purposes give unrelated results."""
    message = f"{purpose}\0{text}".encode("utf-8", "surrogateescape")
    return hmac.digest(key, message, "sha256").hex()[:32]
