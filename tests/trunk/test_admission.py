"""How many calls at once, who may send, and how much may wait to be taken."""

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from trunk_service import HIDDEN, Gated, bearers_of, counted, forward, refused, request, running, serving, wait_until

from fl_split import wire
from fl_split.trunk import admission
from fl_split.trunk.admission import Gate, TooManyCalls
from fl_split.trunk.config import Limits
from fl_split.trunk.layers import HeldLayers

_Code = grpc.StatusCode


def test_slow_senders_of_one_caller_do_not_keep_others_out(held: HeldLayers, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    heavy, light = bearers_of(file, "heavy", "light")
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
    first, second, third = bearers_of(file, "a", "b", "c")
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


def test_too_many_calls_of_one_caller_are_refused(held: HeldLayers) -> None:
    gated = Gated.of(held)
    with serving(gated, limits={"calls-per-caller": 2}) as channel:
        gated.close()
        calls = [forward(channel).future(request(), timeout=30) for _ in range(6)]
        wait_until(lambda: sum(call.done() for call in calls) == 4)
        gated.gate.set()
        assert [call.code() for call in calls].count(_Code.OK) == 2
        assert "too many calls at once" in next(c for c in calls if c.code() is not _Code.OK).details()


def test_gate_counts_calls_per_caller_and_in_all() -> None:
    async def main() -> None:
        gate = Gate(Limits(calls=3, calls_per_caller=2))
        async with gate.call("a"), gate.call("a"):
            with pytest.raises(TooManyCalls):
                async with gate.call("a"):
                    pass
            async with gate.call("b"):
                with pytest.raises(TooManyCalls):
                    async with gate.call("c"):
                        pass
        async with gate.call("c"):
            pass

    asyncio.run(main())


def test_gate_lets_few_read_at_a_time_and_none_hold_all_places() -> None:
    async def main() -> None:
        gate = Gate(Limits(reading=3, reading_per_caller=2))
        most = {"a": 0, "b": 0}
        now = {"a": 0, "b": 0}

        async def read(caller: str) -> None:
            async with gate.reading(caller):
                now[caller] += 1
                most[caller] = max(most[caller], now[caller])
                assert sum(now.values()) <= 3
                await asyncio.sleep(0.01)
                now[caller] -= 1

        await asyncio.gather(*(read("a") for _ in range(8)), read("b"))
        assert most == {"a": 2, "b": 1}

    asyncio.run(main())
