"""What a trunk shows of itself before it gets anything: its operator's signed statement, and evidence of its machine.

Both name the key of the trunk's TLS certificate, and nodes bind their connection to that key: what is shown of another
machine's key counts for nothing. A statement is a promise, which somebody can be held to. Evidence is what a command of
the operator prints, such as a hardware's quote, and a command of the institution judges.
"""

import base64
import binascii
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fl_split.errors import ConfigError
from fl_split.proto import trunk_pb2 as pb

NONCE_BYTES = 32  # with the key's hash, what a TDX or SEV-SNP report takes: 64 bytes
EVIDENCE_BYTES = 256 * 1024
COMMAND_S = 60.0
NONCE, TLS_KEY = "FL_SPLIT_NONCE", "FL_SPLIT_TLS_KEY"  # in a command's environment, as hex

_PURPOSE = b"fl-split trunk statement\n"  # of a signature: it is of nothing else


@dataclass(frozen=True)
class Statement:
    """What an operator says of a trunk. On the wire and on disk: a line of JSON, and a line with its signature."""

    operator: str
    model: str  # for people; what it is, the digests say
    config_digest: str  # as in Describe
    weights_digest: str  # as in Describe
    version: str  # of fl-split on the trunk
    tls_keys: tuple[str, ...]  # `key_hash` of each replica's certificate, as hex
    log_policy: str  # what is kept of calls, in the operator's words
    issued: str  # ISO 8601, with a time zone
    expires: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Read a statement; its signature is not looked at.

        Raises:
            ConfigError: It is none.
        """
        try:
            values: dict[str, Any] = json.loads(data.partition(b"\n")[0])
            known = {field.name: str(values[field.name]) for field in fields(cls)}  # later versions may say more
            read = cls(**{**known, "tls_keys": tuple(map(str, values["tls_keys"]))})  # type: ignore[arg-type]
            if not _time(read.issued) < _time(read.expires):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            names = ", ".join(field.name for field in fields(cls))
            raise ConfigError(
                f"this is no statement of a trunk's operator: expected a line of JSON with {names}, and its signature, "
                "as 'fl-split trunk statement sign' writes it"
            ) from None
        return read

    @classmethod
    def verified(cls, data: bytes, key: Ed25519PublicKey) -> Self:
        """Read a statement that the owner of `key` has signed.

        Raises:
            ConfigError: It is none, the signature is another's, or it is not valid at this time.
        """
        statement, (line, _, signature) = cls.of(data), data.partition(b"\n")
        try:
            key.verify(base64.b64decode(signature.strip(), validate=True), _PURPOSE + line)
        except (InvalidSignature, binascii.Error):
            raise ConfigError(
                f"the statement in the name of {statement.operator!r} is not signed by the operator's key that was "
                "given: ask the operator for its public key, over a way that you trust"
            ) from None
        now = datetime.now(UTC)
        if not _time(statement.issued) <= now < _time(statement.expires):
            raise ConfigError(
                f"the statement of {statement.operator!r} holds from {statement.issued} to {statement.expires}, and by "
                f"this machine's clock it is {now.isoformat(timespec='seconds')}: if the clock is right, the operator "
                "signs a new one"
            )
        return statement

    def wrong_about(self, trunk: pb.DescribeReply) -> str:
        """What a trunk serves otherwise than this says: its ``config``, ``weights`` or ``fl-split``; else empty."""
        parts = (
            ("config", self.config_digest, trunk.config_digest),
            ("weights", self.weights_digest, trunk.weights_digest),
            ("fl-split", self.version, trunk.version),
        )
        return next((name for name, said, held in parts if said != held), "")

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """Both lines."""
        line = json.dumps(asdict(self), sort_keys=True).encode()
        return line + b"\n" + base64.b64encode(key.sign(_PURPOSE + line)) + b"\n"


def key_hash(certificate: x509.Certificate) -> bytes:
    """SHA-256 of a certificate's public key (SubjectPublicKeyInfo in DER)."""
    public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).digest()


def command_of(key: str, text: str) -> Sequence[str]:
    """A command's words, for a call without a shell.

    Args:
        key: Where it was configured.
        text: The command as a shell would take it, without the shell's own signs.

    Raises:
        ConfigError: It is none, or there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r} is no command ({error}): expected a program and its arguments") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"{key}={text!r}: there is no such program; give an absolute path, or install it")
    return words


def run_command(words: Sequence[str], given: bytes, nonce: bytes, key: bytes) -> "subprocess.CompletedProcess[bytes]":
    """Run a command with `given` on its standard input, nonce and key in its environment.

    Raises:
        OSError: It cannot be started.
        subprocess.TimeoutExpired: It took too long, and was ended.
    """
    environment = {**os.environ, NONCE: nonce.hex(), TLS_KEY: key.hex()}
    return subprocess.run(words, input=given, capture_output=True, env=environment, timeout=COMMAND_S, check=False)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(text)
    return time
