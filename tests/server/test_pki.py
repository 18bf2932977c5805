"""Certificates: what they are for, and that nothing else passes."""

import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from polyclinic_server.pki import AUTHORITY_DAYS, SERVER_DAYS, days_left, make_authority, make_server

AUTHORITY_KEY, AUTHORITY = make_authority("consortium")
KEY, CERTIFICATE = make_server(AUTHORITY_KEY, AUTHORITY, "consortium", ["node.example", "10.0.0.7", "localhost"])


def test_the_authority_may_sign_machines_and_nothing_else() -> None:
    found = x509.load_pem_x509_certificate(AUTHORITY)
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and not usage.digital_signature
    assert days_left(AUTHORITY) == AUTHORITY_DAYS - 1


def test_the_machine_has_its_names_and_is_a_server_only() -> None:
    found = x509.load_pem_x509_certificate(CERTIFICATE)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node.example", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    key = found.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
    assert days_left(CERTIFICATE) == SERVER_DAYS - 1
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY))


@pytest.mark.parametrize(("authority", "passes"), [(AUTHORITY, True), (make_authority("consortium")[1], False)])
def test_openssl_agrees(authority: bytes, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "a.crt").write_bytes(authority)
    (tmp_path / "s.crt").write_bytes(CERTIFICATE)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", tmp_path / "a.crt"]
    try:
        done = subprocess.run([*command, tmp_path / "s.crt"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert (done.returncode == 0) == passes, done.stderr


def test_pythons_own_tls_takes_the_pair(tmp_path: Path) -> None:
    (tmp_path / "s.key").write_bytes(KEY)
    (tmp_path / "s.crt").write_bytes(CERTIFICATE)
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tmp_path / "s.crt", tmp_path / "s.key")
    ssl.create_default_context(cadata=AUTHORITY.decode())
