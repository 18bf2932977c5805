"""The files by which a site joins: what is in them, and what is refused."""

import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from polyclinic.enrolment import Request, fingerprint, read_file
from polyclinic.errors import Refused


def public(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*form).decode()


KEY = public(ec.generate_private_key(ec.SECP384R1()))
REQUEST = {"format": "polyclinic-request-1", "name": "north", "public_key": KEY, "version": "0.1.0"}


def test_a_request_comes_back_without_the_comment_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**REQUEST, "public_key": f"{KEY} someone@somewhere"}))
    found = read_file(tmp_path / "r.json", Request)
    assert (found.name, found.public_key) == ("north", KEY)


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(KEY + "\n")
    try:
        shown = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "key.pub"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert fingerprint(KEY) == shown.stdout.split()[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "../etc"}, "name: "),
        ({"name": "north\n"}, "name: "),
        ({"public_key": public(ec.generate_private_key(ec.SECP256R1()))}, "P-384"),
        ({"public_key": public(ed25519.Ed25519PrivateKey.generate())}, "P-384"),
        ({"public_key": "ecdsa-sha2-nistp384 AAAA"}, "OpenSSH public key"),
        ({"format": "polyclinic-request-2"}, "format: "),
        ({"more": 1}, "more: "),
        ({"version": "x" * 100}, "version: "),
        ({"version": "\x1b[17GSHA256:forged\x1b[K"}, "version: "),
    ],
)
def test_what_is_no_request_is_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**REQUEST, **change}))
    with pytest.raises(Refused, match=r"r\.json is not a request to join") as caught:
        read_file(tmp_path / "r.json", Request)
    assert says in caught.value.problem


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        read_file(tmp_path / "none.json", Request)
    (tmp_path / "huge.json").write_text(json.dumps({**REQUEST, "version": "x" * 10**6}))
    with pytest.raises(Refused, match="is not a request"):
        read_file(tmp_path / "huge.json", Request)
