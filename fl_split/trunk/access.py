"""Who may call a trunk: bearer tokens and TLS.

On disk there are hashes only. A token is 256 random bits, so one SHA-256 is enough: there is nothing to guess.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import ssl
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from filelock import FileLock

from fl_split.errors import ConfigError
from fl_split.files import write_atomic
from fl_split.trunk.config import Security

logger = logging.getLogger(__name__)

_INSTITUTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DAY_S = 86_400


class Unauthenticated(Exception):
    """A caller without a valid token or certificate; the text says no more than that."""


# -------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Token:
    """One entry of the tokens file. `expires` is in seconds since the epoch, or None for never."""

    id: str
    institution: str
    sha256: str
    created: float
    expires: float | None


def add_token(file: Path, institution: str, days: float | None) -> str:
    """Create a token; returns it, to be handed to the institution: it is nowhere to be read again.

    Args:
        file: The tokens file; made if need be, readable by its owner only.
        institution: Name in metrics and logs.
        days: Until it expires; None for never.

    Raises:
        ConfigError: A name that cannot be used, or a file that is not a tokens file.
    """
    if not _INSTITUTION.fullmatch(institution):
        raise ConfigError(f"institution {institution!r}: expected up to 63 letters, digits, '.', '_' or '-'")
    text, now = f"fls_{secrets.token_urlsafe(32)}", time.time()
    expires = None if days is None else now + days * _DAY_S
    with _locked(file):
        tokens = read_tokens(file) if file.exists() else []
        _write_tokens(file, [*tokens, Token(secrets.token_hex(4), institution, _hash(text), now, expires)])
    return text


def revoke_tokens(file: Path, name: str) -> int:
    """Remove the token with this id, or all tokens of this institution; returns how many.

    Raises:
        ConfigError: There is none, or the file is not a tokens file.
    """
    with _locked(file):
        tokens = read_tokens(file)
        left = [token for token in tokens if name not in (token.id, token.institution)]
        if len(left) == len(tokens):
            raise ConfigError(f"no token and no institution {name!r} in {file}: see 'fl-split trunk token list'")
        _write_tokens(file, left)
    return len(tokens) - len(left)


def read_tokens(file: Path) -> list[Token]:
    """All tokens, oldest first.

    Raises:
        ConfigError: The file is not there, or is not a tokens file.
    """
    try:
        return [Token(**entry) for entry in json.loads(file.read_text())]
    except FileNotFoundError:
        raise ConfigError(f"no tokens file {file}: make one with 'fl-split trunk token add'") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a tokens file ({type(error).__name__}): restore it, or make a new one"
        ) from None


def _locked(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f".{file.name}.lock"))


def _write_tokens(file: Path, tokens: list[Token]) -> None:
    write_atomic(file, json.dumps([asdict(token) for token in tokens], indent=2) + "\n")  # owner only, from mkstemp


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenBook:
    """The tokens file, read anew whenever it changes. A file that cannot be read lets nobody in."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp = self._stat()  # before it is read: a change in between is seen at the next call
        self._tokens = read_tokens(file)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def institution_of(self, token: str) -> str:
        """Find the institution that a token was made for; takes the same time whichever entry matches, if any.

        Raises:
            Unauthenticated: It is unknown, revoked or expired.
        """
        if (stamp := self._stat()) != self._stamp:
            self._stamp = stamp
            try:
                self._tokens = read_tokens(self._file)
                logger.info("read %d tokens anew", len(self._tokens))
            except ConfigError as error:
                self._tokens = []
                logger.error("nobody is let in: %s", error)
        presented, found = _hash(token), None
        for entry in self._tokens:
            if hmac.compare_digest(presented, entry.sha256):
                found = entry
        if found is None or (found.expires is not None and found.expires < time.time()):
            raise Unauthenticated
        return found.institution


def identify(context: grpc.aio.ServicerContext, book: TokenBook | None) -> tuple[str, str]:
    """Who calls: the institution's name, and what to count its calls by.

    With a tokens file it is the token that counts; else the client certificate; else all are "anonymous", told apart
    by their address.

    Raises:
        Unauthenticated: A tokens file is in use, and the call brings no valid token.
    """
    if book is not None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = given.partition(" ") if isinstance(given, str) else ("", "", "")
        if scheme.lower() != "bearer":
            raise Unauthenticated
        institution = book.institution_of(token)
        return institution, institution
    names = context.auth_context().get("x509_common_name")
    if names:
        name = names[0].decode(errors="replace")
        return (name, name) if _INSTITUTION.fullmatch(name) else ("unnamed", name)
    return "anonymous", context.peer().rpartition(":")[0]


# ----------------------------------------------------------------------------------------------------------- TLS


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """TLS or mTLS as configured, None for plaintext. New certificates are picked up at the next handshake.

    Raises:
        ConfigError: A file is missing, is not what it should be, or key and certificate do not fit.
    """
    if not security.cert:
        return None
    files = [Path(name) for name in (security.cert, security.key, security.client_ca) if name]
    last = _stamps(files)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal last
        if (now := _stamps(files)) == last:
            return None
        last = now
        try:
            configuration = _certificates(security)
        except ConfigError as error:
            logger.error("still using the certificates from before: %s", error)
            return None
        logger.info("read certificates anew")
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _certificates(security), changed, require_client_authentication=bool(security.client_ca)
    )


def _certificates(security: Security) -> grpc.ServerCertificateConfiguration:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(security.cert, security.key)
        if security.client_ca:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(security.client_ca)
    except (OSError, ssl.SSLError) as error:
        files = [name for name in (security.cert, security.key, security.client_ca) if name]
        missing = [name for name in files if not os.access(name, os.R_OK)]
        text = f"{', '.join(missing)} is not there or may not be read" if missing else f"got {', '.join(files)}"
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            text = f"{security.key} is not the key of {security.cert}"
        raise ConfigError(
            f"security.cert, security.key or security.client-ca cannot be used ({type(error).__name__}): {text}; "
            "expected PEM files of a certificate chain, its private key, and a CA"
        ) from None
    client_ca = Path(security.client_ca).read_bytes() if security.client_ca else None
    pair = (Path(security.key).read_bytes(), Path(security.cert).read_bytes())
    ends = x509.load_pem_x509_certificate(pair[1]).not_valid_after_utc
    if ends < datetime.now(UTC):
        text = "security.cert=%s has ended on %s, and callers refuse it: make a new one with 'fl-split keys server'"
        logger.error(text, security.cert, ends.date())
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=client_ca)


def _stamps(files: list[Path]) -> list[int]:
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
