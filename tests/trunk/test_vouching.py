"""What a trunk shows of itself to those who ask, and that it shows nothing of another machine's."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fl_split import attestation, wire
from fl_split.attestation import Statement
from fl_split.cli import app
from fl_split.errors import ConfigError
from fl_split.node.replicas import Credentials
from fl_split.proto import trunk_pb2 as pb
from fl_split.tools.certificates import make_authority, make_operator_key, make_server_certificate
from fl_split.tools.statement import make_statement
from fl_split.tools.watch import describe
from fl_split.trunk.config import TrunkConfig, TrunkModel
from fl_split.trunk.layers import HeldLayers
from fl_split.trunk.server import embedded

NONCE = bytes(range(32))
SHOW = "import os; print(os.environ['FL_SPLIT_NONCE'], os.environ['FL_SPLIT_TLS_KEY'], end='')"


def python(code: str) -> str:
    return f'{sys.executable} -S -c "{code}"'


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_authority(tmp_path)
    make_server_certificate(tmp_path, "trunk", [])
    make_server_certificate(tmp_path, "other", [])
    return tmp_path


@contextmanager
def serving(held: HeldLayers, keys: Path, **security: str) -> Iterator[tuple[str, Callable[[bytes], Any]]]:
    """A trunk with TLS; yields its address, and what asks it with a nonce."""
    values = {"cert": str(keys / "trunk.crt"), "key": str(keys / "trunk.key"), **security}
    root = grpc.ssl_channel_credentials((keys / "ca.crt").read_bytes())
    with embedded(held, config=TrunkConfig.model_validate({"security": values})) as address:
        with grpc.secure_channel(address, root) as channel:
            ask = channel.unary_unary(f"/{wire.SERVICE}/Describe", None, pb.DescribeReply.FromString)
            yield address, lambda nonce: ask(pb.DescribeRequest(nonce=nonce).SerializeToString(), timeout=10)


def refusal(ask: Callable[[bytes], Any], nonce: bytes = NONCE) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        ask(nonce)
    return error.value


def statement_of(folder: Path, certificate: Path, **changes: Any) -> Statement:
    model = TrunkModel(name=str(folder), **changes)
    return make_statement(model, [certificate], "Example Ltd", "counts only", 30)


def test_evidence_is_over_the_callers_nonce_and_the_trunks_own_key(held: HeldLayers, keys: Path) -> None:
    with serving(held, keys, evidence_command=python(SHOW)) as (_, ask):
        nonce, key = ask(NONCE).evidence.decode().split()
        assert ask(b"").evidence == b""  # of who does not ask, nothing is made
    from cryptography import x509

    own = x509.load_pem_x509_certificate((keys / "trunk.crt").read_bytes())
    assert nonce == NONCE.hex() and key == attestation.key_hash(own).hex()


def test_a_trunk_without_a_command_answers_as_ever(held: HeldLayers, keys: Path) -> None:
    with serving(held, keys) as (_, ask):
        reply = ask(NONCE)
        assert reply.evidence == reply.statement == b"" and reply.trunk_id == held.identity.trunk_id


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit('a secret of the inside')", "pass", "print('x' * 300_000)", "import time; time.sleep(60)"],
)
def test_a_command_that_fails_is_said_to_the_operator_only(
    held: HeldLayers, keys: Path, code: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attestation, "COMMAND_S", 1.0)
    with serving(held, keys, evidence_command=python(code)) as (_, ask):
        error = refusal(ask)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "secret" not in error.details()
        assert ask(b"").trunk_id  # others are served
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any(text.startswith("security.evidence-command failed") for text in said)


@pytest.mark.parametrize("nonce", [b"short", bytes(33)])
def test_a_nonce_of_another_length_is_refused_by_name(held: HeldLayers, keys: Path, nonce: bytes) -> None:
    with serving(held, keys, evidence_command=python(SHOW)) as (_, ask):
        error = refusal(ask, nonce)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"nonce has {len(nonce)} bytes: expected 32"


@pytest.mark.parametrize("key", ["statement", "evidence-command"])
def test_without_tls_there_is_nothing_to_bind_it_to(key: str) -> None:
    with pytest.raises(ConfigError, match="security: statement and evidence-command need TLS"):
        TrunkConfig.load(None, [f"security.{key}='true'"])


def test_what_nodes_would_refuse_is_said_before_serving(
    held: HeldLayers, keys: Path, checkpoint: Callable[[str], Path]
) -> None:
    signer, file = Ed25519PrivateKey.generate(), keys / "statement"
    own = statement_of(checkpoint("llama"), keys / "trunk.crt")
    for other, message in (
        (statement_of(checkpoint("gpt2"), keys / "trunk.crt"), "is of another trunk: its config is not"),
        (statement_of(checkpoint("llama"), keys / "trunk.crt", bottom_layers=1), "its weights is not"),
        (statement_of(checkpoint("llama"), keys / "other.crt"), r"does not name the key of security\.cert"),
    ):
        file.write_bytes(other.signed(signer))
        with pytest.raises(ConfigError, match=message), serving(held, keys, statement=str(file)):
            pass
    file.write_text("no statement")
    with pytest.raises(ConfigError, match="this is no statement of a trunk's operator"):
        with serving(held, keys, statement=str(file)):
            pass
    with pytest.raises(ConfigError, match=r"security\.evidence-command='/no/program': there is no such program"):
        with serving(held, keys, evidence_command="/no/program"):
            pass
    file.write_bytes(own.signed(signer))
    with serving(held, keys, statement=str(file)) as (address, ask):
        assert ask(b"").statement == file.read_bytes()
        told = describe(address, Credentials(ca=str(keys / "ca.crt")))["statement"]
        assert told == f"in the name of Example Ltd, until {own.expires}"


def test_a_statement_is_read_anew(
    held: HeldLayers, keys: Path, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    signer, file = Ed25519PrivateKey.generate(), keys / "statement"
    own = statement_of(checkpoint("llama"), keys / "trunk.crt")
    file.write_bytes(own.signed(signer))
    with serving(held, keys, statement=str(file)) as (_, ask):
        file.write_text("another")
        assert ask(b"").statement == b"another"
        file.unlink()
        assert ask(b"").statement == b""
    assert "cannot be read (FileNotFoundError): nodes that want to see one go away" in caplog.text


# ---------------------------------------------------------------------------------------------------- the verbs


def test_an_operator_signs_and_anybody_can_look(keys: Path, checkpoint: Callable[[str], Path]) -> None:
    private, public = make_operator_key(keys / "operator")
    assert private.stat().st_mode & 0o777 == 0o600
    config = keys / "trunk.toml"
    config.write_text(f"[model]\nname = {str(checkpoint('llama'))!r}\n[security]\ncert = {str(keys / 'trunk.crt')!r}\n"
                      f"key = {str(keys / 'trunk.key')!r}\n")  # fmt: skip
    out = keys / "statement"
    words = ["trunk", "statement", "sign", "--config", config, "--key", private, "--operator", "Example Ltd"]
    words += ["--log-policy", "counts, 30 days", "--cert", keys / "other.crt", "--out", out]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    found = Statement.of(out.read_bytes())
    assert (found.operator, found.log_policy, len(found.tls_keys)) == ("Example Ltd", "counts, 30 days", 2)
    shown = CliRunner().invoke(app, ["trunk", "statement", "show", str(out), "--key", str(public)])
    assert shown.exit_code == 0 and "counts, 30 days" in shown.output and "signed by this key" in shown.output
    assert "not checked" in CliRunner().invoke(app, ["trunk", "statement", "show", str(out)]).output
    _, stranger = make_operator_key(keys / "stranger")
    other = CliRunner().invoke(app, ["trunk", "statement", "show", str(out), "--key", str(stranger)])
    assert other.exit_code == 1 and "is not signed by the operator's key" in other.stderr
    gone = CliRunner().invoke(app, ["trunk", "statement", "show", str(keys / "nothing")])
    assert gone.exit_code == 1 and "cannot be read (FileNotFoundError)" in gone.stderr


@pytest.mark.parametrize(
    "change", [{"expires": "tomorrow"}, {"issued": "2020-01-01"}, {"tls_keys": 3}, {"operator": None}]
)
def test_what_is_no_statement_is_not_read(change: dict[str, Any]) -> None:
    good = Statement("o", "m", "c", "w", "1", ("k",), "none", "2026-01-01T00:00Z", "2026-02-01T00:00Z")
    values = {**json.loads(good.signed(Ed25519PrivateKey.generate()).partition(b"\n")[0]), "of-a-later-version": 1}
    assert Statement.of(json.dumps(values).encode()) == good
    values |= change
    for data in (json.dumps({k: v for k, v in values.items() if v is not None}), "[]", "", "\xff"):
        with pytest.raises(ConfigError, match="this is no statement of a trunk's operator"):
            Statement.of(data.encode("latin-1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--key": "trunk.key"}, "is no operator's private key"),
        ({"--key": "nothing"}, "is no operator's private key"),
        ({"--cert": "ca.key"}, "is no certificate"),
        ({"--cert": ""}, "a statement names the trunk's TLS keys"),
    ],
)
def test_what_cannot_be_signed_is_said(
    keys: Path, checkpoint: Callable[[str], Path], change: dict[str, str], message: str
) -> None:
    make_operator_key(keys / "operator")
    options = {"--key": "operator", "--cert": "trunk.crt", **change}
    words = ["trunk", "statement", "sign", "--operator", "x", "--log-policy", "y", "--out", str(keys / "out")]
    words += ["--set", f"model.name={checkpoint('llama')}"]
    words += [word for key, name in options.items() if name for word in (key, str(keys / name))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and message in done.stderr and not (keys / "out").exists()
