"""The queue over loopback: bounded, fair, and rid of calls that nobody waits for."""

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from trunk_service import HIDDEN, Gated, bearers_of, forward, request, running, serving, wait_until

from fl_split import wire
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import messages, server
from fl_split.trunk.batching import Batcher
from fl_split.trunk.layers import HeldLayers

_Code = grpc.StatusCode


@pytest.fixture
def batchers(monkeypatch: pytest.MonkeyPatch) -> list[Batcher]:
    """The batchers of all servers that this test starts."""
    made: list[Batcher] = []

    def make(*args: Any, **options: Any) -> Batcher:
        made.append(Batcher(*args, **options))
        return made[-1]

    monkeypatch.setattr(server, "Batcher", make)
    return made


def test_a_light_caller_is_served_while_a_heavy_one_waits(
    held: HeldLayers, tmp_path: Path, batchers: list[Batcher]
) -> None:
    file = tmp_path / "tokens.json"
    heavy, light = bearers_of(file, "heavy", "light")
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


def test_exact_gradients_wait_in_a_bounded_queue(held: HeldLayers, monkeypatch: pytest.MonkeyPatch) -> None:
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
