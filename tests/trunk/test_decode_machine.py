"""Streams in every order and size, by a state machine: nothing crashes, no byte leaks, every reply is right."""

import asyncio
from functools import cache
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from fl_split import wire
from fl_split.errors import WireError
from fl_split.model.key_values import bytes_per_token
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import decode
from fl_split.trunk.admission import Gate
from fl_split.trunk.cache_pool import CacheFull
from fl_split.trunk.calls import Call, NoMessage
from fl_split.trunk.config import Batching, Limits
from fl_split.trunk.layers import HeldLayers
from fl_split.trunk.metrics import TrunkMetrics
from fl_split.wire_decode import encode_open, encode_reorder, encode_step, encode_truncate

HIDDEN, MOST = 8, 24
BUDGET_MB = 1
LIMITS = wire.CallLimits(HIDDEN, 40, MOST)


@cache
def held() -> HeldLayers:
    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(
            vocab_size=3,
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=MOST,
        )
    ).eval()
    identity = pb.DescribeReply(hidden_size=HIDDEN)
    identity.decode.bytes_per_token = bytes_per_token(model)
    return HeldLayers(model, identity, True)


class Wire:
    """A call's context: messages that were sent, replies that came."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.replies: list[bytes] = []
        self.reading = False

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def read(self) -> Any:
        self.reading = True
        message = await self.sent.get()
        self.reading = False
        return message

    async def write(self, data: bytes) -> None:
        self.replies.append(data)


class Opened:
    """A stream, and what its sequences should have kept."""

    def __init__(self, decoder: decode.Decoder, caller: str, sequences: int, room: int) -> None:
        self.wire, self.room = Wire(), room
        self.kept = [torch.zeros(0, HIDDEN) for _ in range(sequences)]
        call = Call("Decode", self.wire)  # type: ignore[arg-type]
        call.caller = caller
        self.task = asyncio.ensure_future(decoder.serve(call, LIMITS))

    @property
    def size_bytes(self) -> int:
        return len(self.kept) * self.room * held().identity.decode.bytes_per_token


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.streams: list[Opened] = []
        self.generator = torch.Generator().manual_seed(0)
        self.loop.run_until_complete(self._begin())

    async def _begin(self) -> None:
        limits = Limits(cache_mb=BUDGET_MB, stream_idle_s=60)
        self.decoder = decode.Decoder(held(), Batching(max_wait_ms=0), limits, Gate(limits), TrunkMetrics())
        self.decoder.pool.size_bytes = 40 * MOST * held().identity.decode.bytes_per_token  # soon full
        self.serving = asyncio.ensure_future(self.decoder.run())

    async def _settle(self, stream: Opened) -> None:
        """Until what was sent has had its effect: the stream waits for more, or is over; then others may be as well."""
        while not stream.task.done() and not (stream.wire.reading and stream.wire.sent.empty()):
            await asyncio.sleep(0.0005)
        for _ in range(8):
            await asyncio.sleep(0)
        for opened in [s for s in self.streams if s.task.done()]:
            self.streams.remove(opened)
            with pytest.raises((WireError, CacheFull, NoMessage)):
                opened.task.result()

    def send(self, stream: Opened, request: pb.DecodeRequest) -> None:
        stream.wire.sent.put_nowait(request.SerializeToString())
        self.loop.run_until_complete(self._settle(stream))

    def pick(self, data: st.DataObject) -> Opened | None:
        return data.draw(st.sampled_from(self.streams)) if self.streams else None

    @rule(caller=st.sampled_from("abc"), sequences=st.integers(1, 12), room=st.integers(1, MOST))
    def open(self, caller: str, sequences: int, room: int) -> None:
        async def begin() -> None:
            stream = Opened(self.decoder, caller, sequences, room)
            self.streams.append(stream)
            stream.wire.sent.put_nowait(encode_open(sequences, room).SerializeToString())
            await self._settle(stream)

        self.loop.run_until_complete(begin())

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        if (stream := self.pick(data)) is None:
            return
        count = data.draw(st.integers(1, len(stream.kept) + (data.draw(st.integers(0, 9)) == 0)))
        lengths = data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
        lengths = (
            lengths if data.draw(st.integers(0, 9)) == 0 else [*lengths, *([1] * len(stream.kept))][: len(stream.kept)]
        )
        rows = torch.randn(sum(lengths), HIDDEN, generator=self.generator)
        fits = (
            len(lengths) == len(stream.kept)
            and 1 <= sum(lengths) <= LIMITS.max_tokens
            and all(len(kept) + n <= stream.room for kept, n in zip(stream.kept, lengths, strict=True))
        )
        self.send(stream, encode_step(wire.Packed(rows, lengths, None), pb.FLOAT32))
        assert (stream in self.streams) == fits
        if not fits:
            return
        reply = pb.ForwardReply.FromString(stream.wire.replies[-1])
        found = wire.decode_rows(reply.hidden_states, reply.dtype, (), len(rows), HIDDEN).split(lengths)
        for i, new in enumerate(rows.split(lengths)):
            stream.kept[i] = torch.cat([stream.kept[i], new])
            self.check(stream.kept[i], found[i])

    def check(self, whole: Tensor, found: Tensor) -> None:
        if len(found):
            expected = held().run(whole[None], None, None)[0, -len(found) :]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        if (stream := self.pick(data)) is None:
            return
        lengths = [data.draw(st.integers(0, len(kept))) for kept in stream.kept]
        if data.draw(st.integers(0, 9)) == 0:
            lengths[0] += data.draw(st.integers(0, 2))
        fits = lengths[0] <= len(stream.kept[0])
        self.send(stream, encode_truncate(lengths))
        assert (stream in self.streams) == fits
        stream.kept = [kept[:n] for kept, n in zip(stream.kept, lengths, strict=True)]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        if (stream := self.pick(data)) is None:
            return
        last = len(stream.kept) - (data.draw(st.integers(0, 9)) > 0)
        sources = [data.draw(st.integers(0, last)) for _ in stream.kept]
        self.send(stream, encode_reorder(sources))
        if fits := max(sources) < len(stream.kept):
            stream.kept = [stream.kept[i] for i in sources]
        assert (stream in self.streams) == fits

    @rule(data=st.data())
    def send_nothing(self, data: st.DataObject) -> None:
        if (stream := self.pick(data)) is None:
            return
        self.send(stream, pb.DecodeRequest())
        assert stream not in self.streams

    @rule(data=st.data(), kindly=st.booleans())
    def end(self, data: st.DataObject, kindly: bool) -> None:
        if (stream := self.pick(data)) is None:
            return
        self.streams.remove(stream)
        if kindly:
            stream.wire.sent.put_nowait(grpc.aio.EOF)
            self.loop.run_until_complete(asyncio.wait_for(stream.task, 5))
        else:
            stream.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                self.loop.run_until_complete(stream.task)

    @invariant()
    def no_byte_leaks(self) -> None:
        assert self.decoder.pool.used_bytes == sum(stream.size_bytes for stream in self.streams)
        assert self.decoder.pool.used_bytes <= self.decoder.pool.size_bytes
        assert not self.serving.done()

    def teardown(self) -> None:
        async def finish() -> None:
            tasks = [*(stream.task for stream in self.streams), self.serving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert self.decoder.pool.used_bytes == 0
            self.decoder.close()

        self.loop.run_until_complete(finish())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def run(examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    options = settings(max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(Machine, settings=options)


def test_streams_in_every_order() -> None:
    run(60)


@pytest.mark.slow
def test_streams_in_every_order_ten_thousand_times() -> None:
    run(10_000)
