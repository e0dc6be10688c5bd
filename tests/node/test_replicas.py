"""Several replicas of a trunk: taken in turns, left alone while they rest, and no lost step when one dies."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from fake_trunk import echo, fake_trunk

from fl_split import wire
from fl_split.address import split_address
from fl_split.config import Lora
from fl_split.errors import ConfigError, TrunkMismatch, TrunkUnavailable
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.slots import Trunk
from fl_split.model.trunk import LocalTrunk
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials, description_of
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.padding import run_packed

HIDDEN = 32


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Expected:
    return Expected.from_checkpoint(checkpoint("llama"), 2, 2)


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


def test_replicas_that_all_hang_share_the_time_to_its_end(held: HeldLayers, expected: Expected) -> None:
    hang, given = threading.Event(), []

    def never(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        given.append(context.time_remaining())
        hang.wait(20)
        return echo(held)(request, context)

    with ExitStack() as stack:
        replicas = [stack.enter_context(fake_trunk(held, never)) for _ in range(2)]
        client = stack.enter_context(
            TrunkConnection(",".join(address for address, _ in replicas), expected, timeout_s=3)
        )
        with pytest.raises(TrunkUnavailable, match=r"did not answer within trunk\.timeout-s=3"):
            client.start(torch.ones(1, 2, HIDDEN), None, None).result()
        hang.set()
    assert [calls.count("Forward") for _, calls in replicas] == [1, 1]
    assert given == pytest.approx([1.5, 1.5], abs=0.4)  # half for the first, and all that is left for the second


def test_the_description_is_of_whoever_answers(held: HeldLayers) -> None:
    with fake_trunk(held, echo(held)) as (address, calls):
        about = description_of(f"127.0.0.1:1,{address}", Credentials(), 4)
        assert (about.first_layer, about.end_layer) == (held.identity.first_layer, held.identity.end_layer)
    assert calls == ["Describe"]
    with pytest.raises(TrunkUnavailable, match=r"no trunk answers at 127\.0\.0\.1:2 \(UNAVAILABLE\): nothing listens"):
        description_of("127.0.0.1:1,127.0.0.1:2", Credentials(), 4)


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


def test_a_replica_that_dies_in_mid_step_changes_nothing(
    checkpoint: Callable[[str], Path], held: HeldLayers, expected: Expected
) -> None:
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
        model = adapters.attach(load_ends(checkpoint("llama"), 2, 2, trunk), Lora(), train_bottom=True, seed=0)
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


def test_a_replica_that_serves_something_else_is_an_error(
    checkpoint: Callable[[str], Path], held: HeldLayers, expected: Expected
) -> None:
    other = hold_layers(checkpoint("llama"), 1, 2)
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


def test_an_address_of_the_web_is_none() -> None:
    with pytest.raises(ConfigError, match="expected host:port without https://: it is no web page"):
        split_address("https://trunk.example.org:9470")


def test_addresses_are_cut_at_commas() -> None:
    assert split_address("a:1, [::1]:2,dns:///b:3") == ["a:1", "[::1]:2", "dns:///b:3"]
