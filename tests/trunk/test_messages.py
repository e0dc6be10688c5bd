"""Messages that nobody vouches for: refused by field, and before they cost anything."""

import grpc
import pytest
import torch
from trunk_service import HIDDEN, forward, refused, request, serving

from fl_split import wire
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import messages
from fl_split.trunk.layers import HeldLayers

_Code = grpc.StatusCode


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
