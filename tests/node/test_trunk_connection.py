"""The node's side: large requests cut, refusals obeyed, replicas taken in turns, and no lost step when one dies."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fl_split import wire
from fl_split.address import split_address
from fl_split.config import Lora
from fl_split.errors import ConfigError, TrunkMismatch, TrunkRefused, TrunkUnavailable, WireError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.slots import Trunk
from fl_split.model.trunk import LocalTrunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers, trunk_id
from fl_split.trunk.padding import run_packed

HIDDEN = 32


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def held(folder: Path) -> HeldLayers:
    return hold_layers(folder, 2, 2)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    return Expected.from_checkpoint(folder, 2, 2)


Answer = Callable[[pb.ForwardRequest, grpc.ServicerContext], pb.ForwardReply]


@contextmanager
def fake_trunk(held: HeldLayers, answer: Answer, port: int = 0, **about: Any) -> Iterator[tuple[str, list[str]]]:
    """A trunk whose Forward is `answer`; yields its address and the methods called."""
    calls: list[str] = []
    description = held.describe(TrunkConfig().limits)
    description.MergeFrom(pb.DescribeReply(**about))

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]

            def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
                calls.append(method)
                if method == "Describe":
                    return description.SerializeToString()
                return answer(pb.ForwardRequest.FromString(message), context).SerializeToString()

            return grpc.unary_unary_rpc_method_handler(handle)

    fake = grpc.server(ThreadPoolExecutor(8), (Handler(),), options=[("grpc.so_reuseport", 0)])
    bound = fake.add_insecure_port(f"127.0.0.1:{port}")
    fake.start()
    try:
        yield f"127.0.0.1:{bound}", calls
    finally:
        fake.stop(0).wait()


def echo(held: HeldLayers) -> Answer:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        return pb.ForwardReply(
            dtype=request.dtype, hidden_states=request.hidden_states, trunk_id=held.identity.trunk_id
        )

    return answer


# ------------------------------------------------------------------------------------------------- large requests


@pytest.mark.parametrize("padded", [False, True])
def test_large_requests_are_cut_by_sequences(held: HeldLayers, expected: Expected, padded: bool) -> None:
    hidden_states = torch.randn(7, 20, HIDDEN)
    mask = (torch.arange(20)[None] < torch.tensor([20, 3, 18, 20, 1, 9, 20])[:, None]).long() if padded else None
    sizes: list[int] = []

    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        sizes.append(sum(request.lengths))
        return echo(held)(request, context)

    with (
        fake_trunk(held, answer, max_tokens=45) as (address, _),
        TrunkConnection(address, expected, wire_dtype="float32") as client,
    ):
        out = client.start(hidden_states, mask, None).result()
    assert max(sizes) <= 45 and len(sizes) >= 3
    real = mask.bool() if mask is not None else torch.ones(7, 20, dtype=torch.bool)
    assert torch.equal(out[real], hidden_states[real])
    assert client.bytes_sent > int(real.sum()) * HIDDEN * 4


def test_messages_stay_below_what_grpc_takes_by_default(held: HeldLayers, expected: Expected) -> None:
    sizes: list[int] = []

    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        sizes.append(request.ByteSize())
        return echo(held)(request, context)

    hidden_states = torch.randn(900, 60, HIDDEN)  # 6.9 MB in float32
    with fake_trunk(held, answer, max_tokens=10**6) as (address, _):
        with TrunkConnection(address, expected, wire_dtype="float32") as client:
            assert torch.equal(client.start(hidden_states, None, None).result(), hidden_states)
    assert len(sizes) == 3 and max(sizes) < 4 * 2**20


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_refusal_with_a_time_is_obeyed(held: HeldLayers, expected: Expected) -> None:
    times: list[float] = []

    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        times.append(time.monotonic())
        if len(times) < 3:
            context.set_trailing_metadata(((wire.PUSHBACK, "200"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        return echo(held)(request, context)

    with fake_trunk(held, answer) as (address, calls), TrunkConnection(address, expected) as client:
        client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        assert client.num_retries == 2
    assert all(0.2 <= later - before < 0.6 for before, later in zip(times, times[1:], strict=False))
    assert calls.count("Describe") == 1  # it is the same trunk: no need to check it again


def test_an_overloaded_trunk_is_an_error_within_the_time_limit(held: HeldLayers, expected: Expected) -> None:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        context.set_trailing_metadata(((wire.PUSHBACK, "100"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        raise RuntimeError

    with fake_trunk(held, answer) as (address, _), TrunkConnection(address, expected, timeout_s=0.5) as client:
        started = time.monotonic()
        with pytest.raises(TrunkUnavailable, match=r"had no room for trunk\.timeout-s=0\.5: it is overloaded"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_other_refusals_are_final(held: HeldLayers, expected: Expected, code: grpc.StatusCode) -> None:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        context.abort(code, "no")
        raise RuntimeError

    with fake_trunk(held, answer) as (address, calls), TrunkConnection(address, expected) as client:
        with pytest.raises(TrunkRefused, match=rf"refused call [0-9a-f]{{32}} \({code.name}\): no"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
    assert calls == ["Describe", "Forward"]


def test_an_answer_that_does_not_come_is_an_error(held: HeldLayers, expected: Expected) -> None:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        time.sleep(0.6)
        return echo(held)(request, context)

    with fake_trunk(held, answer) as (address, _), TrunkConnection(address, expected, timeout_s=0.3) as client:
        with pytest.raises(TrunkUnavailable, match=r"did not answer within trunk\.timeout-s=0\.3"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()


def test_a_reply_that_does_not_fit_is_an_error(held: HeldLayers, expected: Expected) -> None:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        return pb.ForwardReply(dtype=request.dtype, hidden_states=b"12", trunk_id=held.identity.trunk_id)

    with fake_trunk(held, answer) as (address, _), TrunkConnection(address, expected) as client:
        with pytest.raises(WireError, match="sent a bad reply: hidden_states has 2 bytes"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()


# ----------------------------------------------------------------------------------------------- the right trunk


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"first_layer": 1}, "holds layers 1 to 3, this node needs 2 to 3"),
        ({"config_digest": "f" * 64}, "serves another model"),
        ({"weights_digest": "f" * 64}, "has other weights"),
    ],
)
def test_another_trunk_is_refused(held: HeldLayers, expected: Expected, about: dict[str, Any], message: str) -> None:
    with fake_trunk(held, echo(held), **about) as (address, _), TrunkConnection(address, expected) as client:
        with pytest.raises(TrunkMismatch, match=message):
            client.connect()


def test_a_dtype_the_trunk_does_not_speak_is_refused(held: HeldLayers, expected: Expected) -> None:
    about = held.describe(TrunkConfig().limits)
    del about.dtypes[:]
    about.dtypes.append(pb.FLOAT32)
    with pytest.raises(TrunkMismatch, match=r"does not take trunk\.wire-dtype='int8': it takes float32"):
        expected.check(about, "x", pb.INT8)


def test_a_reply_from_a_trunk_that_was_not_checked_is_not_used(held: HeldLayers, expected: Expected) -> None:
    """Behind one name there may be several trunks: whoever answers Forward may not be who answered Describe."""
    others = iter([b"x" * 16, b"y" * 16])

    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        reply = echo(held)(request, context)
        reply.trunk_id = next(others, reply.trunk_id)
        return reply

    with fake_trunk(held, answer) as (address, calls), TrunkConnection(address, expected) as client:
        client.start(torch.ones(1, 2, HIDDEN), None, None).result()
    assert calls == ["Describe", "Forward"] * 3


def test_a_trunk_whose_replies_are_always_another_s_is_an_error(held: HeldLayers, expected: Expected) -> None:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        return pb.ForwardReply(dtype=request.dtype, hidden_states=request.hidden_states, trunk_id=b"x" * 16)

    with fake_trunk(held, answer) as (address, calls), TrunkConnection(address, expected, timeout_s=20) as client:
        with pytest.raises(TrunkMismatch, match="come from another trunk than the one that answered Describe"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        assert client.num_retries == calls.count("Forward") - 1 == 3


def test_replicas_of_different_trunks_do_not_mix(held: HeldLayers, expected: Expected) -> None:
    blind = replace(expected, weights_digest=None)  # as of a node that has only its own part of the checkpoint
    with fake_trunk(held, echo(held)) as (first, _), fake_trunk(held, echo(held), trunk_id=b"y" * 16) as (second, _):
        with TrunkConnection(f"{first},{second}", blind, timeout_s=5) as client:
            client.connect()
            with pytest.raises(TrunkMismatch, match=f"{second} is another one .*: start all replicas with the same"):
                client.start(torch.ones(1, 2, HIDDEN), None, None).result()


def test_a_trunk_of_another_precision_is_another_trunk(folder: Path, held: HeldLayers) -> None:
    narrow = hold_layers(folder, 2, 2, torch.bfloat16).identity
    assert (narrow.compute_dtype, held.identity.compute_dtype) == ("bfloat16", "float32")
    assert narrow.weights_digest == held.identity.weights_digest and narrow.trunk_id != held.identity.trunk_id
    assert narrow.trunk_id != trunk_id(pb.DescribeReply(quantization="torchao-int8", **_fields(narrow)))
    assert narrow.trunk_id == trunk_id(pb.DescribeReply(**_fields(narrow)))


def _fields(about: pb.DescribeReply) -> dict[str, Any]:
    names = ("config_digest", "weights_digest", "first_layer", "end_layer", "compute_dtype")
    return {name: getattr(about, name) for name in names}


# ------------------------------------------------------------------------------------------------------- replicas


def test_a_replica_lost_while_a_request_is_packed_costs_nothing(
    held: HeldLayers, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call may be lost at any moment between the check and the cut."""
    pack = wire.pack_batch
    with fake_trunk(held, echo(held), max_tokens=4) as (address, calls), TrunkConnection(address, expected) as client:
        client.connect()

        def lose(*args: Any) -> Any:
            client._put_off(client._replicas.pick(), _Lost(), 0.0)
            return pack(*args)

        monkeypatch.setattr(wire, "pack_batch", lose)
        client.start(torch.ones(2, 4, HIDDEN), None, None).result()
    assert calls.count("Forward") == 2  # cut at the size that was last known


class _Lost(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


def test_a_replica_that_hangs_does_not_lose_the_call(held: HeldLayers, expected: Expected) -> None:
    hang = threading.Event()

    def never(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        hang.wait(20)
        return echo(held)(request, context)

    with fake_trunk(held, never) as (first, calls), fake_trunk(held, echo(held)) as (second, _):
        with TrunkConnection(f"{first},{second}", expected, timeout_s=2) as client:
            started = time.monotonic()
            for _ in range(6):
                client.start(torch.ones(1, 2, HIDDEN), None, None).result()
            assert 0.9 < time.monotonic() - started < 1.9  # one share of the time, once
        hang.set()
    assert calls.count("Forward") == 1


def test_replicas_are_taken_in_turns(held: HeldLayers, expected: Expected) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(fake_trunk(held, echo(held))) for _ in range(3)]
        client = stack.enter_context(TrunkConnection(", ".join(address for address, _ in replicas), expected))
        for _ in range(9):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        assert all(2 <= calls.count("Forward") <= 4 for _, calls in replicas)
        assert all(calls.count("Describe") == 1 for _, calls in replicas)


def test_a_full_replica_is_left_alone_while_another_has_room(held: HeldLayers, expected: Expected) -> None:
    def full(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        context.set_trailing_metadata(((wire.PUSHBACK, "5000"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        raise RuntimeError

    with fake_trunk(held, full) as (first, calls), fake_trunk(held, echo(held)) as (second, others):
        with TrunkConnection(f"{first},{second}", expected) as client:
            started = time.monotonic()
            for _ in range(6):
                client.start(torch.ones(1, 2, HIDDEN), None, None).result()
            assert time.monotonic() - started < 2
    assert calls.count("Forward") == 1
    assert others.count("Forward") == 6


def test_one_dead_replica_of_two_costs_nothing(held: HeldLayers, expected: Expected) -> None:
    with server.embedded(held) as address, TrunkConnection(f"127.0.0.1:9,{address}", expected, timeout_s=5) as client:
        started = time.monotonic()
        for _ in range(4):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        assert time.monotonic() - started < 2


def test_calls_in_flight_survive_replicas_that_come_and_go(held: HeldLayers, expected: Expected) -> None:
    """Two replicas stop and start under load, never both at once: every answer comes, and is right."""
    inputs = [torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    ports: list[int] = []
    with ExitStack() as stack:
        stacks = [stack.enter_context(ExitStack()) for _ in range(2)]
        for inner in stacks:
            ports.append(int(inner.enter_context(server.embedded(held)).rpartition(":")[2]))
        address = ",".join(f"127.0.0.1:{port}" for port in ports)
        client = stack.enter_context(TrunkConnection(address, expected, wire_dtype="float32", timeout_s=20))
        stop = threading.Event()

        def churn() -> None:
            turn = 0
            while not stop.is_set():
                stacks[turn % 2].close()
                time.sleep(0.05)
                stacks[turn % 2].enter_context(server.embedded(held, ports[turn % 2]))
                time.sleep(0.3)
                turn += 1

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for hidden_states in inputs:
                futures = [client.start(hidden_states, None, None) for _ in range(3)]
                local = LocalTrunk(held.model).start(hidden_states, None, None).result()
                for future in futures:
                    torch.testing.assert_close(future.result(), local, rtol=1e-4, atol=1e-4)
                time.sleep(0.01)
        finally:
            stop.set()
            thread.join()


def test_a_replica_that_dies_in_mid_step_changes_nothing(folder: Path, held: HeldLayers, expected: Expected) -> None:
    """One of two replicas goes while it computes: loss and gradients of the step are those of a trunk in here."""
    ids = torch.randint(3, 99, (6, 2, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    dying, asked = threading.Event(), itertools.count(1)

    def compute(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        packed = wire.decode_request(request, wire.CallLimits(HIDDEN, 8192, 64))
        [rows], _ = run_packed(held.run, [packed], causal=True)
        return wire.encode_reply(rows, request.dtype, held.identity.trunk_id)

    def compute_until_death(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        if next(asked) == 2:
            dying.set()
            time.sleep(0.3)
        return compute(request, context)

    def step(trunk: Trunk) -> tuple[float, list[torch.Tensor]]:
        model = adapters.attach(load_ends(folder, 2, 2, trunk), Lora(), train_bottom=True, seed=0)
        loss = accumulate(model, batches, 3)
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    with ExitStack() as stack, ThreadPoolExecutor(1) as killer:
        mortal = stack.enter_context(ExitStack())
        first, calls = mortal.enter_context(fake_trunk(held, compute_until_death))
        second, others = stack.enter_context(fake_trunk(held, compute))
        killed = killer.submit(lambda: dying.wait(10) and mortal.close())
        with TrunkConnection(f"{first},{second}", expected, wire_dtype="float32", timeout_s=20) as client:
            loss, gradients = step(client)
            assert client.num_retries >= 1
        killed.result()
    assert calls.count("Forward") >= 2 and others.count("Forward") >= 4
    right_loss, right_gradients = step(LocalTrunk(held.model))
    assert loss == pytest.approx(right_loss, rel=1e-6)
    torch.testing.assert_close(gradients, right_gradients, rtol=1e-4, atol=1e-6)


def test_a_replica_that_serves_something_else_is_an_error(folder: Path, held: HeldLayers, expected: Expected) -> None:
    other = hold_layers(folder, 1, 2)
    with server.embedded(held) as first, server.embedded(other) as second:
        with TrunkConnection(f"{first},{second}", expected, timeout_s=5) as client:
            futures = [client.start(torch.ones(1, 2, HIDDEN), None, None) for _ in range(2)]
            with pytest.raises(TrunkMismatch, match=f"{second} holds layers 1 to 3"):
                [future.result() for future in futures]


def test_one_dns_name_reaches_a_trunk(held: HeldLayers, expected: Expected) -> None:
    with server.embedded(held) as address:
        port = address.rpartition(":")[2]
        for name in (f"localhost:{port}", f"dns:///localhost:{port}"):
            with TrunkConnection(name, expected, timeout_s=10) as client:
                assert client.start(torch.ones(1, 2, HIDDEN), None, None).result().shape == (1, 2, HIDDEN)


@pytest.mark.parametrize("address", ["", " , ", "trunk", "a:1,b", "a:0", "a:99999", ":5", "a:port"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"trunk\.address"):
        split_address(address)


def test_addresses_are_cut_at_commas() -> None:
    assert split_address("a:1, [::1]:2,dns:///b:3") == ["a:1", "[::1]:2", "dns:///b:3"]
