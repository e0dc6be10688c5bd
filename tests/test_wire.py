"""The wire format: inverse pairs, int8's error bound, and a decoder that hostile input cannot surprise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_split import wire
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb

LIMITS = wire.CallLimits(hidden_size=8, max_tokens=64, max_sequence_length=16)


def rows_of(num_rows: int, hidden_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_round_trip(name: str, padded: bool) -> None:
    dtype = wire.NAMES[name]
    hidden_states = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6)[None] < torch.tensor([6, 2, 4])[:, None]).long() if padded else None
    request = wire.encode_request(wire.pack_batch(hidden_states, mask, None), dtype)
    packed = wire.decode_request(pb.ForwardRequest.FromString(request.SerializeToString()), LIMITS)
    assert packed.lengths == ([6, 2, 4] if padded else [6, 6, 6])
    assert packed.positions is None
    reply = wire.encode_reply(packed.rows, dtype)
    back = wire.unpack(wire.decode_reply(reply, request, 8), mask, 3).float()
    real = mask.bool() if mask is not None else torch.ones(3, 6, dtype=torch.bool)
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.05}[name]
    torch.testing.assert_close(back[real], hidden_states[real], rtol=tolerance, atol=tolerance if name == "int8" else 0)


def test_left_padding_keeps_its_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    packed = wire.pack_batch(torch.zeros(2, 4, 8), mask, None)
    assert packed.lengths == [2, 4]
    assert packed.positions is not None and packed.positions.tolist() == [2, 3, 0, 1, 2, 3]


def test_documents_packed_into_one_row_become_sequences() -> None:
    packed = wire.pack_batch(torch.zeros(1, 5, 8), None, torch.tensor([[0, 1, 0, 1, 2]]))
    assert packed.lengths == [2, 3]
    assert packed.positions is None


def test_padding_between_real_tokens_is_refused() -> None:
    with pytest.raises(WireError, match="one unbroken run"):
        wire.pack_batch(torch.zeros(1, 3, 8), torch.tensor([[1, 0, 1]]), None)


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(100, [[5, 3, 9, 1]]), (9, [[5, 3], [9], [1]]), (1, [[5], [3], [9], [1]])]
)
def test_cut_between_sequences(max_tokens: int, expected: list[list[int]]) -> None:
    rows = rows_of(18, 8)
    parts = wire.cut(wire.Packed(rows, [5, 3, 9, 1], torch.arange(18)), max_tokens)
    assert [part.lengths for part in parts] == expected
    assert torch.equal(torch.cat([part.rows for part in parts]), rows)
    assert torch.cat([part.positions for part in parts if part.positions is not None]).tolist() == list(range(18))


@pytest.mark.parametrize("hidden_size", [8, 64, 96, 192, 768])
def test_int8_error_is_at_most_half_a_step_of_its_group(hidden_size: int) -> None:
    rows = rows_of(50, hidden_size)
    data, outliers = wire.encode_rows(rows, pb.INT8)
    assert outliers == []
    error = (wire.decode_rows(data, pb.INT8, outliers, 50, hidden_size) - rows).abs()
    for group, values in zip(error.split(wire.GROUP, 1), rows.split(wire.GROUP, 1), strict=True):
        assert (group <= values.abs().amax(1, keepdim=True) / 252).all()


def test_int8_keeps_outlier_channels() -> None:
    """Real residual streams have a few channels that dwarf the rest: one scale per token loses the rest to them."""
    rows = rows_of(200, 768)
    rows[:, [5, 300, 301]] *= 60
    data, outliers = wire.encode_rows(rows, pb.INT8)
    assert outliers == [5, 300, 301]
    others = [i for i in range(768) if i not in outliers]
    decoded = wire.decode_rows(data, pb.INT8, outliers, 200, 768)
    assert (decoded - rows)[:, others].norm() / rows[:, others].norm() < 0.008
    scale = rows.abs().amax(1, keepdim=True) / 127
    per_token = (rows / scale).round() * scale
    assert (per_token - rows)[:, others].norm() / rows[:, others].norm() > 0.1


def test_int8_is_a_quarter_of_float32_and_a_sixteenth() -> None:
    data, _ = wire.encode_rows(rows_of(10, 768), pb.INT8)
    assert len(data) / (10 * 768 * 4) <= 0.27
    assert wire.bytes_per_token(pb.INT8, 768) / (768 * 4) <= 0.27


def request(**changes: object) -> pb.ForwardRequest:
    fields: dict[str, object] = {
        "dtype": pb.FLOAT32,
        "lengths": [3, 2],
        "hidden_states": wire.encode_rows(rows_of(5, 8), pb.FLOAT32)[0],
    }
    return pb.ForwardRequest(**{**fields, **changes})  # type: ignore[arg-type]


NAN = wire.encode_rows(torch.full((5, 8), float("nan")), pb.FLOAT32)[0]
INT8_BYTES = 5 * wire.bytes_per_token(pb.INT8, 8, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 0}, "dtype=0 is unknown: expected one of"),
        ({"dtype": 99}, "dtype=99 is unknown"),
        ({"lengths": []}, "lengths has 0 entries: expected 1 to 64"),
        ({"lengths": [1] * 65}, "lengths has 65 entries"),
        ({"lengths": [5, 0]}, "lengths holds 0"),
        ({"lengths": [17]}, "lengths holds 17: a sequence has at most 16"),
        ({"lengths": [2**32 - 1]}, "lengths holds 4294967295"),
        ({"lengths": [16] * 5}, "lengths add up to 80 tokens: one call takes at most 64"),
        ({"lengths": [3, 3]}, "hidden_states has 160 bytes, but 6 tokens of 8 channels make 192"),
        ({"hidden_states": b""}, "hidden_states has 0 bytes"),
        ({"dtype": pb.BFLOAT16}, "hidden_states has 160 bytes, but 5 tokens of 8 channels make 80"),
        ({"hidden_states": NAN}, "NaN or infinite"),
        ({"positions": [1, 2]}, "positions has 2 entries for 5 tokens"),
        ({"positions": [0, 1, 2, 0, 16]}, "positions holds 16: expected less than 16"),
        ({"outliers": [1]}, "outliers is for dtype INT8 only"),
        ({"dtype": pb.INT8, "outliers": [8], "hidden_states": bytes(INT8_BYTES)}, "ascending channels less than 8"),
        ({"dtype": pb.INT8, "outliers": [1, 2], "hidden_states": bytes(INT8_BYTES + 10)}, "outliers has 2 channels"),
        ({"dtype": pb.INT8, "outliers": [0], "hidden_states": b"\xff" * INT8_BYTES}, "NaN or infinite"),
    ],
)
def test_decoder_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.decode_request(request(**changes), LIMITS)


def test_reply_of_another_dtype_is_refused() -> None:
    with pytest.raises(WireError, match="in a reply to a request with dtype=1"):
        wire.decode_reply(wire.encode_reply(rows_of(5, 8), pb.BFLOAT16), request(), 8)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.integers(0, 9),
            "lengths": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 5), max_size=70),
            "positions": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 5), max_size=8),
            "outliers": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), max_size=3),
            "hidden_states": st.binary(max_size=200),
        },
    )
)
def test_decoder_takes_or_refuses_any_fields(changes: dict[str, object]) -> None:
    try:
        packed = wire.decode_request(request(**changes), LIMITS)
    except WireError:
        return
    assert len(packed.rows) == sum(packed.lengths) <= 64
    assert torch.isfinite(packed.rows).all()
