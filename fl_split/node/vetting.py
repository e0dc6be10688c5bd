"""Whether whoever runs a trunk has shown what an institution wants to see, before it gets hidden states.

The connection is bound to one certificate first (`pinned`), so that what is shown of its key is of whoever gets the
hidden states, also when gRPC connects anew: a machine that passes on the evidence of another has another key.
"""

import logging
import secrets
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key

from fl_split import attestation
from fl_split.errors import ConfigError, TrunkRefused
from fl_split.node.peer import certificate_of
from fl_split.node.replicas import Credentials
from fl_split.proto import trunk_pb2 as pb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pinned:
    """The one certificate that a connection takes."""

    pem: bytes
    key: bytes  # `attestation.key_hash`


class Vetting:
    """What an institution wants to see: its operator's statement, evidence that a command accepts, or both."""

    def __init__(self, credentials: Credentials) -> None:
        """Read the operator's key and look for the command.

        Raises:
            ConfigError: One of them cannot be used.
        """
        self._credentials = credentials
        key, command = credentials.operator_key, credentials.verifier
        self._operator = public_key("trunk-operator-key", key) if key else None
        self._verifier = attestation.command_of("trunk-verifier", command) if command else ()

    def meet(self, address: str) -> Pinned:
        """Look at the certificate at an address.

        Raises:
            TrunkUnavailable: There is none that the node trusts.
            TrunkRefused: It may sign others, so that a connection cannot be bound to it.
        """
        certificate = certificate_of(address, self._credentials)
        try:
            may_sign = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            may_sign = True  # of version 1, or by an older rule
        if may_sign:
            raise TrunkRefused(
                f"the certificate of the trunk at {address} may sign others (no basic constraint CA:FALSE), so that it "
                "does not say which machine answers: its operator makes another with 'fl-split keys server'"
            )
        return Pinned(certificate.public_bytes(Encoding.PEM), attestation.key_hash(certificate))

    def nonce(self) -> bytes:
        """What evidence is wanted over; empty if none is wanted."""
        return secrets.token_bytes(attestation.NONCE_BYTES) if self._verifier else b""

    def check(self, reply: pb.DescribeReply, nonce: bytes, pinned: Pinned, address: str) -> dict[str, Any]:
        """Look at what a trunk shows; returns what is to be kept of it.

        Raises:
            TrunkRefused: It is not what the institution wants to see. Nothing else was sent.
        """
        shown: dict[str, Any] = {"trunk": address, "tls-key": pinned.key.hex()}
        if self._operator is not None:
            self._check_statement(self._operator, reply, pinned, address)
            shown["statement"] = reply.statement.decode(errors="replace")
        if self._verifier:
            self._judge(reply.evidence, nonce, pinned, address)
            shown["evidence"] = sha256(reply.evidence).hexdigest()
            shown["verifier"] = self._credentials.verifier
        names = " and ".join(name for name in ("statement", "evidence") if name in shown)
        logger.info("the trunk at %s has shown its %s, which holds for its TLS key", address, names)
        return shown

    def _check_statement(
        self, operator: Ed25519PublicKey, reply: pb.DescribeReply, pinned: Pinned, address: str
    ) -> None:
        if not reply.statement:
            raise TrunkRefused(
                f"the trunk at {address} shows no statement of its operator, which trunk-operator-key asks for: the "
                "operator signs one with 'fl-split trunk statement sign' and sets security.statement"
            )
        try:
            statement = attestation.Statement.verified(reply.statement, operator)
        except ConfigError as error:
            raise TrunkRefused(f"the trunk at {address}: {error}") from None
        if statement.wrong_about(reply):
            raise TrunkRefused(
                f"the statement of {statement.operator!r} is of another model or version than the trunk at {address} "
                "says that it serves: the operator signs one for this trunk"
            )
        if pinned.key.hex() not in statement.tls_keys:
            raise TrunkRefused(
                f"the statement of {statement.operator!r} does not name the TLS key of the trunk at {address} "
                f"({pinned.key.hex()[:16]}): whoever answers there shows another's statement, or the operator has "
                "changed the certificate and not yet signed a new one"
            )

    def _judge(self, evidence: bytes, nonce: bytes, pinned: Pinned, address: str) -> None:
        if not evidence:
            raise TrunkRefused(
                f"the trunk at {address} shows no evidence of its machine, which trunk-verifier asks for: its operator "
                "sets security.evidence-command, on hardware that can attest itself"
            )
        try:
            done = attestation.run_command(self._verifier, evidence, nonce, pinned.key)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TrunkRefused(
                f"trunk-verifier came to no end ({type(error).__name__}), so the trunk at {address} gets nothing: try "
                "the command by hand"
            ) from None
        if done.returncode:
            said = done.stderr[-500:].decode(errors="replace").strip()
            logger.error("trunk-verifier on the trunk at %s: exit code %d: %s", address, done.returncode, said)
            raise TrunkRefused(
                f"trunk-verifier does not accept the evidence of the trunk at {address} (exit code {done.returncode}): "
                "it gets nothing; what the command said is in this node's log"
            )


def vetting_of(credentials: Credentials, addresses: list[str]) -> Vetting | None:
    """What the institution wants to see at these addresses; None if nothing.

    Raises:
        ConfigError: It cannot be seen without TLS, or a key or command cannot be used.
    """
    if not (credentials.operator_key or credentials.verifier):
        return None
    for address in addresses:
        if credentials.is_plain(address):
            raise ConfigError(
                f"the trunk at {address} would be reached without TLS, so that nothing says whose statement or "
                "evidence it shows: with trunk-operator-key or trunk-verifier set trunk-ca, and leave "
                "trunk-allow-plaintext out"
            )
    return Vetting(credentials)


def public_key(name: str, file: str) -> Ed25519PublicKey:
    """Read an operator's public key.

    Args:
        name: Where the file was named.
        file: PEM.

    Raises:
        ConfigError: It is none.
    """
    try:
        key = load_pem_public_key(Path(file).expanduser().read_bytes())
        if isinstance(key, Ed25519PublicKey):
            return key
    except (OSError, ValueError):
        pass
    raise ConfigError(
        f"{name}={file!r} is no operator's public key: expected a PEM file with an Ed25519 key, as the operator's "
        "'fl-split keys operator' wrote it"
    )
