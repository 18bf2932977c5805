"""The coordinator's own authority, and the certificate that it gives its machine. Keys are EC P-384."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
"""Longer ones are refused by some clients."""
BACKDATED = timedelta(hours=1)
"""For sites whose clocks are behind."""


def make_authority(name: str) -> tuple[bytes, bytes]:
    """(private key, certificate) of a new authority, PEM; it may sign machines and nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name} authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    built = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(usage, critical=True)
    return _private(key), built.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def make_server(authority_key: bytes, authority: bytes, name: str, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """(private key, certificate) of the coordinator's machine, PEM, valid for `hosts`: names or addresses."""
    signer = serialization.load_pem_private_key(authority_key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority)
    key = ec.generate_private_key(ec.SECP384R1())
    built = _builder(_name(name), issuer.subject, key.public_key(), SERVER_DAYS)
    built = built.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    built = built.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    return _private(key), built.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def days_left(certificate: bytes) -> int:
    """Whole days until a certificate expires; negative once it has."""
    return (x509.load_pem_x509_certificate(certificate).not_valid_after_utc - datetime.now(UTC)).days


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
