"""Who may call: tokens, certificates, plaintext. Over real sockets on loopback."""

import datetime
import ipaddress
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from trunk_service import serving
from typer.testing import CliRunner

from fl_split import wire
from fl_split.cli import app
from fl_split.errors import ConfigError, TrunkRefused, TrunkUnavailable
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.trunk import server
from fl_split.trunk.access import TokenBook, Unauthenticated, add_token, read_tokens, revoke_tokens
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path
    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey


def issue(folder: Path, name: str, issuer: Pair | None = None, *, until: datetime.datetime = NOW + DAY) -> Pair:
    """A CA if no issuer is given, else a certificate for 127.0.0.1 and for `name`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 9 * DAY)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]),
            critical=False,
        )
    )
    certificate = builder.sign(issuer.private if issuer else key, hashes.SHA256())
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Pair(cert_file, key_file, certificate, key)


@pytest.fixture
def ca(tmp_path: Path) -> Pair:
    return issue(tmp_path, "ca")


@pytest.fixture(scope="module")
def served(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """Start a trunk with `security` keys, as a context; yields a function that connects a client."""
    folder = checkpoint("llama")
    held = hold_layers(folder, 2, 2)
    expected = Expected.from_checkpoint(folder, 2, 2)

    @contextmanager
    def serve(**security: Any) -> Iterator[Callable[..., None]]:
        config = TrunkConfig.model_validate({"security": {key: str(value) for key, value in security.items()}})
        with server.embedded(held, config=config) as address:

            def connect(timeout_s: float = 3.0, **credentials: Any) -> None:
                values = {key: str(value) for key, value in credentials.items()}
                with TrunkConnection(
                    address, expected, timeout_s=timeout_s, credentials=Credentials(**values)
                ) as client:
                    client.connect()

            yield connect

    return serve


# -------------------------------------------------------------------------------------------------------- tokens


def test_tokens_file_holds_hashes_only_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "new" / "tokens.json"
    token = add_token(file, "clinic-a", days=1)
    assert token.startswith("fls_") and len(token) > 40
    assert token not in file.read_text() and token[4:] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [entry] = read_tokens(file)
    assert entry.institution == "clinic-a"
    assert entry.expires is not None and abs(entry.expires - time.time() - 86_400) < 60


def test_a_token_that_has_expired_is_not_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["trunk", "token", "add", "a", "--tokens", str(tmp_path / "t"), "--days", "-1"])
    assert done.exit_code == 2 and "not in the range" in done.output
    assert not (tmp_path / "t").exists()


def test_tokens_are_added_revoked_and_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    first, second, third = (add_token(file, name, None) for name in ("a", "a", "b"))
    book = TokenBook(file)
    assert [book.institution_of(token) for token in (first, second, third)] == ["a", "a", "b"]
    assert revoke_tokens(file, read_tokens(file)[0].id) == 1
    with pytest.raises(Unauthenticated):
        book.institution_of(first)
    assert book.institution_of(second) == "a"
    assert revoke_tokens(file, "a") == 1
    with pytest.raises(Unauthenticated):
        book.institution_of(second)
    fourth = add_token(file, "c", None)
    assert book.institution_of(fourth) == "c"


def test_tokens_that_change_while_they_are_read_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens.json"
    token = add_token(file, "a", None)

    def read(name: Path) -> list[Any]:
        tokens = read_tokens(name)
        monkeypatch.undo()
        revoke_tokens(file, "a")  # just after
        return tokens

    add_token(file, "b", None)
    monkeypatch.setattr("fl_split.trunk.access.read_tokens", read)
    book = TokenBook(file)
    with pytest.raises(Unauthenticated):
        book.institution_of(token)


@pytest.mark.parametrize("token", ["", "fls_wrong", "x" * 10_000])
def test_unknown_token_is_refused(tmp_path: Path, token: str) -> None:
    add_token(tmp_path / "t", "a", None)
    with pytest.raises(Unauthenticated):
        TokenBook(tmp_path / "t").institution_of(token)


def test_expired_token_is_refused(tmp_path: Path) -> None:
    token = add_token(tmp_path / "t", "a", days=-1)
    with pytest.raises(Unauthenticated):
        TokenBook(tmp_path / "t").institution_of(token)


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), lambda file: file.unlink()])
def test_a_damaged_tokens_file_lets_nobody_in_until_it_is_mended(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    file = tmp_path / "t"
    token = add_token(file, "a", None)
    book, good = TokenBook(file), file.read_text()
    damage(file)
    with pytest.raises(Unauthenticated):
        book.institution_of(token)
    file.write_text(good)
    assert book.institution_of(token) == "a"


def test_all_hashes_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t"
    tokens = [add_token(file, name, None) for name in "abc"]
    book, compared = TokenBook(file), []
    monkeypatch.setattr("fl_split.trunk.access.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    book.institution_of(tokens[0])
    assert compared == [entry.sha256 for entry in read_tokens(file)]


def test_names_and_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="institution 'a b': expected up to 63"):
        add_token(tmp_path / "t", "a b", None)
    with pytest.raises(ConfigError, match="no tokens file"):
        read_tokens(tmp_path / "missing")
    add_token(tmp_path / "t", "a", None)
    with pytest.raises(ConfigError, match="no token and no institution 'b'"):
        revoke_tokens(tmp_path / "t", "b")
    (tmp_path / "t").write_text(json.dumps([{"id": 3}]))
    with pytest.raises(ConfigError, match="is not a tokens file"):
        read_tokens(tmp_path / "t")


def test_calls_need_a_valid_token(served: Callable[..., Any], tmp_path: Path) -> None:
    file, mine = tmp_path / "tokens.json", tmp_path / "mine"
    mine.write_text(add_token(file, "clinic-a", None) + "\n")
    with served(tokens=file) as connect:
        connect(token_file=mine)
        with pytest.raises(TrunkRefused, match="UNAUTHENTICATED.*needs a valid bearer token"):
            connect()
        (tmp_path / "other").write_text("fls_other")
        with pytest.raises(TrunkRefused, match="UNAUTHENTICATED"):
            connect(token_file=tmp_path / "other")
        revoke_tokens(file, "clinic-a")
        with pytest.raises(TrunkRefused, match="UNAUTHENTICATED"):
            connect(token_file=mine)
        mine.write_text(add_token(file, "clinic-a", days=0))
        with pytest.raises(TrunkRefused, match="UNAUTHENTICATED"):
            connect(token_file=mine)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("Bearer {}", grpc.StatusCode.OK),
        ("bearer {}", grpc.StatusCode.OK),
        ("Basic {}", grpc.StatusCode.UNAUTHENTICATED),
        ("{}", grpc.StatusCode.UNAUTHENTICATED),
        ("", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_a_token_counts_as_a_bearers_only(held: HeldLayers, tmp_path: Path, value: str, code: grpc.StatusCode) -> None:
    token = add_token(tmp_path / "tokens.json", "north", None)
    with serving(held, security={"tokens": str(tmp_path / "tokens.json")}) as channel:
        call = channel.unary_unary(f"/{wire.SERVICE}/Describe")
        assert call.future(b"", timeout=5, metadata=(("authorization", value.format(token)),)).code() is code


@pytest.mark.parametrize(
    ("text", "message"), [(None, "trunk-token-file=.* cannot be read"), ("a\nb", "does not hold a token")]
)
def test_a_token_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Credentials(token_file=str(tmp_path / "token")).metadata()


# ----------------------------------------------------------------------------------------------------------- TLS


def test_tls_with_the_right_ca_and_with_the_wrong_one(served: Callable[..., Any], tmp_path: Path, ca: Pair) -> None:
    own, other = issue(tmp_path, "trunk", ca), issue(tmp_path, "other-ca")
    with served(cert=own.cert, key=own.key) as connect:
        connect(ca=ca.cert)
        with pytest.raises(TrunkUnavailable, match=r"TLS handshake failed, its certificate is not .*check trunk-ca"):
            connect(ca=other.cert, timeout_s=0.5)
        with pytest.raises(TrunkUnavailable, match=r"wants TLS: set trunk-ca"):  # plaintext to a TLS port
            connect(timeout_s=0.5)


def test_tls_to_a_plaintext_trunk_fails(served: Callable[..., Any], ca: Pair) -> None:
    with served() as connect, pytest.raises(TrunkUnavailable, match="it speaks no TLS: check"):
        connect(ca=ca.cert, timeout_s=0.5)


def test_an_expired_server_certificate_is_refused_and_said_on_both_sides(
    served: Callable[..., Any], tmp_path: Path, ca: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    old = issue(tmp_path, "trunk", ca, until=NOW - DAY)
    error = "its certificate has expired by this machine's clock: if the clock is right, the operator makes a new one"
    with served(cert=old.cert, key=old.key) as connect, pytest.raises(TrunkUnavailable, match=error):
        connect(ca=ca.cert, timeout_s=0.5)
    (said,) = {record.message for record in caplog.records if "has ended on" in record.message}
    assert said.startswith(f"security.cert={old.cert} has ended on {(NOW - DAY).date()}, and callers refuse it")


def test_mtls_lets_in_who_has_a_certificate_of_the_ca(
    served: Callable[..., Any], tmp_path: Path, ca: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own, clinic = issue(tmp_path, "trunk", ca), issue(tmp_path, "clinic-a", ca)
    stranger = issue(tmp_path, "stranger", issue(tmp_path, "other-ca"))
    expired = issue(tmp_path, "expired", ca, until=NOW - DAY)
    with served(cert=own.cert, key=own.key, client_ca=ca.cert) as connect:
        connect(ca=ca.cert, cert=clinic.cert, key=clinic.key)
        assert [record.event["institution"] for record in caplog.records if hasattr(record, "event")] == ["clinic-a"]
        for bad in ({}, {"cert": stranger.cert, "key": stranger.key}, {"cert": expired.cert, "key": expired.key}):
            with pytest.raises(TrunkUnavailable):
                connect(ca=ca.cert, timeout_s=0.5, **bad)


def test_a_new_certificate_is_used_without_a_restart(served: Callable[..., Any], tmp_path: Path, ca: Pair) -> None:
    own = issue(tmp_path, "trunk", ca)
    new_ca = issue(tmp_path, "new-ca")
    with served(cert=own.cert, key=own.key) as connect:
        connect(ca=ca.cert)
        own.key.write_text("half a file")
        connect(ca=ca.cert)  # what cannot be used is not used
        renewed = issue(tmp_path, "renewed", new_ca)
        os.replace(renewed.cert, own.cert)
        os.replace(renewed.key, own.key)
        connect(ca=new_ca.cert)
        with pytest.raises(TrunkUnavailable):
            connect(ca=ca.cert, timeout_s=0.5)


@pytest.mark.parametrize(
    ("security", "message"),
    [
        ({"cert": "c.pem"}, "security: cert and key belong together"),
        ({"client-ca": "c.pem"}, "security: client-ca needs TLS"),
    ],
)
def test_half_a_tls_configuration_is_refused(security: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrunkConfig.load(None, [f"security.{key}={value}" for key, value in security.items()])


def test_certificate_files_that_are_none_are_refused(served: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not PEM")
    for bad in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"security\.cert, security\.key or .* cannot be used"):
            with served(cert=bad, key=bad):
                pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "trunk.example.org"])
def test_plaintext_beyond_loopback_must_be_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.host=.* is beyond loopback"):
        TrunkConfig.load(None, [f"server.host={host}"])
    TrunkConfig.load(None, [f"server.host={host}", "security.allow-plaintext=true"])
    TrunkConfig.load(None, [f"server.host={host}", "security.cert=a", "security.key=b"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_plaintext_on_loopback_is_fine(host: str) -> None:
    TrunkConfig.load(None, [f"server.host={host}"])


@pytest.mark.parametrize(
    ("address", "credentials", "secure"),
    [
        ("127.0.0.1:1", {}, False),
        ("[::1]:1", {}, False),
        ("127.0.0.1:1", {"ca": "CA"}, True),
        ("trunk.example.org:1", {}, True),
        ("dns:///trunk.example.org:1", {}, True),
        ("10.0.0.1:1", {"allow_plaintext": True}, False),
        ("10.0.0.1:1", {"allow_plaintext": True, "ca": "CA"}, True),
    ],
)
def test_a_node_speaks_plaintext_on_loopback_only(
    address: str, credentials: dict[str, Any], secure: bool, ca: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr("fl_split.node.replicas.grpc.insecure_channel", lambda *_, **__: made.append(False))
    monkeypatch.setattr("fl_split.node.replicas.grpc.secure_channel", lambda *_, **__: made.append(True))
    values = {key: str(ca.cert) if value == "CA" else value for key, value in credentials.items()}
    Credentials(**values).channel(address)
    assert made == [secure]


def test_half_a_client_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="trunk-cert and trunk-key belong together"):
        Credentials(cert="a").channel("127.0.0.1:1")
