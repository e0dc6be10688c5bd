"""Certificates and keys of a federation: who a server is (TLS), and who a node is (Flower's SuperNode keys).

One authority signs the certificates of SuperLink and trunk; its own is what institutions trust. A node's key
pair is made by the institution itself: only the ``.pub`` file goes to the operator. No file that is there is replaced.
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_split.errors import ConfigError

_PEM = serialization.Encoding.PEM
_CLOCK_SKEW = timedelta(minutes=5)  # a certificate is not refused by a clock that is a little behind


def make_authority(folder: Path, days: int = 3650) -> tuple[Path, Path]:
    """Make a certificate authority; returns its certificate, for everybody, and its key, for nobody else.

    Args:
        folder: Where ``ca.crt`` and ``ca.key`` go.
        days: Until the certificate expires.

    Raises:
        ConfigError: One of the files is there already.
    """
    key, name = _new_key(), _name("fl-split authority")
    usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        _certificate(name, key, days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _write_pair(folder / "ca.crt", folder / "ca.key", certificate, key)


def make_server_certificate(folder: Path, name: str, hosts: Sequence[str], days: int = 365) -> tuple[Path, Path]:
    """Make a server's certificate and key, signed by the authority in the same folder; returns both files.

    Args:
        folder: Holds ``ca.crt`` and ``ca.key``; ``<name>.crt`` and ``<name>.key`` are added.
        name: Such as ``superlink`` or ``trunk``.
        hosts: Every DNS name and IP address by which clients reach it. ``localhost`` and ``127.0.0.1`` are added:
            Flower's own processes connect there.
        days: Until the certificate expires.

    Raises:
        ConfigError: There is no authority in the folder, or one of the files is there already.
    """
    try:
        issuer = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        issuer_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no authority ({type(error).__name__}): expected ca.crt and ca.key, as made by "
            "'fl-split keys authority'"
        ) from None
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{folder}/ca.key is not an elliptic curve key: make an authority with 'fl-split keys authority'"
        )
    key = _new_key()
    names = [_general_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    certificate = (
        _certificate(_name(hosts[0] if hosts else "localhost"), key, days)
        .issuer_name(issuer.subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return _write_pair(folder / f"{name}.crt", folder / f"{name}.key", certificate, key)


def make_node_key(file: Path) -> tuple[Path, Path]:
    """Make the key pair by which a SuperLink knows a SuperNode; returns the private and the public file.

    Args:
        file: The private key, in OpenSSH's format; the public one is ``<file>.pub``.

    Raises:
        ConfigError: One of the files is there already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public_file = file.with_name(f"{file.name}.pub")
    _write_new({file: (private, 0o600), public_file: (public + b"\n", 0o644)})
    return file, public_file


def make_operator_key(file: Path) -> tuple[Path, Path]:
    """Make the key pair that an operator signs statements with; returns the private and the public file.

    Args:
        file: The private key; the public one, for institutions, is ``<file>.pub``. Both are PEM.

    Raises:
        ConfigError: One of the files is there already.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public_file = file.with_name(f"{file.name}.pub")
    _write_new({file: (private, 0o600), public_file: (public, 0o644)})
    return file, public_file


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _write_pair(
    certificate_file: Path, key_file: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new({key_file: (private, 0o600), certificate_file: (certificate.public_bytes(_PEM), 0o644)})
    return certificate_file, key_file


def _write_new(files: dict[Path, tuple[bytes, int]]) -> None:
    """Write files with these modes from the first byte on; none of them may be there."""
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} is there already and is not replaced: move it away, or choose another name")
    made: list[Path] = []
    try:
        for file, (content, mode) in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
                made.append(file)
                opened.write(content)
    except OSError:  # a full disk: half a key would be in the way of the next try
        for file in made:
            file.unlink()
        raise
