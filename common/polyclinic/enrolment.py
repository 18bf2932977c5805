"""What a hospital and the coordinator hand each other before their machines speak: a request to join, and its answer.

Both are small JSON files without secrets. Who enrols a site compares the fingerprint of its key over another channel,
such as the telephone: nothing else ties the key to the hospital.
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from polyclinic.errors import Refused
from polyclinic.settings import Name

LARGEST = 64_000
"""Bytes of such a file."""


def _is_p384(text: str) -> str:
    """An OpenSSH public key, without its comment."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("give an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("give a key on the curve P-384")
    return " ".join(text.split()[:2])


def _is_address(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9\[][A-Za-z0-9.:\]-]{0,254}:[0-9]{1,5}", text):
        raise ValueError("give host:port")
    if not 0 < int(text.rpartition(":")[2]) < 65_536:
        raise ValueError("give host:port, the port from 1 to 65535")
    return text


def _is_certificate(text: str) -> str:
    try:
        x509.load_pem_x509_certificate(text.encode())
    except ValueError as error:
        raise ValueError("give a certificate, PEM") from error
    return text


Address = Annotated[str, AfterValidator(_is_address)]
PublicKey = Annotated[str, AfterValidator(_is_p384)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Request(_File):
    """From a site: who it is, and the public half of its key."""

    format: Literal["polyclinic-request-1"] = "polyclinic-request-1"
    name: Name
    public_key: PublicKey
    version: str = Field(pattern=r"^[0-9A-Za-z.+-]{1,64}$")
    """Of Polyclinic. Printed beside the fingerprint, so nothing that moves a terminal's cursor."""

    @property
    def fingerprint(self) -> str:
        """Of the key, as `ssh-keygen -l` shows it."""
        return fingerprint(self.public_key)


class Join(_File):
    """From the coordinator: where it is, whose certificate to trust, and which bundle it will send."""

    format: Literal["polyclinic-join-1"] = "polyclinic-join-1"
    name: Name
    coordinator: Name
    address: Address
    authority: Annotated[str, AfterValidator(_is_certificate)] = Field(max_length=20_000)
    """Certificate of the coordinator's own authority, PEM."""
    bundle: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, for the telephone."""
        return "SHA256:" + x509.load_pem_x509_certificate(self.authority.encode()).fingerprint(hashes.SHA256()).hex()


Kind = TypeVar("Kind", Request, Join)


def fingerprint(public_key: str) -> str:
    """SHA-256 of an OpenSSH public key.

    >>> fingerprint("ecdsa-sha2-nistp384 AAAA")
    'SHA256:cJSH4TRbexIJfAV8/Wj6jwWfHlxO5ZeB5bSYi+o9+CM'
    """
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def read_file(path: Path, kind: type[Kind]) -> Kind:
    """A request or an answer.

    Raises:
        Refused: the file is not there, or not one.
    """
    what = "a request to join" if kind is Request else "an answer to a request to join"
    try:
        with path.open("rb") as file:
            return kind.model_validate_json(file.read(LARGEST))
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}", "give the path of the file that was sent") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise Refused(f"{path} is not {what}: {where}: {first['msg']}", "ask for the file again") from error
