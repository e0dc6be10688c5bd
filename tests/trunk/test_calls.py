"""One call over loopback: its size, its time, how it ended, and the line it leaves."""

import gc
import json
import logging
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import Tensor
from trunk_service import counted, forward, refused, request, running, serving, wait_until

from fl_split import wire
from fl_split.trunk import server
from fl_split.trunk.layers import HeldLayers
from fl_split.trunk.metrics import serve_metrics

_Code = grpc.StatusCode


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


def test_a_request_for_a_surrogate_is_a_few_bytes(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError, match="has 17 bytes: expected at most 16") as error:
        channel.unary_unary(f"/{wire.SERVICE}/Surrogate")(bytes([26, 15, *range(15)]), timeout=5)
    assert error.value.code() is _Code.INVALID_ARGUMENT


def test_a_surrogate_that_is_not_published_is_not_found(held: HeldLayers) -> None:
    with serving(held) as channel, pytest.raises(grpc.RpcError, match="publishes no surrogate") as error:
        channel.unary_unary(f"/{wire.SERVICE}/Surrogate")(b"", timeout=5)
    assert error.value.code() is _Code.NOT_FOUND


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
