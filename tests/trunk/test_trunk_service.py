"""The service over loopback: equal to a trunk in this process, a clear status for what it cannot take, draining."""

import asyncio
import gc
import json
import logging
import queue
import socket
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health as health_names
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import Tensor

from fl_split import wire
from fl_split.config import Lora
from fl_split.errors import ConfigError, SurrogateError, TrunkError, TrunkUnavailable, WireError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection, fetch
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import admission, layers, messages, server
from fl_split.trunk.access import add_token
from fl_split.trunk.batching import Batcher
from fl_split.trunk.config import TrunkConfig, TrunkModel
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.metrics import serve_metrics

HIDDEN = 32
_Code = grpc.StatusCode


@pytest.fixture(scope="module")
def held(checkpoint: Callable[[str], Path]) -> HeldLayers:
    return hold_layers(checkpoint("llama"), 2, 2)


class Gated(HeldLayers):
    """The same layers, but while `gate` is closed no forward pass ends; `lengths` are those of the passes so far."""

    @classmethod
    def of(cls, held: HeldLayers) -> "Gated":
        gated = cls(held.model, held.identity, held.causal)
        object.__setattr__(gated, "gate", threading.Event())
        object.__setattr__(gated, "lengths", [])
        gated.gate.set()
        return gated

    gate: threading.Event
    lengths: list[int]

    def run(self, hidden_states: Tensor, *args: Any) -> Tensor:
        self.lengths.append(hidden_states.shape[1])
        assert self.gate.wait(30)
        return super().run(hidden_states, *args)

    def close(self) -> int:
        """Close the gate; returns how many passes there have been."""
        self.gate.clear()
        return len(self.lengths)


@pytest.fixture
def batchers(monkeypatch: pytest.MonkeyPatch) -> list[Batcher]:
    """The batchers of all servers that this test starts."""
    made: list[Batcher] = []

    def make(*args: Any, **options: Any) -> Batcher:
        made.append(Batcher(*args, **options))
        return made[-1]

    monkeypatch.setattr(server, "Batcher", make)
    return made


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for at most half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def serving(held: HeldLayers, **sections: dict[str, Any]) -> Iterator[grpc.Channel]:
    config = TrunkConfig.model_validate(sections)
    options = [("grpc.http2.bdp_probe", 0)]  # else grpc may take a reply that nobody asks for
    with server.embedded(held, config=config) as address, grpc.insecure_channel(address, options) as channel:
        yield channel


@contextmanager
def running(held: HeldLayers, **sections: dict[str, Any]) -> Iterator[tuple[server.TrunkServer, grpc.Channel]]:
    """As `serving`, with the server itself."""
    made: list[server.TrunkServer] = []
    build = server.TrunkServer._build

    def spy(self: server.TrunkServer) -> Any:
        made.append(self)
        return build(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.TrunkServer, "_build", spy)
        with serving(held, **sections) as channel:
            yield made[0], channel


@contextmanager
def counting_relay(port: int) -> Iterator[tuple[str, list[int]]]:
    """A way to a port of loopback, for one connection; yields its address and the sizes of what has gone there."""
    sizes: list[int] = []

    def pump(source: socket.socket, sink: socket.socket, sizes: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sizes.append(len(data))
                sink.sendall(data)

    def accept() -> None:
        here = listener.accept()[0]
        there = socket.create_connection(("127.0.0.1", port))
        ends.extend((here, there))
        threading.Thread(target=pump, args=(there, here, []), daemon=True).start()
        pump(here, there, sizes)

    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", sizes
        for end in ends:
            end.close()


def counted(trunk: server.TrunkServer, method: str, code: str, institution: str = "anonymous") -> float:
    labels = {"method": method, "code": code, "institution": institution}
    return trunk.metrics.registry.get_sample_value("fl_split_trunk_calls_total", labels) or 0.0


def forward(channel: grpc.Channel) -> Any:
    return channel.unary_unary(f"/{wire.SERVICE}/Forward", None, pb.ForwardReply.FromString)


def request(num_tokens: int = 5, **changes: Any) -> bytes:
    data, _ = wire.encode_rows(torch.ones(num_tokens, HIDDEN), pb.FLOAT32)
    fields = {"dtype": pb.FLOAT32, "lengths": [num_tokens], "hidden_states": data, **changes}
    return pb.ForwardRequest(**fields).SerializeToString()


def refused(channel: grpc.Channel, message: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        forward(channel)(message, timeout=5, **options)
    return error.value


# ----------------------------------------------------------------------------------------------------- equality


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


# ----------------------------------------------------------------------------------------------- hostile callers


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xff\xff\xff", "the message cannot be parsed"),
        (request()[:-2], "the message cannot be parsed"),
        (b"", "lengths has 0 entries"),
        (request(lengths=[2**32 - 1]), "lengths holds 4294967295"),
        (request(lengths=[65]), "a sequence has at most 64 tokens"),
        (request(lengths=[4]), "hidden_states has 640 bytes"),
        (request(dtype=7), "dtype=7 is unknown"),
        (request(hidden_states=b"\xff" * 640), "NaN or infinite"),
        (request(positions=[1]), "positions has 1 entries"),
    ],
)
def test_malformed_requests_are_refused_by_field(held: HeldLayers, message: bytes, text: str) -> None:
    with serving(held) as channel:
        error = refused(channel, message)
        assert error.code() is _Code.INVALID_ARGUMENT
        assert text in error.details()
        assert len(forward(channel)(request(), timeout=5).hidden_states) == 5 * HIDDEN * 4


def test_messages_beyond_the_limit_and_compressed_ones_are_refused(held: HeldLayers) -> None:
    with serving(held, limits={"max-tokens": 64}) as channel:
        error = refused(channel, bytes(100_000))
        assert error.code() is _Code.RESOURCE_EXHAUSTED
        error = refused(channel, request(), compression=grpc.Compression.Gzip)
        assert error.code() is _Code.UNIMPLEMENTED
        assert forward(channel)(request(), timeout=5)


def test_a_message_beyond_the_limit_is_counted_as_its_caller_sees_it(held: HeldLayers) -> None:
    with running(held, limits={"max-tokens": 64}) as (trunk, channel):
        assert refused(channel, bytes(100_000)).code() is _Code.RESOURCE_EXHAUSTED
        wait_until(lambda: counted(trunk, "Forward", "RESOURCE_EXHAUSTED") == 1)
        with pytest.raises(grpc.RpcError):
            channel.stream_unary(f"/{wire.SERVICE}/Forward")(iter(()), timeout=5)
        wait_until(lambda: counted(trunk, "Forward", "INVALID_ARGUMENT") == 1)


@pytest.mark.parametrize("message", [pb.ForwardRequest(lengths=[1] * 9000), pb.ForwardRequest(outliers=[1] * 9000)])
def test_many_small_numbers_are_refused_before_they_are_parsed(message: pb.ForwardRequest) -> None:
    limits = wire.CallLimits(HIDDEN, 512, 64)
    with pytest.raises(WireError, match=r"has at least 900\d bytes beside its tensors: expected at most 6240"):
        messages.decode_forward(message.SerializeToString(), limits)
    pull = pb.PullRequest(forward=message, gradient=bytes(100_000))
    with pytest.raises(WireError, match=r"has at least 9\d{3} bytes beside its tensors"):
        messages.decode_pull(pull.SerializeToString(), limits)
    unpacked = b"\x18\x01" * 9000  # a tag before each number
    with pytest.raises(WireError, match=r"beside its tensors"):
        messages.decode_forward(unpacked, limits)


def test_the_largest_request_is_not_refused_for_its_size() -> None:
    limits = wire.CallLimits(HIDDEN, 512, 2**31)
    packed = wire.Packed(torch.ones(512, HIDDEN), [1] * 512, torch.full((512,), 2**31 - 1))
    for dtype in wire.NAMES.values():
        data = wire.encode_request(packed, dtype).SerializeToString()
        assert messages.decode_forward(data, limits)[1].lengths == packed.lengths
    data = wire.encode_pull(packed, packed.rows, pb.FLOAT32).SerializeToString()
    assert messages.decode_pull(data, limits)[1].rows.shape == (512, 2 * HIDDEN)


def test_a_request_for_a_surrogate_is_a_few_bytes(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError, match="has 17 bytes: expected at most 16") as error:
        channel.unary_unary(f"/{wire.SERVICE}/Surrogate")(bytes([26, 15, *range(15)]), timeout=5)
    assert error.value.code() is _Code.INVALID_ARGUMENT


def test_exact_gradients_wait_in_a_bounded_queue(
    held: HeldLayers, batchers: list[Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    run_pulls = messages.run_pulls
    monkeypatch.setattr(server, "run_pulls", lambda *args: (gate.wait(30), run_pulls(*args))[1])
    packed = wire.Packed(torch.ones(40, HIDDEN), [40], None)
    message = wire.encode_pull(packed, packed.rows, pb.FLOAT32).SerializeToString()
    sections = {"server": {"exact-gradient": True}, "limits": {"max-tokens": 64, "queue-tokens": 64}}
    with serving(held, **sections) as channel:
        call = channel.unary_unary(f"/{wire.EXACT_SERVICE}/Pull")
        calls = [call.future(message, timeout=30) for _ in range(12)]
        wait_until(lambda: sum(call.done() for call in calls) == 10)  # one is computed, one waits
        gate.set()
        codes = [call.code() for call in calls]
    assert (codes.count(_Code.OK), codes.count(_Code.RESOURCE_EXHAUSTED)) == (2, 10)


def test_errors_reveal_no_internals(held: HeldLayers, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(HeldLayers):
        def run(self, *args: Any) -> Tensor:
            if len(args[0]) == 1 and args[0].shape[1] == 5:
                raise RuntimeError("tensor([0.123, /secret/path")
            return super().run(*args)

    with serving(Broken(held.model, held.identity, held.causal)) as channel:
        error = refused(channel, request(), metadata=((wire.REQUEST_ID, "request-12345678"),))
    assert error.code() is _Code.INTERNAL
    assert "secret" not in error.details() and "request-12345678" in error.details()
    assert "secret" not in caplog.text
    assert "call request-12345678 failed: RuntimeError > " in caplog.text and "padding.py:" in caplog.text


def test_a_call_without_a_message_and_one_that_is_too_slow_are_refused(held: HeldLayers) -> None:
    with serving(held, limits={"receive-timeout-s": 0.2}) as channel:
        call = channel.stream_unary(f"/{wire.SERVICE}/Forward")
        with pytest.raises(grpc.RpcError, match="the call holds no message"):
            call(iter(()), timeout=5)
        hang = threading.Event()
        started = time.monotonic()

        def slowly() -> Iterator[bytes]:
            hang.wait(3)
            yield b""

        with pytest.raises(grpc.RpcError, match="receive-timeout-s"):
            call(slowly(), timeout=5)
        hang.set()
        assert time.monotonic() - started < 2
        assert forward(channel)(request(), timeout=5)


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


def test_unknown_methods_are_unimplemented(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"/{wire.SERVICE}/Train")(b"", timeout=5)
    assert error.value.code() is _Code.UNIMPLEMENTED


def test_a_surrogate_that_is_not_published_is_not_found(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError, match="publishes no surrogate") as error:
        channel.unary_unary(f"/{wire.SERVICE}/Surrogate")(b"", timeout=5)
    assert error.value.code() is _Code.NOT_FOUND


def own_channel(address: str) -> grpc.Channel:
    """A channel with a connection of its own."""
    return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


@pytest.mark.parametrize("failure", [TrunkUnavailable("gone"), None])
def test_a_surrogate_that_does_not_come_whole_leaves_nothing_behind(tmp_path: Path, failure: Exception | None) -> None:
    about = pb.DescribeReply(surrogate_digest=b"x" * 32, surrogate_bytes=10)

    def piece(offset: int) -> bytes:
        if failure is not None and offset:
            raise failure
        return b"12345"

    with pytest.raises(TrunkUnavailable if failure else SurrogateError, match="gone" if failure else "came damaged"):
        fetch(about, piece, tmp_path)
    assert not list(tmp_path.iterdir())


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


# ------------------------------------------------------------------------------------------------------- bounded


@pytest.fixture
def bearers(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A tokens file, and what calls of two institutions carry."""
    file = tmp_path / "tokens.json"
    heavy, light = ((("authorization", f"Bearer {add_token(file, name, None)}"),) for name in ("heavy", "light"))
    return file, heavy, light


def test_a_light_caller_is_served_while_a_heavy_one_waits(
    held: HeldLayers, bearers: tuple[Path, Any, Any], batchers: list[Batcher]
) -> None:
    file, heavy, light = bearers
    sections = {"security": {"tokens": str(file)}, "batching": {"max-batch-tokens": 40}, "limits": {"queue-s": 600.0}}
    gated = Gated.of(held)
    with serving(gated, **sections) as channel:
        before = gated.close()
        flood = [forward(channel).future(request(40), timeout=60, metadata=heavy) for _ in range(40)]
        wait_until(lambda: batchers[0].queued_tokens == 39 * 40)  # and one is being computed
        late = forward(channel).future(request(39), timeout=60, metadata=light)
        wait_until(lambda: batchers[0].queued_tokens == 39 * 40 + 39)
        gated.gate.set()
        assert {call.code() for call in (late, *flood)} == {_Code.OK}
    assert gated.lengths[before:].index(39) <= 2  # in order of arrival it would be 40


def test_slow_senders_of_one_caller_do_not_keep_others_out(held: HeldLayers, bearers: tuple[Path, Any, Any]) -> None:
    file, heavy, light = bearers
    sections = {"security": {"tokens": str(file)}, "limits": {"reading": 2, "reading-per-caller": 1}}
    with serving(held, **sections) as channel:
        sent = threading.Event()

        def slowly() -> Iterator[bytes]:
            sent.wait(10)
            yield request()

        call = channel.stream_unary(f"/{wire.SERVICE}/Forward")
        calls = [call.future(slowly(), timeout=20, metadata=heavy) for _ in range(6)]
        time.sleep(0.2)  # by now all of them should be open; none has sent anything
        assert forward(channel)(request(), timeout=10, metadata=light)
        assert not any(call.done() for call in calls)
        sent.set()
        assert {call.code() for call in calls} == {_Code.OK}


def test_silent_senders_of_two_callers_do_not_keep_a_third_out(
    held: HeldLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_IDLE_S", 0.2)
    file = tmp_path / "tokens.json"
    first, second, third = ((("authorization", f"Bearer {add_token(file, name, None)}"),) for name in "abc")
    limits = {"reading": 4, "reading-per-caller": 2}
    with running(held, security={"tokens": str(file)}, limits=limits) as (trunk, channel):
        sent = threading.Event()

        def silent() -> Iterator[bytes]:
            sent.wait(20)
            yield request()

        call = channel.stream_unary(f"/{wire.SERVICE}/Forward")
        calls = [call.future(silent(), timeout=30, metadata=who) for who in 3 * [first, second]]
        wait_until(lambda: len(trunk._gate._reading) == 4 and len(trunk._gate._waiting) == 2)
        started = time.monotonic()
        assert forward(channel)(request(), timeout=10, metadata=third)
        assert time.monotonic() - started < 5  # and not limits.receive-timeout-s
        wait_until(lambda: sum(call.done() for call in calls) == 1)  # one gave its turn up, and may come again
        [displaced] = [call for call in calls if call.done()]
        assert displaced.code() is _Code.RESOURCE_EXHAUSTED and wire.PUSHBACK in dict(displaced.trailing_metadata())
        sent.set()
        assert {call.code() for call in calls if call is not displaced} == {_Code.OK}


def test_replies_that_nobody_takes_count_as_open_calls(held: HeldLayers) -> None:
    large = request(4096, lengths=[64] * 64)  # more than gRPC takes unasked
    with running(held, limits={"calls-per-caller": 3}, server={"drain-s": 0.2}) as (trunk, channel):
        call = channel.unary_stream(f"/{wire.SERVICE}/Forward")
        taken = [call(large, timeout=60) for _ in range(3)]  # and never read
        wait_until(lambda: sum(trunk._gate._unread.values()) > 3 * 4096 * HIDDEN * 4)
        more = [call(large, timeout=60) for _ in range(4)]
        assert {call.code() for call in more} == {_Code.RESOURCE_EXHAUSTED}
        assert trunk._gate._open.total() == 3
        assert counted(trunk, "Forward", "OK") == 0
        assert len(next(taken[0])) > 4096 * HIDDEN * 4
        for call in taken[1:]:
            call.cancel()
        wait_until(lambda: trunk._gate._open.total() == 0)
        assert not trunk._gate._unread
        wait_until(lambda: counted(trunk, "Forward", "OK") == 1 and counted(trunk, "Forward", "CANCELLED") == 2)


def test_a_caller_with_replies_to_take_is_refused_more(held: HeldLayers) -> None:
    large = request(8192, lengths=[64] * 128)  # replies of 1.05 MB
    with running(held, limits={"unread-mb": 1}, server={"drain-s": 0.2}) as (trunk, channel):
        call = channel.unary_stream(f"/{wire.SERVICE}/Forward")
        unread = call(large, timeout=60)
        wait_until(lambda: bool(trunk._gate._unread))
        assert refused(channel, request()).code() is _Code.RESOURCE_EXHAUSTED
        assert len(next(unread)) > 1_000_000
        wait_until(lambda: not trunk._gate._unread)
        assert forward(channel)(request(), timeout=5)


def test_a_call_that_ended_leaves_no_message_to_the_collector(held: HeldLayers) -> None:
    large = request(4096, lengths=[64] * 64)
    with serving(held) as channel:
        forward(channel)(large, timeout=60)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(20):
                forward(channel)(large, timeout=60)
            assert tracemalloc.get_traced_memory()[0] < 5 * len(large)
        finally:
            tracemalloc.stop()
            gc.enable()


def test_of_a_call_that_waits_to_be_read_little_is_received(held: HeldLayers) -> None:
    large = request(8192, lengths=[64] * 128)
    with running(held, limits={"reading": 1}, server={"drain-s": 0.2}) as (trunk, channel):
        silent = channel.stream_unary(f"/{wire.SERVICE}/Forward").future(iter(queue.Queue().get, None), timeout=60)
        wait_until(lambda: len(trunk._gate._reading) == 1)
        with counting_relay(trunk.port) as (address, received), grpc.insecure_channel(address) as other:
            calls = [forward(other).future(large, timeout=60) for _ in range(30)]
            wait_until(lambda: len(trunk._gate._waiting) == 30)
            time.sleep(0.5)  # for what more would come
            assert sum(received) < 30 * 20_000
            for call in (silent, *calls):
                call.cancel()


def test_a_full_queue_refuses_with_a_time_to_come_back(held: HeldLayers) -> None:
    limits = {"max-tokens": 64, "queue-tokens": 64}
    gated = Gated.of(held)
    with serving(gated, limits=limits, batching={"max-batch-tokens": 40}) as channel:
        gated.close()
        calls = [forward(channel).future(request(40), timeout=30) for _ in range(12)]
        wait_until(lambda: sum(call.done() for call in calls) == 10)  # one is computed, one waits
        gated.gate.set()
        codes = [call.code() for call in calls]
        assert (codes.count(_Code.OK), codes.count(_Code.RESOURCE_EXHAUSTED)) == (2, 10)
        for call in calls:
            if call.code() is _Code.RESOURCE_EXHAUSTED:
                assert 0 < int(dict(call.trailing_metadata())[wire.PUSHBACK]) <= 10_000


def test_too_many_calls_of_one_caller_are_refused(held: HeldLayers) -> None:
    gated = Gated.of(held)
    with serving(gated, limits={"calls-per-caller": 2}) as channel:
        gated.close()
        calls = [forward(channel).future(request(), timeout=30) for _ in range(6)]
        wait_until(lambda: sum(call.done() for call in calls) == 4)
        gated.gate.set()
        assert [call.code() for call in calls].count(_Code.OK) == 2
        assert "too many calls at once" in next(c for c in calls if c.code() is not _Code.OK).details()


def test_queued_tokens_are_right_while_nothing_is_computed(held: HeldLayers) -> None:
    gated = Gated.of(held)
    with running(gated) as (trunk, channel):
        before = gated.close()
        busy = forward(channel).future(request(5), timeout=30)
        wait_until(lambda: gated.lengths[before:] == [5])
        gone = forward(channel).future(request(7), timeout=30)

        def queued() -> float | None:
            return trunk.metrics.registry.get_sample_value("fl_split_trunk_queued_tokens")

        wait_until(lambda: queued() == 7)
        gone.cancel()
        wait_until(lambda: queued() == 0)
        gated.gate.set()
        busy.result()


def test_cancelled_and_late_calls_are_not_computed(held: HeldLayers, batchers: list[Batcher]) -> None:
    gated = Gated.of(held)
    with serving(gated) as channel:
        before = gated.close()
        busy = forward(channel).future(request(5), timeout=30)
        wait_until(lambda: gated.lengths[before:] == [5])
        late = forward(channel).future(request(6), timeout=0.5)
        gone = forward(channel).future(request(7), timeout=30)
        wait_until(lambda: batchers[0].queued_tokens >= 7)
        gone.cancel()
        assert late.code() is _Code.DEADLINE_EXCEEDED
        wait_until(lambda: batchers[0].queued_tokens == 0)
        gated.gate.set()
        busy.result()
        forward(channel)(request(8), timeout=30)
    assert gated.lengths[before:] == [5, 8]


# --------------------------------------------------------------------------------------------------- observability


def test_health_and_reflection(held: HeldLayers) -> None:
    with serving(held) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", wire.SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        assert wire.SERVICE in {service.name for service in answer.list_services_response.service}
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=wire.SERVICE)
        [answer] = list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        assert b"ForwardRequest" in answer.file_descriptor_response.file_descriptor_proto[0]


def test_health_and_reflection_take_little(held: HeldLayers) -> None:
    """They need no token: neither large messages nor many open calls must get far."""
    with running(held, server={"drain-s": 20.0}) as (trunk, channel):
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError, match="expected at most 4096") as error:
            health.Check(health_pb2.HealthCheckRequest(service="x" * 200_000), timeout=5)
        assert error.value.code() is _Code.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5)
        assert error.value.code() is _Code.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="x"), timeout=30)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 200_000)
        with pytest.raises(grpc.RpcError, match="expected at most 4096"):
            list(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(40)]
        wait_until(lambda: sum(watch.done() for watch in watches) == 9)  # 32 calls of one caller, one is open
        assert {watch.code() for watch in watches if watch.done()} == {_Code.RESOURCE_EXHAUSTED}
        assert forward(channel)(request(), timeout=5)
        started = time.monotonic()
    assert time.monotonic() - started < 5  # watches do not make a drain longer


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


def test_a_server_is_ready_only_when_warm_and_not_while_it_drains(held: HeldLayers) -> None:
    async def main() -> list[int]:
        gated = Gated.of(held)
        running = server.TrunkServer(gated, TrunkConfig.model_validate({"server": {"port": 0}}))
        seen = []
        await running.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            call = channel.unary_unary(f"/{wire.SERVICE}/Forward", None, None)

            async def status() -> int:
                return (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status

            seen.append(await status())
            await running.warm_up()
            seen.append(await status())
            watch = health.Watch(health_pb2.HealthCheckRequest(service=wire.SERVICE), timeout=30)
            assert (await watch.read()).status == seen[-1]
            before = gated.close()
            open_call = call(request(), timeout=30)
            while len(gated.lengths) == before:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(running.drain())
            seen.append((await watch.read()).status)
            assert await watch.read() is grpc.aio.EOF  # it does not wait for those who watch
            assert not draining.done()
            gated.gate.set()
            assert len(await open_call) > 0
            await draining
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(request(), timeout=1)
            assert error.value.code() is _Code.UNAVAILABLE
        return seen

    not_serving, is_serving = (
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
    )
    assert asyncio.run(main()) == [not_serving, is_serving, not_serving]


def test_calls_leave_a_line_and_counts_but_no_values(
    held: HeldLayers, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    running: Future[server.TrunkServer] = Future()
    build = server.TrunkServer._build

    def spy(self: server.TrunkServer) -> Any:
        running.set_result(self)
        return build(self)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(server.TrunkServer, "_build", spy)
        with serving(held) as channel:
            forward(channel)(request(), timeout=5, metadata=((wire.REQUEST_ID, "abc-12345678"),))
            refused(channel, b"\xff\xff")
            port, stop = serve_metrics(running.result().metrics, "127.0.0.1", 0)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
                text = reply.read().decode()
            stop()
    events = [record.event for record in caplog.records if hasattr(record, "event")]
    assert [(event["code"], event["tokens"]) for event in events] == [("OK", 5), ("INVALID_ARGUMENT", 0)]
    assert events[0]["request-id"] == "abc-12345678"
    assert all(isinstance(value, int | float | str) for event in events for value in event.values())
    assert "[" not in json.dumps(events[0])
    for line in (
        'fl_split_trunk_calls_total{code="OK",institution="anonymous",method="Forward"} 1.0',
        'fl_split_trunk_calls_total{code="INVALID_ARGUMENT",institution="anonymous",method="Forward"} 1.0',
        'fl_split_trunk_tokens_total{institution="anonymous"} 5.0',
        "fl_split_trunk_batch_fill_sum 1.0",
        "fl_split_trunk_ready 1.0",
        "fl_split_trunk_queued_tokens 0.0",
    ):
        assert line in text
    assert "127.0.0.1" not in text


# -------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batching.max-wait-ms=-1", r"batching\.max-wait-ms=-1: input should be greater"),
        ("batching.size=1", r"batching\.size: no such key; see docs/trunk\.md"),
        ("server.port=70000", r"server\.port=70000: input should be less"),
        ("model.quantization=int3", r"model\.quantization='int3': input should be"),
        ("limits.queue-tokens=100", r"limits\.queue-tokens=100 is less than limits\.max-tokens=8192"),
        ("nonsense", r"--set 'nonsense': expected section\.key=value"),
    ],
)
def test_wrong_configuration_is_named_as_written(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrunkConfig.load(None, [override])


def test_tensor_parallelism_serves_no_gradients() -> None:
    with pytest.raises(ConfigError, match=r"model\.tensor-parallel and server\.exact-gradient do not work together"):
        TrunkConfig.load(None, ["model.tensor-parallel=true", "server.exact-gradient=true"])


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trunk.toml"
    file.write_text('[server]\nport = 1\n[model]\nname = "/m"\n')
    config = TrunkConfig.load(file, ["server.port=2", "model.threads=3", "log.format=text"])
    assert (config.server.port, config.model.name, config.model.threads) == (2, "/m", 3)
    file.write_text("model = 3")
    with pytest.raises(
        ConfigError, match=r"model=3 in the file: expected a section \[model\], for --set 'model.name=x'"
    ):
        TrunkConfig.load(file, ["model.name=x"])
    for damage in ("port = ", "\x00"):
        file.write_text(damage)
        with pytest.raises(ConfigError, match="cannot be read as TOML"):
            TrunkConfig.load(file)


def test_a_taken_port_is_an_error(held: HeldLayers) -> None:
    with server.embedded(held) as address, pytest.raises(OSError, match="cannot listen on 127.0.0.1"):
        with server.embedded(held, port=int(address.partition(":")[2])):
            pass


def test_missing_quantization_package_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(layers, "import_module", missing)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ConfigError, match="model.quantization='torchao-int8' needs the package torchao"):
        layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), quantization="torchao-int8"))


def test_missing_device_map_package_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **options: Any) -> None:
        assert options == {"device_map": "auto"}
        raise ImportError("Using a `device_map` requires `accelerate`.\nMore")

    monkeypatch.setattr(layers, "hold_layers", missing)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ConfigError, match=r"model\.device-map='auto' .* not installed: Using a .* `accelerate`\.$"):
        layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), device_map="auto"))


@pytest.mark.parametrize(("compile", "calls"), [(False, []), (True, [{"dynamic": True}])])
def test_layers_are_compiled_only_if_asked(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, compile: bool, calls: list[dict[str, bool]]
) -> None:
    seen: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), compile=compile))
    assert seen == calls


@pytest.mark.parametrize(("threads", "taken"), [(0, 8), (3, 3)])
def test_a_trunk_takes_the_threads_it_is_given(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, threads: int, taken: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(layers, "num_cpus", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    layers.hold_configured(TrunkModel(name=str(checkpoint("llama")), threads=threads))
    assert seen == [taken]


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


def test_device_map_goes_to_transformers(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    folder = str(checkpoint("llama"))
    plain = layers.hold_configured(TrunkModel(name=folder))
    mapped = layers.hold_configured(TrunkModel(name=folder, device_map="cpu"))
    probe = torch.randn(1, 4, HIDDEN)
    assert torch.equal(plain.run(probe, None, None), mapped.run(probe, None, None))
    assert plain.identity == mapped.identity


def test_models_whose_result_depends_on_the_batch_are_not_batched(held: HeldLayers) -> None:
    config = TrunkConfig().batching
    assert held.allowed(config).enabled
    eight, four = (pb.DescribeReply(quantization=f"bitsandbytes-{bits}bit") for bits in (8, 4))
    assert not replace(held, identity=eight).allowed(config).enabled
    assert replace(held, identity=four).allowed(config).enabled
    model = type("M", (), {"config": type("C", (), {"rope_parameters": {"rope_type": "dynamic"}})})
    assert not replace(held, model=model).allowed(config).enabled  # type: ignore[arg-type]
