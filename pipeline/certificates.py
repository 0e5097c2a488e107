"""A federation's own certificate authority (X.509, RFC 5280), and the keys that hospitals' connections are signed with.

The authority is the aggregator's: a hospital trusts it for this federation only, and gets its certificate with the
invitation. Transport keys are NIST P-384 in OpenSSH's format, as Flower's SuperNode reads them; they open a
connection and sign nothing else. Updates are signed with pipeline.signing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from data_schemas.errors import BadInput

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
# A clock that is behind does not make a new certificate invalid.
_BACKDATED = timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """A certificate (PEM) and its private key (PKCS 8 PEM), which never shows in a repr."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class TransportKey:
    """A hospital's key for connections: private (OpenSSH PEM) and public (one OpenSSH line)."""

    public: str
    private: bytes = field(repr=False)


def make_authority(federation: str, now: datetime) -> Credentials:
    """Make a self-signed authority for one federation, valid for ten years. now: UTC."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"Islet {federation}")
    usage = _key_usage(signs_certificates=True)
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return _signed(builder, key, key)


def make_server_certificate(authority: Credentials, hosts: Sequence[str], now: datetime) -> Credentials:
    """Make a server's certificate for host names and IP addresses, valid for 397 days. now: UTC.

    Raises BadInput when the authority's files do not fit together or cannot be read.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        issuer = x509.load_pem_x509_certificate(authority.certificate)
        issuer_key = load_pem_private_key(authority.key, None)
    except ValueError as error:
        raise BadInput("the authority's files cannot be read", "restore tls/ from the backup") from error
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey) or issuer_key.public_key() != issuer.public_key():
        raise BadInput("the authority's key is not its certificate's", "restore tls/ from the backup")
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name(hosts[0]), issuer.subject, key.public_key(), now, SERVER_DAYS)
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (names, False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return _signed(builder, key, issuer_key)


def make_transport_key() -> TransportKey:
    """Make a P-384 key from the operating system's entropy."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    return TransportKey(public.decode(), key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))


def is_transport_key(line: str) -> bool:
    """Whether a line is a P-384 public key in OpenSSH's format."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def expires_at(certificate: bytes) -> datetime:
    """End of a PEM certificate's validity, UTC. Raises BadInput when it cannot be read."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except ValueError as error:
        raise BadInput("a certificate cannot be read", "make it again") from error


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> Credentials:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as s

    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(issuer_key, hashes.SHA384())
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return Credentials(certificate.public_bytes(s.Encoding.PEM), private)
