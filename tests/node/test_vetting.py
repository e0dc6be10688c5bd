"""Whoever runs the trunk shows who it is before it gets hidden states, bound to the TLS key that gets them."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import run_app
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from fake_trunk import echo
from typer.testing import CliRunner

from fl_split import attestation, demo, wire
from fl_split.attestation import Statement
from fl_split.cli import app
from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import ConfigError, FLSplitError, RoundFailed, TrunkRefused, TrunkUnavailable
from fl_split.node.build import connect_shares
from fl_split.node.expected import Expected
from fl_split.node.ledger import NAME, Ledger, read_ledger
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.tools.certificates import make_authority, make_server_certificate
from fl_split.tools.statement import make_statement
from fl_split.trunk.config import TrunkConfig, TrunkModel
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.server import embedded

HIDDEN = 32
ROWS = torch.ones(1, 2, HIDDEN)

QUOTE = """
import hashlib, hmac, os, sys
secret, log = sys.argv[1:]
open(log, "a").write(os.environ["FL_SPLIT_NONCE"] + "\\n")
over = (os.environ["FL_SPLIT_NONCE"] + os.environ["FL_SPLIT_TLS_KEY"]).encode()
print(hmac.new(secret.encode(), over, hashlib.sha256).hexdigest(), end="")
"""
JUDGE = """
import hashlib, hmac, os, sys
over = (os.environ["FL_SPLIT_NONCE"] + os.environ["FL_SPLIT_TLS_KEY"]).encode()
if sys.stdin.read() != hmac.new(sys.argv[1].encode(), over, hashlib.sha256).hexdigest():
    sys.exit("the quote is of another key, nonce or machine")
"""


@dataclass(frozen=True)
class World:
    """Keys and certificates of an operator, and a test's machines: who knows the secret is genuine hardware."""

    folder: Path
    operator: Ed25519PrivateKey
    statement: Statement
    expected: Expected
    held: HeldLayers

    def security(self, name: str = "a", **more: str) -> dict[str, str]:
        return {"cert": str(self.folder / f"{name}.crt"), "key": str(self.folder / f"{name}.key"), **more}

    def signed(self, signer: Ed25519PrivateKey | None = None, **changes: Any) -> str:
        file = self.folder / "statement"
        file.write_bytes(replace(self.statement, **changes).signed(signer or self.operator))
        return str(file)

    @property
    def quote(self) -> str:
        return f"{sys.executable} -S {self.folder / 'quote.py'} 'a secret' {self.folder / 'nonces'}"

    @property
    def verifier(self) -> str:
        return f"{sys.executable} -S {self.folder / 'judge.py'} 'a secret'"

    @contextmanager
    def trunk(self, name: str = "a", port: int = 0, **security: str) -> Iterator[str]:
        config = TrunkConfig.model_validate({"security": self.security(name, **security)})
        with embedded(self.held, port, config) as address:
            yield address

    @contextmanager
    def impostor(
        self, name: str, describe: Callable[[bytes], bytes] | None = None, port: int = 0
    ) -> Iterator[tuple[str, list[str]]]:
        """A server with a certificate of the same authority that answers all; yields its address and what it got."""
        got: list[str] = []

        class Handler(grpc.GenericRpcHandler):
            def service(inner, details: Any) -> Any:  # noqa: N805
                def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
                    got.append(details.method.rpartition("/")[2])
                    if got[-1] == "Describe":
                        about = self.held.describe(TrunkConfig().limits)
                        return describe(message) if describe else about.SerializeToString()
                    return echo(self.held)(pb.ForwardRequest.FromString(message), context).SerializeToString()

                return grpc.unary_unary_rpc_method_handler(handle)

        fake = grpc.server(ThreadPoolExecutor(8), (Handler(),), options=[("grpc.so_reuseport", 0)])
        pair = (self.folder / f"{name}.key").read_bytes(), (self.folder / f"{name}.crt").read_bytes()
        bound = fake.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
        fake.start()
        try:
            yield f"127.0.0.1:{bound}", got
        finally:
            fake.stop(0).wait()

    def credentials(self, *, statement: bool = False, evidence: bool = False, **more: str) -> Credentials:
        asked = {
            "operator_key": str(self.folder / "operator.pub") if statement else "",
            "verifier": self.verifier if evidence else "",
        }
        return Credentials(ca=str(self.folder / "ca.crt"), **{**asked, **more})

    def connect(self, address: str, timeout_s: float = 20, **asked: Any) -> TrunkConnection:
        ledger = Ledger(self.folder / NAME)
        return TrunkConnection(
            address, self.expected, timeout_s=timeout_s, credentials=self.credentials(**asked), ledger=ledger
        )

    @property
    def sent(self) -> set[str]:
        """Kinds of messages that left."""
        return {kind for _, kind in read_ledger(self.folder / NAME).bytes}


@pytest.fixture
def world(tmp_path: Path, checkpoint: Callable[[str], Path], held: HeldLayers) -> World:
    make_authority(tmp_path)
    for name in "ab":
        make_server_certificate(tmp_path, name, [])
    (tmp_path / "quote.py").write_text(QUOTE)
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "nonces").touch()
    operator = Ed25519PrivateKey.generate()
    (tmp_path / "operator.pub").write_bytes(
        operator.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    model = TrunkModel(name=str(checkpoint("llama")))
    statement = make_statement(model, [tmp_path / "a.crt"], "Example Ltd", "counts, for 30 days", 1)
    return World(tmp_path, operator, statement, Expected.from_checkpoint(checkpoint("llama"), 2, 2), held)


# ------------------------------------------------------------------------------------------------------ statements


def test_a_signed_statement_is_checked_and_kept_in_the_ledger(world: World) -> None:
    with world.trunk(statement=world.signed()) as address, world.connect(address, statement=True) as client:
        client.start(ROWS, None, None).result()
    shown = read_ledger(world.folder / NAME).shown[address]
    assert shown["tls-key"] == world.statement.tls_keys[0]
    assert Statement.of(shown["statement"].encode()) == world.statement
    first = (world.folder / NAME).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in first] == ["question", "trunk-shown", "hidden-states"]


LATER = (datetime.now(UTC) + timedelta(days=1)).isoformat()
BEFORE = (datetime.now(UTC) - timedelta(days=1)).isoformat()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"issued": "2020-01-01T00:00:00+00:00", "expires": BEFORE},
            "holds from 2020-01-01.*the operator signs",
        ),
        ({"issued": LATER, "expires": "2099-01-01T00:00:00+00:00"}, "if the clock is right"),
        ({"weights_digest": "0" * 64}, "of another model or version than the trunk at"),
        ({"config_digest": "0" * 64}, "of another model or version than the trunk at"),
        ({"version": "0.0.0"}, "of another model or version than the trunk at"),
        ({"tls_keys": ("0" * 64,)}, "does not name the TLS key of the trunk at"),
        ({"signer": Ed25519PrivateKey.generate()}, "is not signed by the operator's key that was given"),
    ],
)
def test_a_statement_that_does_not_hold_is_refused(world: World, changes: dict[str, Any], message: str) -> None:
    data = Path(world.signed(**changes)).read_bytes()

    def describe(message: bytes) -> bytes:
        about = world.held.describe(TrunkConfig().limits)
        about.statement = data
        return about.SerializeToString()

    with world.impostor("a", describe) as (address, got), world.connect(address, statement=True) as client:
        with pytest.raises(TrunkRefused, match=message):
            client.start(ROWS, None, None).result()
    assert got == ["Describe"] and world.sent == {"question"}


def test_a_statement_that_was_changed_or_is_missing_is_refused(world: World) -> None:
    data = Path(world.signed()).read_bytes()
    for shown, message in (
        (data.replace(b"counts, for 30 days", b"nothing"), "is not signed by the operator's key"),
        (data.partition(b"\n")[0], "is not signed by the operator's key"),
        (data.replace(b"\n", b"\n!", 1), "is not signed by the operator's key"),
        (b"hello", "this is no statement of a trunk's operator"),
        (b"", "shows no statement of its operator, which trunk-operator-key asks for"),
    ):

        def describe(message: bytes, shown: bytes = shown) -> bytes:
            about = world.held.describe(TrunkConfig().limits)
            about.statement = shown
            return about.SerializeToString()

        with world.impostor("a", describe) as (address, got), world.connect(address, statement=True) as client:
            with pytest.raises(TrunkRefused, match=message):
                client.connect()
        assert got == ["Describe"]


def test_another_machine_cannot_show_the_statement(world: World) -> None:
    """It has a certificate of the same authority, and passes on what the genuine trunk shows."""
    with world.trunk(statement=world.signed(), evidence_command=world.quote) as genuine, relay(world, genuine) as there:
        with world.connect(there[0], statement=True) as client:
            with pytest.raises(TrunkRefused, match="whoever answers there shows another's statement"):
                client.start(ROWS, None, None).result()
        assert there[1] == ["Describe"]


@contextmanager
def relay(world: World, genuine: str) -> Iterator[tuple[str, list[str]]]:
    """A machine with a certificate of its own that asks the genuine trunk what it is asked, nonce and all."""
    root = grpc.ssl_channel_credentials((world.folder / "ca.crt").read_bytes())
    with grpc.secure_channel(genuine, root) as channel:
        ask = channel.unary_unary(f"/{wire.SERVICE}/Describe")
        with world.impostor("b", lambda message: ask(message, timeout=10)) as found:  # type: ignore[no-any-return]
            yield found


# -------------------------------------------------------------------------------------------------------- evidence


def test_evidence_is_judged_over_a_fresh_nonce_before_anything_is_sent(world: World) -> None:
    with world.trunk(evidence_command=world.quote) as address:
        for _ in range(2):
            with world.connect(address, evidence=True) as client:
                client.start(ROWS, None, None).result()
    nonces = (world.folder / "nonces").read_text().split()
    assert len(nonces) == len(set(nonces)) == 2 and {len(nonce) for nonce in nonces} == {64}
    lines = [json.loads(line) for line in (world.folder / NAME).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["question", "trunk-shown", "hidden-states"] * 2
    assert lines[1]["verifier"] == world.verifier and len(lines[1]["evidence"]) == 64


def test_without_a_verifier_no_evidence_is_asked_for(world: World) -> None:
    with world.trunk(evidence_command=world.quote) as address, world.connect(address) as client:
        client.connect()
    assert (world.folder / "nonces").read_text() == ""
    assert read_ledger(world.folder / NAME).shown == {}


def test_evidence_of_another_machine_is_refused(world: World) -> None:
    with world.trunk(evidence_command=world.quote) as genuine, relay(world, genuine) as (address, got):
        with world.connect(address, evidence=True) as client:
            with pytest.raises(TrunkRefused, match=r"does not accept the evidence of the trunk at .* \(exit code 1\)"):
                client.start(ROWS, None, None).result()
        assert got == ["Describe"] and world.sent == {"question"}


def test_no_evidence_is_refused(world: World) -> None:
    with world.trunk() as address, world.connect(address, evidence=True) as client:
        with pytest.raises(TrunkRefused, match="shows no evidence of its machine, which trunk-verifier asks for"):
            client.start(ROWS, None, None).result()
    assert world.sent == {"question"}


def test_a_verifier_that_does_not_end_accepts_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.trunk(evidence_command=world.quote) as address:
        with world.connect(address, verifier=f"{sys.executable} -S -c 'import time; time.sleep(60)'") as client:
            monkeypatch.setattr(attestation, "COMMAND_S", 1.0)
            with pytest.raises(TrunkRefused, match=r"trunk-verifier came to no end \(TimeoutExpired\)"):
                client.start(ROWS, None, None).result()
    assert world.sent == {"question"}


def test_what_a_verifier_says_stays_in_the_nodes_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with world.trunk(evidence_command=world.quote.replace("a secret", "another")) as address:
        with world.connect(address, evidence=True) as client, pytest.raises(TrunkRefused) as error:
            client.connect()
    assert "another key, nonce or machine" in caplog.text and "another key" not in str(error.value)


def test_a_verifier_is_run_without_a_shell(world: World, tmp_path: Path) -> None:
    with world.trunk(evidence_command=world.quote) as address:
        with world.connect(address, verifier=f"{world.verifier} ; touch {tmp_path / 'made'}") as client:
            client.connect()  # the rest are arguments
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------------------------------- replicas, failover


@pytest.mark.parametrize("asked", ["statement", "evidence"])
def test_a_second_replica_that_shows_nothing_gets_nothing(world: World, asked: str) -> None:
    with (
        world.trunk(statement=world.signed(), evidence_command=world.quote) as good,
        world.impostor("b") as (bad, got),
        world.connect(f"{good},{bad}", **{asked: True}) as client,
    ):
        with pytest.raises(TrunkRefused, match=f"the trunk at {bad} shows no {asked}"):
            for _ in range(4):
                client.start(ROWS, None, None).result()
    assert "Describe" in got and set(got) == {"Describe"}


def test_both_replicas_are_verified_each_with_its_own_key(world: World) -> None:
    with (
        world.trunk("a", evidence_command=world.quote) as first,
        world.trunk("b", evidence_command=world.quote) as second,
        world.connect(f"{first},{second}", evidence=True) as client,
    ):
        for _ in range(4):
            client.start(ROWS, None, None).result()
    shown = read_ledger(world.folder / NAME).shown
    assert len({shown[address]["tls-key"] for address in (first, second)}) == 2


@pytest.mark.parametrize("asked", ["statement", "evidence"])
def test_another_trunk_on_the_same_port_gets_nothing(world: World, asked: str) -> None:
    shows = {"statement": world.signed(), "evidence_command": world.quote}
    with world.trunk(**shows) as address:
        client = world.connect(address, timeout_s=10, **{asked: True})
        client.start(ROWS, None, None).result()
    port = int(address.rpartition(":")[2])
    with client, world.impostor("b", port=port) as (_, got):
        results: list[BaseException | None] = []

        def ask() -> None:
            try:
                results.append(client.start(ROWS, None, None).exception())
            except FLSplitError as error:
                results.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6 and all(isinstance(error, TrunkRefused | TrunkUnavailable) for error in results)
        assert any(isinstance(error, TrunkRefused) for error in results)
    assert set(got) == {"Describe"}


def test_a_connection_that_grpc_makes_anew_goes_to_no_other_key(world: World) -> None:
    """Unseen by its user, a channel connects again: a call then meets whoever is there, without an error before."""
    with world.trunk(evidence_command=world.quote) as address:
        client = world.connect(address, timeout_s=5, evidence=True)
        client.start(ROWS, None, None).result()
    port = int(address.rpartition(":")[2])
    with client, world.impostor("b", port=port) as (_, got):
        ready = threading.Event()
        (replica,) = client._replicas._all
        replica.channel.subscribe(lambda state: state is grpc.ChannelConnectivity.READY and ready.set(), True)
        assert not ready.wait(4)  # gRPC tries again every 2 s
        with pytest.raises(TrunkRefused, match="shows no evidence"):
            client.start(ROWS, None, None).result()
    assert set(got) == {"Describe"}


def test_a_trunk_shows_itself_again_after_a_lost_call(world: World) -> None:
    with world.trunk(evidence_command=world.quote) as address:
        client = world.connect(address, evidence=True)
        client.start(ROWS, None, None).result()
    port = int(address.rpartition(":")[2])
    client.timeout_s, wanted = 0.2, client.timeout_s
    with pytest.raises(TrunkUnavailable):
        client.start(ROWS, None, None).result()
    client.timeout_s = wanted
    with world.trunk(port=port, evidence_command=world.quote), client:
        client.start(ROWS, None, None).result()
    assert len((world.folder / "nonces").read_text().split()) == 2


def test_a_trunk_with_a_new_certificate_is_met_anew(world: World) -> None:
    with world.trunk(evidence_command=world.quote) as address:
        client = world.connect(address, evidence=True)
        client.start(ROWS, None, None).result()
    port = int(address.rpartition(":")[2])
    with world.trunk("b", port=port, evidence_command=world.quote), client:
        client.start(ROWS, None, None).result()
    keys = [json.loads(line).get("tls-key") for line in (world.folder / NAME).read_text().splitlines()]
    assert len({key for key in keys if key}) == 2


# ----------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("asked", [{"operator_key": "k"}, {"verifier": "true"}])
def test_without_tls_it_is_refused_by_name(expected: Expected, asked: dict[str, str]) -> None:
    for address, plain in (("127.0.0.1:1", False), ("trunk.example.org:1", True)):
        with pytest.raises(ConfigError, match=f"the trunk at {address} would be reached without TLS.*trunk-verifier"):
            TrunkConnection(address, expected, credentials=Credentials(allow_plaintext=plain, **asked))


@pytest.fixture
def expected(checkpoint: Callable[[str], Path]) -> Expected:
    return Expected.from_checkpoint(checkpoint("llama"), 2, 2)


@pytest.mark.parametrize("constraint", [True, None])
def test_a_certificate_that_may_sign_others_binds_nothing(world: World, constraint: bool | None) -> None:
    """As of those who make a self-signed one by hand."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = builder.add_extension(hosts, critical=False)
    if constraint:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    own = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    (world.folder / "ca.crt").write_bytes(own)
    (world.folder / "b.crt").write_bytes(own)
    (world.folder / "b.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with world.impostor("b") as (address, got), world.connect(address, statement=True) as client:
        with pytest.raises(TrunkRefused, match="may sign others .no basic constraint CA:FALSE"):
            client.connect()
    assert got == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"verifier": "/no/such/program x"}, "trunk-verifier='/no/such/program x': there is no such program"),
        ({"verifier": "x 'y"}, "trunk-verifier=.* is no command"),
        ({"operator_key": "/no/key"}, "trunk-operator-key='/no/key' is no operator's public key"),
        ({"operator_key": "CA"}, "is no operator's public key"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_sent(world: World, asked: dict[str, str], message: str) -> None:
    values = {key: str(world.folder / "ca.crt") if value == "CA" else value for key, value in asked.items()}
    with pytest.raises(ConfigError, match=message):
        world.connect("127.0.0.1:1", **values)


def test_a_second_trunk_has_to_show_as_much_as_the_first(world: World, tmp_path: Path) -> None:
    node = NodeConfig(trunk_ca="x", trunk_verifier="true", allow_gradient_shares=True)
    run = RunConfig.from_flat(
        {"surrogate.kind": "shares", "trunk.address": "a.example:1", "trunk.share-address": "b.example:1"}
    )
    with ExitStack() as stack, pytest.raises(ConfigError, match="only one of them has to show who runs it"):
        connect_shares(run, node, tmp_path, ("a.example:1", "b.example:1"), stack)


# ------------------------------------------------------------------------------------------------ a run, and after it


def test_a_run_and_its_questions_go_to_a_trunk_that_shows_what_was_asked_for(
    demo_model: Path, world: World, tmp_path: Path
) -> None:
    served = replace(world, held=hold_layers(demo_model, 2, 2))
    shows = make_statement(TrunkModel(), [tmp_path / "a.crt"], "Example Ltd", "counts", 1)
    (tmp_path / "statement").write_bytes(shows.signed(world.operator))
    own = {"trunk-ca": str(tmp_path / "ca.crt"), "trunk-operator-key": str(tmp_path / "operator.pub")}
    own |= {"trunk-verifier": world.verifier, "data-path": str(demo.data_folder() / "hospital-north.jsonl")}
    with served.trunk(statement=str(tmp_path / "statement"), evidence_command=world.quote) as address:
        keys = {"trunk.address": address, "num-server-rounds": 1}
        run_app(tmp_path, node_config=[own, own], **keys)
        node = tmp_path / "x" / "nodes" / "0"
        assert read_ledger(node / NAME).shown[address].keys() >= {"statement", "evidence"}
        (tmp_path / "in").write_text('{"question": "What is asthma?"}\n')
        words = ["generate", node / "adapter", address, "--in", tmp_path / "in", "--out", tmp_path / "out"]
        words += ["--max-tokens", 2, "--ca", own["trunk-ca"], "--operator-key", own["trunk-operator-key"]]
        words += ["--ledger", tmp_path / "asked"]
        good = CliRunner().invoke(app, [str(w) for w in [*words, "--verifier", world.verifier]])
        assert good.exit_code == 0, good.output
        assert read_ledger(tmp_path / "asked").shown[address].keys() >= {"statement", "evidence"}
        (tmp_path / "asked").unlink()
        bad = CliRunner().invoke(app, [str(w) for w in [*words, "--verifier", world.verifier + "x"]])
        assert bad.exit_code == 1 and "does not accept the evidence" in bad.stderr
        assert {kind for _, kind in read_ledger(tmp_path / "asked").bytes} == {"question"}
        own["trunk-verifier"] += "x"
        with pytest.raises(RoundFailed, match="does not accept the evidence"):
            run_app(tmp_path, "y", node_config=[own, own], **keys)
    left = {kind for _, kind in read_ledger(tmp_path / "y" / "nodes" / "0" / NAME).bytes}
    assert left == {"question", "error"}
