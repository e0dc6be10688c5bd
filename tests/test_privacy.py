"""Nothing private leaves a node: every byte to the trunk and every reply to the server is looked at."""

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import run_app
from torch import Tensor
from transformers import AutoTokenizer

from fl_split import wire
from fl_split.config import NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import load_examples
from fl_split.model import adapters
from fl_split.model.slots import TrunkCalls
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.layers import hold_layers

Sent = list[tuple[str, bytes]]
run_once = partial(run_app, **{"num-server-rounds": 1})  # type: ignore[arg-type]


@contextmanager
def tapped_trunk(folder: Path, sent: Sent) -> Iterator[str]:
    """A trunk behind a proxy that passes raw bytes on and notes what a node sends; yields the proxy's address."""
    with server.embedded(hold_layers(folder, 2, 2)) as behind:
        channel = grpc.insecure_channel(behind)

        class Tap(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                call = channel.unary_unary(details.method)

                def handle(request: bytes, context: Any) -> bytes:
                    sent.append((details.method, request))
                    sent.extend((f"metadata {m.key}", str(m.value).encode()) for m in context.invocation_metadata())
                    reply: bytes = call(request)
                    return reply

                return grpc.unary_unary_rpc_method_handler(handle)

        tap = grpc.server(ThreadPoolExecutor(2), (Tap(),))
        port = tap.add_insecure_port("127.0.0.1:0")
        tap.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            tap.stop(0).wait()
            channel.close()


@pytest.mark.parametrize("kind", ["blocks", "streamed"])
def test_only_hidden_states_reach_the_trunk(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sent: Sent = []
    outputs: list[Tensor] = []  # of the last bottom layer, packed as on the wire
    start = TrunkCalls.start

    def spy(self: TrunkCalls, hidden_states: Tensor, training: bool) -> None:
        if isinstance(self.trunk, TrunkConnection):  # not the check on random tokens, which asks no trunk
            outputs.append(wire.pack(hidden_states, self._thread.context[0])[0])
        start(self, hidden_states, training)

    monkeypatch.setattr(TrunkCalls, "start", spy)
    with tapped_trunk(demo_model, sent) as address:
        run_once(tmp_path, **{"trunk.address": address, "trunk.in-flight": 1, "surrogate.kind": kind})

    tokens = private_tokens(demo_model)
    requests = [message for method, message in sent if method.endswith("/Forward")]
    assert len(requests) == len(outputs) > 4
    for message, output in zip(requests, outputs, strict=True):
        request = pb.ForwardRequest.FromString(message)
        rest = len(message) - len(request.hidden_states)
        assert rest <= 16 + 2 * len(request.lengths)  # a few bytes of lengths: room for nothing else
        assert not request.positions
        rows = wire.decode_rows(request.hidden_states, request.dtype, [], sum(request.lengths), output.shape[-1])
        assert torch.equal(rows, output.detach().to(torch.bfloat16))
        assert not any(ids in message for ids in tokens)
    others = {method for method, _ in sent if not method.endswith("/Forward")}
    assert others <= {
        "/fl_split.Trunk/Describe",
        "metadata user-agent",
        "metadata grpc-accept-encoding",
        "metadata x-request-id",
    }
    assert all(message == b"" for method, message in sent if method.endswith("/Describe"))


def test_two_trunks_of_a_run_in_shares_get_hidden_states_and_noise(
    demo_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"surrogate.kind": "shares", "trunk.share-address": "embedded", "surrogate.mask-std": 100.0}
    grid = run_once(tmp_path, **keys)
    assert [set(m.content["config"]) for m in grid.instructions] == [
        {"run-name", "run-id", "trunk-address", "share-address", "server-round", "run-config"}
    ] * 2
    places = {(m.content["config"]["trunk-address"], m.content["config"]["share-address"]) for m in grid.instructions}
    ((first, second),) = places
    assert first != second
    for reply in grid.replies.values():
        sequences = 4 * RunConfig().train.batch_size  # of two steps
        bits = reply.content["metrics"]["share-leak-bits"]
        assert 0 < bits < 1.05 * sequences * 0.7214 / 100**2
    assert "only while the two operators do not collude" in caplog.text
    assert "in which nothing is hidden" in caplog.text


def private_tokens(folder: Path) -> list[bytes]:
    """Runs of four token ids of every private example, in the encodings that a leak would likely have."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    config = RunConfig.from_flat({"data.max-length": 48})
    found = []
    for partition in range(2):
        node = NodeConfig(partition_id=partition, num_partitions=2)
        examples = load_examples(config.data, node, tokenizer, 0)
        for example in (*examples.train, *examples.heldout):
            ids = example["input_ids"][1:5]
            found += [struct.pack(f"<4{form}", *ids) for form in "qif"]
    return found


@pytest.mark.parametrize("share", ["none", "bottom", "top", "both"])
def test_replies_hold_the_shared_names_and_numbers_only(demo_model: Path, tmp_path: Path, share: str) -> None:
    grid = run_once(tmp_path, **{"aggregation.share": share})
    assert len(grid.replies) == 2
    assert [set(m.content["config"]) for m in grid.instructions] == [
        {"run-name", "run-id", "run-config", "trunk-address", "server-round"}
    ] * 2
    for reply in grid.replies.values():
        assert set(reply.content) == {"arrays", "metrics", "node"}
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in reply.content["arrays"]}
        assert layers == {"none": set(), "bottom": {0, 1}, "top": {6, 7}, "both": {0, 1, 6, 7}}[share]
        assert all(isinstance(value, int | float) for value in reply.content["metrics"].values())
        assert set(reply.content["node"]) == {"adapter", "scaling"}


def test_nothing_sends_adapter_weights_but_shared_state(demo_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapters, "shared_state", lambda *args: {})
    grid = run_once(tmp_path, **{"aggregation.share": "both"})
    assert all(len(reply.content["arrays"]) == 0 for reply in grid.replies.values())


def test_a_failing_nodes_words_hold_nothing_private(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("patient Zanzibar")

    monkeypatch.setattr("fl_split.node.ready.load_examples", fail)
    with pytest.raises(Exception, match="RuntimeError on the node") as error:
        run_once(tmp_path)
    assert "Zanzibar" not in str(error.value)


def test_tap_sees_what_it_should(demo_model: Path) -> None:
    """The capture itself works: a token sent as a position would be found."""
    sent: Sent = []
    with tapped_trunk(demo_model, sent) as address, grpc.insecure_channel(address) as channel:
        request = pb.ForwardRequest(dtype=pb.FLOAT32, lengths=[1], positions=[7], hidden_states=b"")
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(f"/{wire.SERVICE}/Forward")(request.SerializeToString())
    assert pb.ForwardRequest.FromString(sent[0][1]).positions == [7]
