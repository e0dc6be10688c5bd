"""`fl-split trunk ...`: a real process that serves, is looked at, drains and exits 0; and the token verbs."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from typer.testing import CliRunner

from fl_split import wire
from fl_split.cli import app
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.tools.certificates import make_authority, make_server_certificate
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.server import TrunkServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("fl_split")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """`fl-split trunk serve` with its log."""

    def __init__(self, *args: str, ranks: int = 1) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        flags = [f"server.port={self.port}", f"metrics.port={self.metrics_port}", "model.threads=1", *args]
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port", str(free_port())]
        run = [sys.executable, *(torchrun if ranks > 1 else ()), "-m", "fl_split.cli"]
        command = [*run, "trunk", "serve", *(f"--set={flag}" for flag in flags)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_ready(self) -> None:
        for _ in range(3600):  # on a busy machine imports alone take a minute
            if any("ready at" in line for line in self.lines):
                return
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        raise TimeoutError(self.lines)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def serve(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*args: str, ranks: int = 1) -> Process:
        started.append(Process(f"model.name={checkpoint('llama')}", *args, ranks=ranks))
        return started[-1]

    yield start
    for process in started:
        process.end()


def test_a_served_trunk_is_seen_used_and_drained(
    checkpoint: Callable[[str], Path], serve: Callable[..., Process], tmp_path: Path
) -> None:
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    code, token, _ = run("trunk", "token", "add", "clinic-a", "--tokens", tokens)
    assert code == 0
    mine.write_text(token)
    trunk = serve(f"security.tokens={tokens}")
    trunk.wait_ready()
    address = f"127.0.0.1:{trunk.port}"

    assert re.match(r"SERVING in [\d.]+ ms", run("trunk", "ping", address)[1])
    code, _, error = run("trunk", "describe", address)
    assert code == 1 and "UNAUTHENTICATED" in error
    code, text, _ = run("trunk", "describe", address, "--token-file", mine, "--json")
    about = json.loads(text)
    assert code == 0 and about["layers"] == "2-3"
    assert (about["dtype"], about["quantization"], about["exact-gradient"], about["surrogate"]) == (
        "float32",
        "none",
        False,
        "none",
    )

    expected = Expected.from_checkpoint(checkpoint("llama"), 2, 2)
    with TrunkConnection(address, expected, timeout_s=10, credentials=Credentials(token_file=str(mine))) as client:
        client.start(torch.ones(1, 4, 32), None, None).result()
        url = f"http://127.0.0.1:{trunk.metrics_port}/metrics"
        code, text, _ = run("trunk", "top", url, "--once", "--interval-s", "0.1")
        assert code == 0 and "clinic-a" in text and "ready" in text
    with grpc.insecure_channel(address) as channel:
        terminated = threading.Event()

        def message() -> Iterator[bytes]:
            terminated.wait(5)
            packed = wire.pack_batch(torch.ones(1, 4, 32), None, None)
            yield wire.encode_request(packed, pb.BFLOAT16).SerializeToString()

        bearer = (("authorization", f"Bearer {token.strip()}"),)
        call = channel.stream_unary(f"/{wire.SERVICE}/Forward").future(message(), timeout=10, metadata=bearer)
        time.sleep(0.3)  # the call is open, its message is still to come
        trunk.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        terminated.set()
        assert len(call.result()) > 4 * 32 * 2
        assert trunk.process.wait(10) == 0
    trunk.end()
    events = [json.loads(line) for line in trunk.lines if line.startswith("{")]
    messages = [event["message"] for event in events]
    assert messages.index("draining for up to 30 s") < messages.index("stopped")
    assert messages[-2:] == ["call", "stopped"]  # the open call was finished first
    assert {"clinic-a", "unknown"} == {event["institution"] for event in events if event["message"] == "call"}
    assert token.strip() not in "".join(trunk.lines)


@pytest.mark.slow
def test_one_trunk_over_two_processes_equals_one_over_one(
    checkpoint: Callable[[str], Path], serve: Callable[..., Process], held_locally: LocalTrunk
) -> None:
    trunk = serve("model.tensor-parallel=true", ranks=2)
    trunk.wait_ready()
    expected = Expected.from_checkpoint(checkpoint("llama"), 2, 2)
    hidden_states = torch.randn(3, 9, 32)
    mask = (torch.arange(9)[None] < torch.tensor([9, 2, 5])[:, None]).long()
    with TrunkConnection(f"127.0.0.1:{trunk.port}", expected, wire_dtype="float32", timeout_s=20) as client:
        for attention_mask in (None, mask, mask.flip(1)):
            out = client.start(hidden_states, attention_mask, None).result()
            alone = held_locally.start(hidden_states, attention_mask, None).result()
            real = torch.ones(3, 9, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            torch.testing.assert_close(out[real], alone[real], rtol=1e-4, atol=1e-4)
    pid = trunk.process.pid
    for rank in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(rank), signal.SIGTERM)  # torchrun itself exits with 1 after a SIGTERM, whatever its processes do
    assert trunk.process.wait(30) == 0
    assert "stopped" in trunk.lines[-1] or any('"stopped"' in line for line in trunk.lines)


@pytest.fixture
def held_locally(checkpoint: Callable[[str], Path]) -> LocalTrunk:
    return LocalTrunk(load_trunk(checkpoint("llama"), 2, 2))


def test_tensor_parallelism_needs_torchrun(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    code, _, error = run("trunk", "serve", "--model", checkpoint("llama"), "--set", "model.tensor-parallel=true")
    assert code == 1 and "model.tensor-parallel=true needs several processes" in error


def test_serve_says_what_is_wrong_with_its_configuration(tmp_path: Path) -> None:
    code, _, error = run("trunk", "serve", "--host", "0.0.0.0")
    assert code == 1 and "beyond loopback" in error
    code, _, error = run("trunk", "serve", "--model", tmp_path, "--set", "log.level=warning")
    assert code == 1 and "no config.json" in error
    code, _, error = run("trunk", "serve", "--config", tmp_path / "missing.toml")
    assert code == 1 and "cannot be read as TOML" in error


def test_metrics_of_a_second_replica_take_a_free_port(serve: Callable[..., Process]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        trunk = serve(f"metrics.port={port}")
        trunk.wait_ready()
    (warning,) = (line for line in trunk.lines if f"metrics.port={port} is in use" in line)
    (where,) = (line for line in trunk.lines if "metrics at http" in line)
    assert f":{port}/" not in where


def test_serve_says_when_its_port_is_taken(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = (f"--set=server.port={taken.getsockname()[1]}", "--set=metrics.enabled=false")
        code, _, error = run("trunk", "serve", "--model", checkpoint("llama"), *flags)
    assert code == 1 and f"server.port={flags[0].rpartition('=')[2]}, or metrics.host" in error
    assert "Address already in use" in error and "choose another port, stop what listens there" in error
    assert "loaded layers" not in error


@pytest.mark.parametrize("what", ["tokens", "cert", "key"])
def test_serve_finds_what_is_missing_before_it_loads_a_model(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fl_split.trunk.process.hold_configured", load)
    make_authority(tmp_path)
    make_server_certificate(tmp_path, "trunk", ["localhost"])
    files = {"cert": tmp_path / "trunk.crt", "key": tmp_path / "trunk.key", what: tmp_path / "nothing"}
    sets = [f"--set=security.{name}={file}" for name, file in files.items()]
    code, _, error = run("trunk", "serve", *sets, "--set=server.port=0")
    assert code == 1 and f"{tmp_path / 'nothing'}" in error and "trunk.crt" not in error


def test_serve_says_which_key_does_not_fit(tmp_path: Path) -> None:
    make_authority(tmp_path)
    pairs = [make_server_certificate(tmp_path, name, ["localhost"]) for name in ("trunk", "other")]
    cert, key = pairs[0][0], pairs[1][1]
    code, _, error = run("trunk", "serve", f"--set=security.cert={cert}", f"--set=security.key={key}")
    assert code == 1 and f"{key} is not the key of {cert}" in error


def test_serve_fails_when_it_can_serve_no_more(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TrunkServer, jobs: list[Any], seconds: float) -> None:
        raise ZeroDivisionError("tensor([0.123")

    monkeypatch.setattr(TrunkServer, "_count_batch", broken)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    port, expected = free_port(), Expected.from_checkpoint(checkpoint("llama"), 2, 2)

    def ask() -> None:
        with TrunkConnection(f"127.0.0.1:{port}", expected, timeout_s=30) as client:
            client.start(torch.ones(1, 2, 32), None, None).result()

    asking = threading.Thread(target=ask)
    asking.start()
    flags = (f"--set=server.port={port}", "--set=metrics.enabled=false")
    code, _, error = run("trunk", "serve", "--model", checkpoint("llama"), *flags)
    asking.join()
    assert code == 1 and "can serve no more (ZeroDivisionError" in error and "0.123" not in error


def test_describe_ping_and_top_say_when_nobody_answers() -> None:
    for verb in ("describe", "ping"):
        code, _, error = run("trunk", verb, "127.0.0.1:9", "--timeout-s", "0.5")
        assert code == 1 and "no trunk answers at 127.0.0.1:9 (UNAVAILABLE): nothing listens on this port" in error
    for url in ("http://127.0.0.1:9/metrics", "file:///etc/hostname"):
        code, _, error = run("trunk", "top", url, "--once")
        assert code == 1 and "no metrics at" in error


def test_token_verbs(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    code, token, _ = run("trunk", "token", "add", "clinic-a", "--tokens", file, "--days", "30")
    assert code == 0 and token.startswith("fls_")
    code, text, _ = run("trunk", "token", "list", "--tokens", file)
    assert code == 0 and "clinic-a" in text and token.strip() not in text
    assert run("trunk", "token", "revoke", "clinic-a", "--tokens", file)[:2] == (0, "revoked 1\n")
    code, _, error = run("trunk", "token", "revoke", "clinic-a", "--tokens", file)
    assert code == 1 and "no institution 'clinic-a'" in error


def test_example_configuration_holds_every_key_with_its_default() -> None:
    file = ROOT / "configs" / "trunk.toml"
    values = tomllib.loads(file.read_text())
    assert {s: set(keys) for s, keys in values.items()} == {
        s: set(keys) for s, keys in TrunkConfig().model_dump(by_alias=True).items()
    }
    assert TrunkConfig.load(file) == TrunkConfig()


def test_docs_name_every_key_with_its_default_and_meaning() -> None:
    docs = (ROOT / "docs" / "trunk.md").read_text()
    for section, keys in TrunkConfig().model_dump(by_alias=True).items():
        fields = type(getattr(TrunkConfig(), section)).model_fields
        for field in fields.values():
            value = keys[field.alias]
            shown = f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "(empty)"
            row = f"| `{section}.{field.alias}` | {shown} | {field.description} |"
            assert row in docs, f"docs/trunk.md lacks the row {row}"


def test_dashboard_asks_for_metrics_that_there_are() -> None:
    from prometheus_client import generate_latest

    from fl_split.trunk.metrics import TrunkMetrics

    known = set(re.findall(r"# TYPE (\w+)", generate_latest(TrunkMetrics().registry).decode()))
    dashboard = json.loads((ROOT / "configs" / "grafana-trunk.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for t in panel["targets"]
        for name in re.findall(r"fl_split_\w+", t["expr"])
    }
    assert len(asked) >= 10
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= known
