"""Messages of a generation stream: inverse pairs, and a decoder that hostile input cannot surprise."""

from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_split import wire
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.wire_decode import (
    Open,
    Reorder,
    Step,
    Truncate,
    decode_action,
    decode_open,
    encode_open,
    encode_reorder,
    encode_step,
    encode_truncate,
)

LIMITS = wire.CallLimits(hidden_size=8, max_tokens=12, max_sequence_length=16)
KEPT = [3, 0, 5]


def packed(lengths: list[int], positions: list[int] | None = None) -> wire.Packed:
    rows = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(0))
    return wire.Packed(rows, lengths, None if positions is None else torch.tensor(positions))


def test_round_trip() -> None:
    assert decode_open(encode_open(3, 16).SerializeToString(), LIMITS) == Open(3, 16)
    assert decode_action(encode_truncate([1, 0, 5]).SerializeToString(), LIMITS, KEPT, 16) == Truncate([1, 0, 5])
    assert decode_action(encode_reorder([2, 2, 0]).SerializeToString(), LIMITS, KEPT, 16) == Reorder([2, 2, 0])


@pytest.mark.parametrize("positions", [None, [9, 10, 3]])
def test_a_step_round_trip(positions: list[int] | None) -> None:
    given = packed([2, 0, 1], positions)
    step = decode_action(encode_step(given, pb.FLOAT32).SerializeToString(), LIMITS, KEPT, 16)
    assert isinstance(step, Step)
    assert torch.equal(step.packed.rows, given.rows)
    assert (step.packed.lengths, step.dtype) == ([2, 0, 1], pb.FLOAT32)
    assert (None if step.packed.positions is None else step.packed.positions.tolist()) == positions


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (pb.DecodeRequest(), "action is not set"),
        (encode_open(1, 1), "action is open"),
        (encode_truncate([1, 0]), "truncate.lengths has 2 entries"),
        (encode_truncate([4, 0, 5]), "more tokens than the sequence has"),
        (encode_reorder([0]), "reorder.sources has 1 entries"),
        (encode_reorder([0, 3, 1]), "reorder.sources holds 3"),
        (encode_step(packed([1]), pb.FLOAT32), "step.lengths has 1 entries"),
        (encode_step(packed([0, 0, 0]), pb.FLOAT32), "add up to 0 tokens"),
        (encode_step(packed([0, 13, 0]), pb.FLOAT32), "add up to 13 tokens"),
        (encode_step(packed([0, 0, 6]), pb.FLOAT32), "beyond the 10 tokens"),
        (encode_step(packed([1, 0, 1], [1]), pb.FLOAT32), "positions has 1 entries for 2"),
        (encode_step(packed([1, 0, 1], [1, 16]), pb.FLOAT32), "positions holds 16"),
    ],
)
def test_what_does_not_fit_is_refused(request_: pb.DecodeRequest, match: str) -> None:
    with pytest.raises(WireError, match=match):
        decode_action(request_.SerializeToString(), LIMITS, KEPT, 10)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (encode_step(packed([1]), pb.FLOAT32), "action is step"),
        (encode_open(0, 5), "open.sequences=0"),
        (encode_open(13, 5), "open.sequences=13"),
        (encode_open(1, 0), "open.max_tokens=0"),
        (encode_open(1, 17), "open.max_tokens=17"),
    ],
)
def test_a_stream_begins_with_open(request_: pb.DecodeRequest, match: str) -> None:
    with pytest.raises(WireError, match=match):
        decode_open(request_.SerializeToString(), LIMITS)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_action_or_a_refusal(data: bytes, opened: bool) -> None:
    try:
        action: Any = decode_action(data, LIMITS, KEPT, 10) if opened else decode_open(data, LIMITS)
    except (WireError, DecodeError):
        return
    assert isinstance(action, Open | Step | Truncate | Reorder)
