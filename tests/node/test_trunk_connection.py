"""The node's side: large requests cut, refusals obeyed, and answers of the right trunk only."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from fake_trunk import echo, fake_trunk

from fl_split import wire
from fl_split.errors import TrunkMismatch, TrunkRefused, TrunkUnavailable, WireError
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers, trunk_id

HIDDEN = 32


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Expected:
    return Expected.from_checkpoint(checkpoint("llama"), 2, 2)


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


def test_a_trunk_of_another_precision_is_another_trunk(checkpoint: Callable[[str], Path], held: HeldLayers) -> None:
    narrow = hold_layers(checkpoint("llama"), 2, 2, torch.bfloat16).identity
    assert (narrow.compute_dtype, held.identity.compute_dtype) == ("bfloat16", "float32")
    assert narrow.weights_digest == held.identity.weights_digest and narrow.trunk_id != held.identity.trunk_id
    assert narrow.trunk_id != trunk_id(pb.DescribeReply(quantization="torchao-int8", **_fields(narrow)))
    assert narrow.trunk_id == trunk_id(pb.DescribeReply(**_fields(narrow)))


def _fields(about: pb.DescribeReply) -> dict[str, Any]:
    names = ("config_digest", "weights_digest", "first_layer", "end_layer", "compute_dtype")
    return {name: getattr(about, name) for name in names}
