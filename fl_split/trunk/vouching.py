"""What a trunk shows of itself to nodes that ask: its operator's statement, and evidence of the machine it runs on."""

import asyncio
import logging
import subprocess
from pathlib import Path

from cryptography import x509

from fl_split import attestation
from fl_split.errors import ConfigError, WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import Security

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # commands


class NoEvidence(Exception):
    """The command that makes evidence has failed; the log says how."""


class Vouching:
    """Statement and evidence of one trunk."""

    def __init__(self, security: Security, description: pb.DescribeReply) -> None:
        """Look whether what is configured can be used.

        Raises:
            ConfigError: The statement cannot be read or is of another trunk, or there is no such command.
        """
        self._security, self._turns = security, asyncio.Semaphore(_AT_ONCE)
        command = security.evidence_command
        self._command = attestation.command_of("security.evidence-command", command) if command else ()
        if security.statement:
            self._check(attestation.Statement.of(self.statement()), description)

    def statement(self) -> bytes:
        """The operator's statement as it is by now; empty if there is none."""
        file = self._security.statement
        try:
            return Path(file).expanduser().read_bytes()[: attestation.EVIDENCE_BYTES] if file else b""
        except OSError as error:
            text = "security.statement=%s cannot be read (%s): nodes that want to see one go away"
            logger.error(text, file, type(error).__name__)
            return b""

    async def evidence(self, nonce: bytes) -> bytes:
        """Evidence over a caller's nonce and the key of this trunk's certificate; empty if no command makes any.

        The key is this trunk's own, whatever a caller says: evidence for the key of another machine is not to be had.

        Raises:
            WireError: The nonce has another length.
            NoEvidence: The command failed.
        """
        if len(nonce) != attestation.NONCE_BYTES:
            raise WireError(f"nonce has {len(nonce)} bytes: expected {attestation.NONCE_BYTES}")
        if not self._command:
            return b""
        async with self._turns:
            return await asyncio.to_thread(self._make, nonce)

    def _make(self, nonce: bytes) -> bytes:
        try:
            done = attestation.run_command(self._command, b"", nonce, self._key())
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.error("security.evidence-command failed (%s)", type(error).__name__)
            raise NoEvidence from None
        if done.returncode or not 0 < len(done.stdout) <= attestation.EVIDENCE_BYTES:
            logger.error(
                "security.evidence-command failed: exit code %d, %d bytes of evidence, at most %d are taken: %s",
                done.returncode,
                len(done.stdout),
                attestation.EVIDENCE_BYTES,
                done.stderr[-500:].decode(errors="replace").strip(),
            )
            raise NoEvidence
        return done.stdout

    def _key(self) -> bytes:
        return attestation.key_hash(x509.load_pem_x509_certificate(Path(self._security.cert).read_bytes()))

    def _check(self, statement: attestation.Statement, about: pb.DescribeReply) -> None:
        """Find out what nodes would refuse, before they do."""
        if other := statement.wrong_about(about):
            raise ConfigError(
                f"security.statement={self._security.statement!r} is of another trunk: its {other} is not what is "
                "served here; sign a new one with 'fl-split trunk statement sign'"
            )
        if self._key().hex() not in statement.tls_keys:
            raise ConfigError(
                f"security.statement={self._security.statement!r} does not name the key of security.cert="
                f"{self._security.cert!r}: sign a new one with 'fl-split trunk statement sign --cert'"
            )
