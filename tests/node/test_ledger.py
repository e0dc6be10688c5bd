"""The ledger holds every byte that left the node, in a chain that shows what was changed, and survives kills."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_app
from test_privacy import Sent, tapped_trunk
from typer.testing import CliRunner

from fl_split import demo, wire
from fl_split.cli import app
from fl_split.config import NodeConfig
from fl_split.errors import NodeStateError
from fl_split.node.ledger import NAME, Ledger, NotingChannel, read_ledger, say_passes
from fl_split.node.metrics import given_away
from fl_split.proto import trunk_pb2 as pb


def filled(folder: Path, count: int = 4) -> Path:
    ledger = Ledger(folder / NAME, 1)
    for i in range(count):
        ledger.note("server", "metrics", 10 + i)
    return folder / NAME


def forward(dtype: str, rows: torch.Tensor, lengths: list[int]) -> bytes:
    return wire.encode_request(wire.Packed(rows, lengths, None), wire.NAMES[dtype]).SerializeToString()


def test_every_byte_of_a_run_is_in_the_ledger(demo_model: Path, tmp_path: Path) -> None:
    sent: Sent = []
    with tapped_trunk(demo_model, sent) as address:
        grid = run_app(tmp_path, **{"trunk.address": address, "aggregation.share": "both"})
    told: dict[tuple[str, str], int] = {}
    for i in (0, 1):
        sums = read_ledger(tmp_path / "x" / "nodes" / str(i) / NAME)
        assert sums.rounds == {1, 2} and sums.torn == 0
        for (to, kind), size in sums.bytes.items():
            told[to.split()[0], kind] = told.get((to.split()[0], kind), 0) + size
    captured = {kind: sum(len(m) for name, m in sent if name.endswith(end)) for kind, end in
                (("hidden-states", "/Forward"), ("question", "/Describe"))}  # fmt: skip
    assert captured["hidden-states"] > 10_000
    assert {kind: size for (to, kind), size in told.items() if to == "trunk"} == captured
    for kind, record in (("shared-adapter", "arrays"), ("metrics", "metrics"), ("node", "node")):
        size = sum(reply.content[record].count_bytes() for reply in grid.replies.values())  # type: ignore[union-attr]
        assert told["server", kind] == size > 0


def test_a_frozen_bottom_sends_each_example_once(demo_model: Path, tmp_path: Path) -> None:
    run_app(tmp_path, **{"surrogate.kind": "none", "train.steps": 40})
    sums = read_ledger(tmp_path / "x" / "nodes" / "0" / NAME)
    assert sums.repeated == 0 < sums.sequences <= sums.examples
    assert "0 of the sequences were sent before" in say_passes(sums)


def test_repeated_sequences_are_counted(tmp_path: Path) -> None:
    rows, ledger = torch.randn(5, 8), Ledger(tmp_path / NAME, 1)
    ledger.note("", "begin", 0, examples=2)
    ledger.call("a:1", "/fl_split.Trunk/Forward", forward("bfloat16", rows, [2, 3]))
    ledger.call("a:1", "/fl_split.Trunk/Forward", forward("bfloat16", rows[2:], [3]))
    pull = pb.PullRequest(forward=pb.ForwardRequest.FromString(forward("bfloat16", rows[:2], [2])))
    ledger.call("a:1", "/fl_split.ExactGradient/Pull", pull.SerializeToString())
    sums = read_ledger(tmp_path / NAME)
    assert (sums.sequences, sums.repeated, sums.examples, sums.passes) == (4, 2, 2, 2.0)
    assert sums.calls["trunk a:1", "hidden-states-and-gradient"] == 1
    ledger.call("a:1", "/fl_split.Trunk/Forward", forward("int8", rows, [2, 3]))
    assert say_passes(read_ledger(tmp_path / NAME)).endswith("3.0 times each, on average")


def test_an_error_that_goes_to_the_server_is_in_it(demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="node"):
        run_app(tmp_path, **{"trunk.address": "127.0.0.1:1", "trunk.timeout-s": 0.5})
    sums = read_ledger(tmp_path / "x" / "nodes" / "0" / NAME)
    assert sums.bytes["server", "error"] > 20
    assert not any(kind == "hidden-states" for _, kind in sums.bytes)


@pytest.mark.parametrize("change", ["edit", "drop", "swap", "junk", "number"])
def test_a_changed_ledger_is_found_out(tmp_path: Path, change: str) -> None:
    file = filled(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[1])
    new = {
        "edit": [lines[0], lines[1].replace(b'"bytes": 11', b'"bytes": 10'), *lines[2:]],
        "drop": [lines[0], *lines[2:]],
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "junk": [lines[0], b"[]\n", *lines[2:]],
        "number": [lines[0], json.dumps({**entry, "n": 7}).encode() + b"\n", *lines[2:]],
    }[change]
    file.write_bytes(b"".join(new))
    with pytest.raises(NodeStateError, match="line 2 (does not follow|is no line)"):
        read_ledger(file)
    done = CliRunner().invoke(app, ["ledger", "verify", str(file)])
    assert done.exit_code == 1 and "line 2" in done.stderr


def test_a_kept_hash_shows_missing_lines(tmp_path: Path) -> None:
    file = filled(tmp_path)
    head = read_ledger(file).head
    Ledger(tmp_path / NAME, 2).note("server", "metrics", 1)
    assert read_ledger(file, head).calls["server", "metrics"] == 5
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    read_ledger(file)
    with pytest.raises(NodeStateError, match="has no line with the hash"):
        read_ledger(file, head)


def test_a_torn_line_is_dropped_and_said_and_the_chain_goes_on(tmp_path: Path) -> None:
    file = filled(tmp_path)
    with file.open("ab") as torn:
        torn.write(b'{"n": 5, "time": "20')
    assert read_ledger(file).calls["server", "metrics"] == 4
    Ledger(tmp_path / NAME, 2).note("server", "metrics", 99)
    sums = read_ledger(file)
    assert (sums.torn, sums.calls["server", "metrics"], sums.bytes["server", "metrics"]) == (1, 5, 46 + 99)


def test_kills_leave_a_chain(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fl_split.node.ledger import Ledger\n"
        f"ledger = Ledger(Path({str(tmp_path / NAME)!r}), 1)\n"
        "while True: ledger.note('server', 'metrics', 1); print('x', flush=True)"
    )
    seen = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        seen += sum(1 for _, line in zip(range(50), process.stdout, strict=False) if line)
        os.kill(process.pid, signal.SIGKILL)
        seen += len(process.stdout.readlines())
        process.wait()
        process.stdout.close()
    assert read_ledger(tmp_path / NAME).calls["server", "metrics"] >= seen >= 100


def test_threads_and_two_writers_make_one_chain(tmp_path: Path) -> None:
    both = [Ledger(tmp_path / NAME, 1), Ledger(tmp_path / NAME, 1)]
    for _ in range(3):
        for ledger in both:  # one after another, as a node's round and its reply do
            threads = [threading.Thread(target=partial(ledger.note, "server", "metrics", 1)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert read_ledger(tmp_path / NAME).calls["server", "metrics"] == 48


def test_processes_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fl_split.node.ledger import Ledger\n"
        f"ledger = Ledger(Path({str(tmp_path / NAME)!r}))\n"
        "for _ in range(60): ledger.note('trunk t:1', 'generation', 1)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert read_ledger(tmp_path / NAME).calls["trunk t:1", "generation"] == 180


def test_what_cannot_be_written_down_is_not_sent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / NAME, 1)
    (tmp_path / NAME).mkdir()
    sent: list[bytes] = []

    class Channel:
        def unary_unary(self, method: str, **options: Any) -> Any:
            assert options == {"response_deserializer": None}
            return lambda request, **given: sent.append(request)

        def stream_stream(self, method: str, **options: Any) -> Any:
            return lambda requests, **given: sent.extend(requests)

    channel = NotingChannel(Channel(), "a:1", ledger.call)  # type: ignore[arg-type]
    for way, given in ((channel.unary_unary, b"x"), (channel.stream_stream, [b"x"])):
        call = way("/fl_split.Trunk/Decode", request_serializer=lambda x: x, response_deserializer=None)
        with pytest.raises(NodeStateError, match="cannot be written .*not written down is not sent"):
            call(given)
    assert sent == []
    (tmp_path / NAME).rmdir()
    call(given)
    assert sent == [b"x"]
    assert read_ledger(tmp_path / NAME).bytes == {("trunk a:1", "generation"): 1}


def test_show_and_verify(tmp_path: Path) -> None:
    file = filled(tmp_path)
    shown = CliRunner().invoke(app, ["ledger", "show", str(file)]).output
    assert CliRunner().invoke(app, ["ledger", "show", str(file.parent)]).output == shown
    assert "server" in shown and "metrics" in shown and "46" in shown
    (line,) = CliRunner().invoke(app, ["ledger", "show", "--json", str(file)]).output.splitlines()
    assert json.loads(line) == {"to": "server", "kind": "metrics", "messages": 4, "bytes": 46}
    done = CliRunner().invoke(app, ["ledger", "verify", str(file)])
    assert done.exit_code == 0 and read_ledger(file).head in done.output
    with pytest.raises(NodeStateError, match="cannot be read"):
        read_ledger(tmp_path / "none")
    Ledger(file).note("", "trunk-shown", 0, trunk="t:1", evidence="e", **{"tls-key": "ab" * 32})
    shown = CliRunner().invoke(app, ["ledger", "show", str(file)]).output
    assert "the trunk at t:1 has shown its evidence, for the TLS key abababababababab\n" in shown


NUMBERS = {
    "partition-id": 1,
    "weight": 7,
    "num-examples": 7,
    "bad-rows": 0,
    "train-loss": 2.0,
    "heldout-loss-after": 3.0,
    "activation-bytes": 4,
}


def withheld(node: NodeConfig, num_heldout: int = 10) -> set[str]:
    given = given_away(NUMBERS, num_heldout, node)
    assert given.keys() == NUMBERS.keys()
    assert all(given[key] == NUMBERS[key] for key in NUMBERS if key != "weight" and not math.isnan(given[key]))
    return {key for key, value in given.items() if math.isnan(value)}


def test_only_allowed_metrics_leave() -> None:
    assert withheld(NodeConfig()) == set()
    allowed = NodeConfig(metrics_allow="heldout-*, train-loss")
    assert withheld(allowed) == {"num-examples", "bad-rows", "activation-bytes"}


def test_small_counts_are_withheld_and_a_weight_is_rounded_up() -> None:
    node = NodeConfig(metrics_least=10)
    assert withheld(node) == {"num-examples"}
    assert withheld(node, num_heldout=9) == {"num-examples", "heldout-loss-after"}
    assert given_away(NUMBERS, 10, node)["weight"] == 10
    assert given_away({**NUMBERS, "weight": 1}, 10, node)["weight"] == 1
    assert given_away(NUMBERS, 10, NodeConfig(metrics_least=5))["weight"] == 7


def test_a_run_goes_on_with_metrics_withheld_and_no_path_leaves(demo_model: Path, tmp_path: Path) -> None:
    data = str(demo.data_folder() / "hospital-north.jsonl")
    own = {
        "data-path": data,
        "out-dir": str(tmp_path / "own"),
        "metrics-allow": "heldout-loss-after",
        "metrics-least": 100_000,
    }
    grid = run_app(tmp_path, node_config=[own])
    replies = [reply for reply in grid.replies.values() if reply.content["metrics"]["partition-id"] == 0]
    assert len(replies) == 2
    for reply in replies:
        numbers = dict(reply.content["metrics"])
        assert {key for key, value in numbers.items() if not math.isnan(float(value))} == {"partition-id", "weight"}  # type: ignore[arg-type]
        assert reply.content["node"]["adapter"] == "<out-dir>/x/adapter"
    assert (tmp_path / "own" / "x" / "adapter" / "adapter_model.safetensors").is_file()
    assert str(tmp_path / "own") not in (tmp_path / "x" / "metrics.jsonl").read_text()
