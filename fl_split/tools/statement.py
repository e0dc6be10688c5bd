"""An operator's signed statement about its trunk: what it is, which keys it answers with, what is kept of calls."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_split import __version__
from fl_split.attestation import Statement, key_hash
from fl_split.errors import ConfigError
from fl_split.model.checkpoint import resolve_model, trunk_needs
from fl_split.node.expected import Expected
from fl_split.trunk.config import TrunkModel


def make_statement(
    model: TrunkModel, certificates: Sequence[Path], operator: str, log_policy: str, days: float
) -> Statement:
    """Say what a trunk serves; reads the model's files, and loads no layer.

    Args:
        model: Of the trunk's configuration.
        certificates: PEM files of all its replicas.
        operator: Who runs it.
        log_policy: What is kept of calls.
        days: For which it holds.

    Raises:
        ConfigError: The model or a certificate cannot be read.
    """
    ends = model.bottom_layers, model.top_layers
    expected = Expected.from_checkpoint(resolve_model(model.name, model.revision, trunk_needs(*ends)), *ends)
    now = datetime.now(UTC)
    return Statement(
        operator=operator,
        model=model.name,
        config_digest=expected.config_digest,
        weights_digest=expected.weights_digest or "",
        version=__version__,
        tls_keys=tuple(key_hash(_certificate(file)).hex() for file in certificates),
        log_policy=log_policy,
        issued=now.isoformat(timespec="seconds"),
        expires=(now + timedelta(days=days)).isoformat(timespec="seconds"),
    )


def sign(statement: Statement, key: Path) -> bytes:
    """Sign it with the operator's private key.

    Raises:
        ConfigError: The file holds no such key.
    """
    try:
        private = load_pem_private_key(key.read_bytes(), None)
        if isinstance(private, Ed25519PrivateKey):
            return statement.signed(private)
    except (OSError, ValueError, TypeError):
        pass
    raise ConfigError(f"{key} is no operator's private key: expected one that 'fl-split keys operator' has made")


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no certificate ({type(error).__name__}): expected a PEM file") from None
