"""Generation streams of the service: equal to one forward pass, bounded, fair, and gone without a trace."""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from fl_split import wire
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import batching, decode, server
from fl_split.trunk.batching import Batcher
from fl_split.trunk.cache_pool import CacheFull, CachePool
from fl_split.trunk.config import Batching, TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.wire_decode import encode_open, encode_reorder, encode_step, encode_truncate

HIDDEN = 32
TOKEN_BYTES = 2 * 2 * (2 * 8) * 4  # layers, keys and values, heads x head size, float32
_Code = grpc.StatusCode


@pytest.fixture(scope="module")
def held(checkpoint: Callable[[str], Path]) -> HeldLayers:
    return hold_layers(checkpoint("llama"), 2, 2)


def rows_of(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def at_once(held: HeldLayers, rows: Tensor) -> Tensor:
    return held.run(rows[None], None, None)[0]


def check(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


class Stream:
    """One stream as a caller sees it."""

    def __init__(self, channel: grpc.Channel, sequences: int = 1, max_tokens: int = 64, **options: Any) -> None:
        self._requests: queue.SimpleQueue[pb.DecodeRequest | None] = queue.SimpleQueue()
        stub = channel.stream_stream(
            f"/{wire.SERVICE}/Decode", pb.DecodeRequest.SerializeToString, pb.ForwardReply.FromString
        )
        self.call = stub(iter(self._requests.get, None), **options)
        self.send(encode_open(sequences, max_tokens))

    def send(self, request: pb.DecodeRequest) -> None:
        self._requests.put(request)

    def step(self, rows: Tensor, lengths: list[int] | None = None) -> Tensor:
        self.start(rows, lengths)
        return self.take()

    def start(self, rows: Tensor, lengths: list[int] | None = None) -> None:
        self.send(encode_step(wire.Packed(rows, lengths or [len(rows)], None), pb.FLOAT32))

    def take(self) -> Tensor:
        reply = next(self.call)
        return wire.decode_rows(reply.hidden_states, reply.dtype, (), len(reply.hidden_states) // 4 // HIDDEN, HIDDEN)

    def close(self) -> None:
        self._requests.put(None)
        assert list(self.call) == []

    def refused(self) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as error:
            next(self.call)
        return error.value


@contextmanager
def serving(held: HeldLayers, **limits: Any) -> Iterator[tuple[server.TrunkServer, grpc.Channel]]:
    made: list[server.TrunkServer] = []
    build = server.TrunkServer._build

    def spy(self: server.TrunkServer) -> Any:
        made.append(self)
        return build(self)

    config = TrunkConfig.model_validate({"limits": limits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.TrunkServer, "_build", spy)
        with server.embedded(held, config=config) as address, grpc.insecure_channel(address) as channel:
            yield made[0], channel


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_describe_says_what_is_offered(held: HeldLayers) -> None:
    for limits, offered in (({"cache-mb": 3, "stream-idle-s": 7.0}, True), ({"cache-mb": 0}, False)):
        with serving(held, **limits) as (_, channel):
            describe = channel.unary_unary(f"/{wire.SERVICE}/Describe", None, pb.DescribeReply.FromString)
            about = describe(b"")
            assert about.HasField("decode") == offered
            if offered:
                assert about.decode == pb.DecodeBounds(bytes_per_token=TOKEN_BYTES, cache_bytes=3_000_000, idle_s=7)
            else:
                assert Stream(channel).refused().code() is _Code.UNIMPLEMENTED


def test_in_steps_equals_at_once(held: HeldLayers) -> None:
    rows = rows_of(30)
    with serving(held) as (trunk, channel):
        stream = Stream(channel, 2)
        found = [stream.step(rows[:14], [10, 4]), stream.step(rows[14:16], [1, 1]), stream.step(rows[16:19], [0, 3])]
        first = torch.cat([rows[:10], rows[14:15]])
        second = torch.cat([rows[10:14], rows[15:19]])
        check(torch.cat([found[0][:10], found[1][:1]]), at_once(held, first))
        check(torch.cat([found[0][10:], found[1][1:], found[2]]), at_once(held, second))
        stream.send(encode_truncate([11, 6]))
        stream.send(encode_reorder([1, 0]))
        last = stream.step(rows[19:21], [1, 1])
        check(last[:1], at_once(held, torch.cat([second[:6], rows[19:20]]))[-1:])
        check(last[1:], at_once(held, torch.cat([first, rows[20:21]]))[-1:])
        assert trunk._decoder.pool.used_bytes == 2 * 64 * TOKEN_BYTES
        stream.close()
        wait_until(lambda: trunk._decoder.pool.used_bytes == 0)


def test_eight_streams_at_once_get_what_each_would_get_alone(held: HeldLayers) -> None:
    prompts = [rows_of(3 + 5 * i, i) for i in range(8)]
    tails = [rows_of(10, 100 + i) for i in range(8)]
    found: dict[int, Tensor] = {}
    with serving(held) as (trunk, channel):

        def ask(i: int) -> None:
            stream = Stream(channel)
            outs = [stream.step(prompts[i]), *(stream.step(row[None]) for row in tails[i])]
            found[i] = torch.cat(outs)
            stream.close()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        registry = trunk.metrics.registry
        batches = registry.get_sample_value("fl_split_trunk_decode_seconds_count")
        assert registry.get_sample_value("fl_split_trunk_decode_steps_sum") == 88
        assert batches is not None and batches < 80  # some shared a pass
    for i in range(8):
        check(found[i], at_once(held, torch.cat([prompts[i], tails[i]])))


def test_a_long_prompt_is_computed_in_pieces_between_the_steps_of_others(
    held: HeldLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_PIECE_TOKENS", 8)
    order: list[list[int]] = []
    run = decode.run_pieces

    def slow(model: Any, pieces: Any) -> list[Tensor]:
        order.append([len(piece.rows) for piece in pieces])
        time.sleep(0.02)
        return run(model, pieces)

    monkeypatch.setattr(decode, "run_pieces", slow)
    rows = rows_of(60)
    with serving(held) as (_, channel):
        long, short = Stream(channel), Stream(channel)
        short.step(rows[:1])
        long.start(rows)
        for row in rows[1:6]:
            short.step(row[None])
        check(long.take(), at_once(held, rows))
    widths = list(itertools.chain.from_iterable(order))
    assert max(widths) == 8
    assert 1 in widths[widths.index(8) : len(widths) - widths[::-1].index(8)]  # a step among the pieces


def test_a_full_cache_refuses_with_a_time_and_has_room_again(held: HeldLayers) -> None:
    with serving(held, **{"cache-mb": 1}) as (trunk, channel):
        each = 1_000_000 // TOKEN_BYTES // 64 // 2  # sequences: two streams fill it
        first, second = Stream(channel, each), Stream(channel, each)
        for stream in (first, second):
            stream.step(rows_of(each), [1] * each)
        error = Stream(channel, each).refused()
        assert error.code() is _Code.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())[wire.PUSHBACK] == "1000"
        too_much = Stream(channel, 4 * each).refused()
        assert too_much.code() is _Code.INVALID_ARGUMENT
        assert "the whole cache has 1000000" in too_much.details()
        first.call.cancel()  # a caller that dies
        wait_until(lambda: trunk._decoder.pool.num_streams == 1)
        Stream(channel, each).step(rows_of(each), [1] * each)


def test_a_connection_that_is_gone_frees_its_bytes(held: HeldLayers) -> None:
    with serving(held) as (trunk, _):
        channel = grpc.insecure_channel(f"127.0.0.1:{trunk.port}")
        stream = Stream(channel)
        stream.step(rows_of(3))
        assert trunk._decoder.pool.num_streams == 1
        channel.close()
        wait_until(lambda: trunk._decoder.pool.used_bytes == 0)


def test_an_idle_stream_is_closed(held: HeldLayers) -> None:
    with serving(held, **{"stream-idle-s": 0.3}) as (trunk, channel):
        stream = Stream(channel)
        stream.step(rows_of(3))
        error = stream.refused()
        assert error.code() is _Code.ABORTED
        assert "limits.stream-idle-s=0.3" in error.details()
        assert trunk._decoder.pool.used_bytes == 0


def test_a_caller_that_takes_no_replies_is_closed(held: HeldLayers) -> None:
    rows = rows_of(60)
    with serving(held, **{"stream-idle-s": 0.5}) as (trunk, _):
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
        with grpc.insecure_channel(f"127.0.0.1:{trunk.port}", options) as channel:
            stream = Stream(channel)
            for _ in range(20):
                stream.start(rows)
                stream.send(encode_truncate([0]))
            wait_until(lambda: trunk._decoder.pool.num_streams == 1)
            wait_until(lambda: trunk._decoder.pool.num_streams == 0)


def test_streams_end_with_the_server_and_callers_are_told_to_go_elsewhere(held: HeldLayers) -> None:
    with server.embedded(held) as address:
        channel = grpc.insecure_channel(address)
        stream = Stream(channel)
        stream.step(rows_of(3))
        started = time.monotonic()
    assert time.monotonic() - started < 10  # not server.drain-s
    error = stream.refused()
    channel.close()
    assert error.code() is _Code.UNAVAILABLE
    assert "go on at another replica" in error.details()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (encode_open(1, 1), "action is open"),
        (encode_truncate([5]), "more tokens than the sequence has"),
        (pb.DecodeRequest(step=pb.ForwardRequest(lengths=[1], dtype=pb.FLOAT32, hidden_states=b"123")), "3 bytes"),
        (encode_step(wire.Packed(rows_of(62), [62], None), pb.FLOAT32), "beyond the 64 tokens"),
    ],
)
def test_what_does_not_fit_ends_the_stream(held: HeldLayers, request_: pb.DecodeRequest, match: str) -> None:
    with serving(held) as (trunk, channel):
        stream = Stream(channel)
        stream.step(rows_of(3))
        stream.send(request_)
        error = stream.refused()
        assert error.code() is _Code.INVALID_ARGUMENT
        assert match in error.details()
        wait_until(lambda: trunk._decoder.pool.used_bytes == 0)


@pytest.mark.parametrize(("share", "together"), [(0.0, False), (0.5, True)])
def test_senders_out_of_step_come_to_share_passes(share: float, together: bool) -> None:
    """Without a wait after a pass, two streams of one caller would take turns for ever."""
    sizes: list[int] = []

    def compute(requests: Any) -> list[Tensor]:
        time.sleep(0.05)
        return [request.rows for request in requests]

    async def run() -> None:
        batcher = Batcher(compute, Batching(), 1000, wait_share=share)
        batcher.on_batch = lambda jobs, seconds: sizes.append(len(jobs))
        serving = asyncio.ensure_future(batcher.run())

        async def send(number: int) -> None:
            await asyncio.sleep(0.025 * number)
            for _ in range(6):
                await batcher.submit("one", wire.Packed(rows_of(1), [1], None), 10, sender=number)
                await asyncio.sleep(0.001)

        await asyncio.gather(send(1), send(2))
        serving.cancel()
        batcher.close()

    asyncio.run(run())
    assert (sizes.count(2) >= 4) == together


def test_nobody_waits_for_a_stream_that_has_ended(held: HeldLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_WAIT_SHARE", 100_000.0)  # of a pass, of some milliseconds
    monkeypatch.setattr(batching, "_ACTIVE_S", 20.0)
    with serving(held) as (_, channel):
        ended = Stream(channel)
        ended.step(rows_of(3))
        ended.close()
        stream = Stream(channel)
        started = time.monotonic()
        for row in rows_of(5):
            stream.step(row[None])
        assert time.monotonic() - started < 10
        stream.close()


# ------------------------------------------------------------------------------------------------------- the pool


def test_the_caller_with_most_gives_way_to_one_that_still_has_less() -> None:
    async def run() -> None:
        pool = CachePool(100)
        with pool.lease("a", 40) as first, pool.lease("a", 40) as second:
            with pool.lease("b", 35):
                assert second.ended.result() is True  # the newest
                assert not first.ended.done()
                assert pool.used_bytes == 75
                with pytest.raises(CacheFull):
                    with pool.lease("a", 40):  # a would have more than b
                        pass
                with pytest.raises(CacheFull):
                    with pool.lease("b", 30):  # b would have more than a
                        pass
                with pool.lease("c", 25):
                    assert pool.used_bytes == 100
            assert pool.used_bytes == 40
        assert pool.used_bytes == 0

    asyncio.run(run())


def test_nobody_gives_way_where_it_would_not_help() -> None:
    async def run() -> None:
        pool = CachePool(100)
        with pool.lease("a", 50) as a, pool.lease("b", 50) as b:
            with pytest.raises(CacheFull):
                with pool.lease("c", 60):
                    pass
            assert not a.ended.done() and not b.ended.done()

    asyncio.run(run())
