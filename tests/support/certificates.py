"""Certificates made on the spot: for this machine's own addresses, and signed by themselves."""

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as PEM, and the number that tells it from others."""

    serial: int
    certificate: bytes
    key: PrivateKey

    def key_pem(self, password: bytes | None = None) -> bytes:
        """Return the key, encrypted where there is a password."""
        encryption: KeySerializationEncryption = NoEncryption()
        if password is not None:
            encryption = BestAvailableEncryption(password)
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def write(self, cert: Path, key: Path) -> None:
        """Put both in their places as a renewal does: each at once."""
        replace(cert, self.certificate)
        replace(key, self.key_pem())

    def trusting(self) -> ssl.SSLContext:
        """Return what a client needs to trust it."""
        return ssl.create_default_context(cadata=self.certificate.decode())


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Give a file another content, at once."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.chmod(mode)
    os.replace(draft, path)  # noqa: PTH105 - it takes the place of what is there


def make_pair(*, ends_in: timedelta = timedelta(days=1), key: PrivateKey | None = None) -> Pair:
    """Make a certificate for localhost, 127.0.0.1 and ::1."""
    private = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(each)) for each in ("127.0.0.1", "::1"))]
    now, serial = datetime.now(UTC), x509.random_serial_number()
    built = (
        x509.CertificateBuilder(name, name, private.public_key(), serial)
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends_in)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return Pair(serial, built.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM), private)
