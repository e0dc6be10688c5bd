"""The service over loopback: equal to a trunk in this process, warm, and closed to whoever does harm."""

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health as health_names
from grpc_health.v1 import health_pb2
from torch import Tensor
from trunk_service import HIDDEN, forward, refused, request, serving

from fl_split import wire
from fl_split.config import Lora
from fl_split.errors import TrunkError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers

_Code = grpc.StatusCode


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "int8"])
def test_remote_equals_local(checkpoint: Callable[[str], Path], family: str, wire_dtype: str) -> None:
    torch.manual_seed(0)
    held = hold_layers(checkpoint(family), 2, 2)
    hidden_states = torch.randn(3, 10, HIDDEN)
    mask = (torch.arange(10)[None] < torch.tensor([10, 4, 7])[:, None]).long()
    left = mask.flip(1)
    expected = Expected.from_checkpoint(checkpoint(family), 2, 2)
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05}[wire_dtype]
    with server.embedded(held) as address, TrunkConnection(address, expected, wire_dtype=wire_dtype) as client:
        for attention_mask in (None, mask, left):
            remote = client.start(hidden_states, attention_mask, None).result()
            local = LocalTrunk(held.model).start(hidden_states, attention_mask, None).result()
            real = attention_mask.bool() if attention_mask is not None else torch.ones(3, 10, dtype=torch.bool)
            assert (remote[real] - local[real]).norm() < tolerance * local[real].norm()


def test_many_callers_at_once_get_what_each_would_get_alone(held: HeldLayers) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1 + i % 3, 3 + i % 7, HIDDEN, generator=generator) for i in range(40)]
    with serving(held) as channel, ThreadPoolExecutor(8) as threads:
        call = forward(channel)

        def ask(hidden_states: Tensor) -> Tensor:
            message = wire.encode_request(wire.pack_batch(hidden_states, None, None), pb.FLOAT32)
            reply = call(message.SerializeToString(), timeout=30)
            return wire.decode_reply(reply, message, HIDDEN).view(hidden_states.shape)

        for hidden_states, out in zip(inputs, threads.map(ask, inputs), strict=True):
            alone = LocalTrunk(held.model).start(hidden_states, None, None).result()
            torch.testing.assert_close(out, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("batching", [False, True])
def test_calls_in_flight_change_nothing(checkpoint: Callable[[str], Path], held: HeldLayers, batching: bool) -> None:
    """Bit for bit if each call runs alone, else up to the rounding of another batch size."""
    folder, sizes = checkpoint("llama"), set[int]()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(8):
        ids = torch.randint(3, 99, (2, 9) if i % 2 else (1, 30), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})

    class Slow(HeldLayers):
        def run(self, hidden_states: Tensor, *args: Any) -> Tensor:
            time.sleep(0.1)  # so that calls meet
            sizes.add(len(hidden_states))
            return super().run(hidden_states, *args)

    def step(in_flight: int) -> tuple[float, list[Tensor]]:
        client = load_ends(folder, 2, 2, trunk, surrogate="blocks", surrogate_layers=1)
        model = adapters.attach(client, Lora(), train_bottom=True, seed=0)
        model.train()
        torch.manual_seed(1)
        loss = accumulate(model, batches, in_flight)
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    slow, config = Slow(held.model, held.identity, held.causal), {"batching": {"enabled": batching}}
    expected = Expected.from_checkpoint(folder, 2, 2)
    with server.embedded(slow, config=TrunkConfig.model_validate(config)) as address:
        with TrunkConnection(address, expected, wire_dtype="float32", in_flight=8) as trunk:
            loss, gradients = step(1)
            sizes.clear()
            loss_in_flight, gradients_in_flight = step(8)
    assert (max(sizes) > 2) == batching
    tolerance = 1e-4 if batching else 0.0
    assert loss_in_flight == pytest.approx(loss, rel=tolerance, abs=0)
    for a, b in zip(gradients_in_flight, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_a_server_warms_up_what_it_may_run(held: HeldLayers) -> None:
    forms: list[tuple[int, bool, bool]] = []

    class Watched(HeldLayers):
        def run(self, hidden_states: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
            forms.append((len(hidden_states), mask is not None, positions is not None))
            return super().run(hidden_states, mask, positions)

    with serving(Watched(held.model, held.identity, held.causal)):
        assert forms == [(1, False, False), (2, False, False), (1, True, True)]


def test_exact_gradients_are_cut_as_calls_are(checkpoint: Callable[[str], Path], held: HeldLayers) -> None:
    torch.manual_seed(0)
    hidden_states, gradient = torch.randn(5, 8, HIDDEN), torch.randn(5, 8, HIDDEN)
    mask = (torch.arange(8)[None] < torch.tensor([8, 3, 7, 8, 1])[:, None]).long()
    gradient *= mask[..., None]
    expected = Expected.from_checkpoint(checkpoint("llama"), 2, 2)
    sections = {"server": {"exact-gradient": True}, "limits": {"max-tokens": 16}}
    with server.embedded(held, config=TrunkConfig.model_validate(sections)) as address:
        with TrunkConnection(address, expected, wire_dtype="float32") as client:
            pulled = client.vjp(hidden_states, mask, None, gradient)
    right = LocalTrunk(held.model).vjp(hidden_states, mask, None, gradient)
    torch.testing.assert_close(pulled[mask.bool()], right[mask.bool()], rtol=1e-4, atol=1e-5)


def test_unknown_methods_are_unimplemented(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"/{wire.SERVICE}/Train")(b"", timeout=5)
    assert error.value.code() is _Code.UNIMPLEMENTED


def test_raw_bytes_and_a_flood_of_connections_do_no_harm(held: HeldLayers) -> None:
    with server.embedded(held, config=TrunkConfig.model_validate({"limits": {"connections": 20}})) as address:
        host, _, port = address.partition(":")
        sockets = []
        for i in range(60):
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"][i % 3])
            sockets.append(connection)
        for connection in sockets:
            connection.close()
        with grpc.insecure_channel(address) as channel:
            assert forward(channel)(request(), timeout=10, wait_for_ready=True)


def own_channel(address: str) -> grpc.Channel:
    """A channel with a connection of its own."""
    return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


def test_one_connection_more_than_there_may_be_is_refused(held: HeldLayers) -> None:
    with server.embedded(held, config=TrunkConfig.model_validate({"limits": {"connections": 3}})) as address:
        with ExitStack() as stack:
            first = [stack.enter_context(own_channel(address)) for _ in range(3)]
            for channel in first:
                assert forward(channel)(request(), timeout=10)
            with own_channel(address) as fourth:
                assert refused(fourth, request()).code() is _Code.UNAVAILABLE
                for channel in first:
                    assert forward(channel)(request(), timeout=10)
                first[0].close()
                assert forward(fourth)(request(), timeout=20, wait_for_ready=True)


def test_idle_connections_are_closed_and_make_room(held: HeldLayers) -> None:
    limits = {"connections": 2, "idle-s": 1.0}
    with server.embedded(held, config=TrunkConfig.model_validate({"limits": limits})) as address, ExitStack() as stack:
        for channel in [stack.enter_context(own_channel(address)) for _ in range(2)]:
            grpc.channel_ready_future(channel).result(5)  # a whole HTTP/2 connection, and nothing after
        with own_channel(address) as late:
            assert forward(late)(request(), timeout=20, wait_for_ready=True)


@pytest.mark.slow
def test_connections_that_say_nothing_are_closed_and_make_room(held: HeldLayers) -> None:
    with server.embedded(held, config=TrunkConfig.model_validate({"limits": {"connections": 20}})) as address:
        host, _, port = address.partition(":")
        silent = [socket.create_connection((host, int(port)), timeout=5) for _ in range(30)]
        with grpc.insecure_channel(address) as channel:
            assert forward(channel)(request(), timeout=60, wait_for_ready=True)
        for connection in silent:
            connection.close()


def test_a_trunk_that_can_serve_no_more_says_so_and_ends(held: HeldLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: server.TrunkServer, jobs: list[Any], seconds: float) -> None:
        raise ZeroDivisionError("tensor([0.123")

    async def main() -> None:
        monkeypatch.setattr(server.TrunkServer, "_count_batch", broken)
        trunk = server.TrunkServer(held, TrunkConfig.model_validate({"server": {"port": 0}}))
        await trunk.start()
        await trunk.warm_up()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{trunk.port}") as channel:
            watch = channel.unary_stream(f"/{health_names.SERVICE_NAME}/Watch", None, None)(b"", timeout=30)
            seen = [await watch.read()]
            call = channel.unary_unary(f"/{wire.SERVICE}/Forward", None, None)
            serving = asyncio.create_task(trunk.run_until(asyncio.Event().wait()))
            await call(request(), timeout=5)
            seen.append(await watch.read())
            with pytest.raises(
                TrunkError, match=r"can serve no more \(ZeroDivisionError > .* broken\): start it again$"
            ):
                await serving
            with pytest.raises(grpc.aio.AioRpcError):
                await call(request(), timeout=5)
        statuses = [health_pb2.HealthCheckResponse.FromString(message).status for message in seen]
        assert statuses == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]

    asyncio.run(main())


def test_a_taken_port_is_an_error(held: HeldLayers) -> None:
    with server.embedded(held) as address, pytest.raises(OSError, match="cannot listen on 127.0.0.1"):
        with server.embedded(held, port=int(address.partition(":")[2])):
            pass


def test_an_embedded_trunk_leaves_half_of_the_cpus_to_the_nodes(
    held: HeldLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(server, "num_cpus", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    with server.embedded(held):
        pass
    assert seen == [4]
