"""Tensors <-> messages, in inverse pairs.

Data path: bottom -> **wire.encode_request** -> Trunk.Forward -> **wire.decode_reply** -> surrogate joins.

A message holds the hidden states of real tokens only, as raw little-endian bytes: no padding, no pickle, nothing
that a decoder could execute. What leaves the node is exactly what `encode_request` writes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb

FLOATS: dict[pb.DType, torch.dtype] = {pb.BFLOAT16: torch.bfloat16, pb.FLOAT32: torch.float32}
SERVICE: str = pb.DESCRIPTOR.services_by_name["Trunk"].full_name
EXACT_SERVICE: str = pb.DESCRIPTOR.services_by_name["ExactGradient"].full_name
SHARES_SERVICE: str = pb.DESCRIPTOR.services_by_name["GradientShares"].full_name
REQUEST_ID = "x-request-id"  # metadata: the same in the logs of both sides
PUSHBACK = "grpc-retry-pushback-ms"  # trailer: gRPC's own name, so that any client with a retry policy obeys it
NAMES: dict[str, pb.DType] = {"bfloat16": pb.BFLOAT16, "float32": pb.FLOAT32, "int8": pb.INT8}
GROUP = 64  # channels that share a scale in int8
_OUTLIER = 4.0  # a channel whose peak is this many times the median channel's peak would cost its group's precision


def encode_rows(rows: Tensor, dtype: pb.DType) -> tuple[bytes, list[int]]:
    """Encode ``[tokens, hidden]`` as bytes of the wire `dtype`, and the outlier channels (int8 only, else empty)."""
    if dtype == pb.INT8:
        return _quantize(rows.detach().to(device="cpu", dtype=torch.float32))
    return _to_bytes(rows.detach().to(device="cpu", dtype=FLOATS[dtype])), []


def decode_rows(data: bytes, dtype: pb.DType, outliers: Sequence[int], num_rows: int, hidden_size: int) -> Tensor:
    """Inverse of `encode_rows`: ``[num_rows, hidden_size]`` in the wire `dtype`, float32 for int8.

    Raises:
        WireError: Unknown dtype, a size that does not fit, or values that are not finite; names the field.
    """
    if dtype not in NAMES.values():
        raise WireError(f"dtype={dtype} is unknown: expected one of {sorted(NAMES.values())} ({', '.join(NAMES)})")
    row_bytes = bytes_per_token(dtype, hidden_size, len(outliers))
    if len(data) != num_rows * row_bytes:
        raise WireError(
            f"hidden_states has {len(data)} bytes, but {num_rows} tokens of {hidden_size} channels make "
            f"{num_rows * row_bytes} ({row_bytes} a token)"
        )
    _check_outliers(dtype, outliers, hidden_size)
    if dtype == pb.INT8:
        return _dequantize(data, outliers, num_rows, hidden_size)
    return _finite(_from_bytes(data, FLOATS[dtype]).view(num_rows, hidden_size))


def bytes_per_token(dtype: pb.DType, hidden_size: int, num_outliers: int | None = None) -> int:
    """Bytes that one token's hidden state takes on the wire; for int8 by default with as many outliers as may be."""
    if dtype != pb.INT8:
        return hidden_size * FLOATS[dtype].itemsize
    num_outliers = max_outliers(hidden_size) if num_outliers is None else num_outliers
    return 2 * -(-hidden_size // GROUP) + hidden_size + 2 * num_outliers


def max_outliers(hidden_size: int) -> int:
    """How many channels of a message may go as they are, beside those that share scales."""
    return max(1, hidden_size // GROUP)


def _check_outliers(dtype: pb.DType, outliers: Sequence[int], hidden_size: int) -> None:
    if dtype != pb.INT8 and outliers:
        raise WireError("outliers is for dtype INT8 only: expected none")
    if len(outliers) > max_outliers(hidden_size):
        raise WireError(f"outliers has {len(outliers)} channels: expected at most {max_outliers(hidden_size)}")
    if any(a >= b for a, b in itertools.pairwise([-1, *outliers, hidden_size])):
        raise WireError(f"outliers must be ascending channels less than {hidden_size}")


def _quantize(rows: Tensor) -> tuple[bytes, list[int]]:
    """``[tokens, hidden]`` float32 -> the INT8 layout of `trunk.proto`.

    A value is off by at most half a scale: 1/253 of the largest value in its token's group of 64 channels. Channels
    that dwarf the others (real residual streams have some) would take that precision from their group for
    every token, so the worst of them go as bfloat16.
    """
    num_rows, hidden_size = rows.shape
    peaks = rows.abs().amax(0)
    worst = peaks.topk(max_outliers(hidden_size))
    outliers = sorted(worst.indices[worst.values > _OUTLIER * peaks.median()].tolist())
    kept = rows[:, outliers].to(torch.bfloat16)
    padded = torch.nn.functional.pad(rows, (0, -hidden_size % GROUP))
    if outliers:
        padded = padded.index_fill(1, torch.tensor(outliers), 0.0)
    groups = padded.view(num_rows, -1, GROUP)
    # Rounded up, so that no value exceeds 127 of them.
    scales = (groups.abs().amax(2) * ((1 + 2**-8) / 127)).to(torch.bfloat16)
    steps = scales.float().masked_fill(scales == 0, 1.0)
    values = (groups / steps[..., None]).round_().to(torch.int8).view(num_rows, -1)[:, :hidden_size]
    return _to_bytes(scales) + _to_bytes(values) + _to_bytes(kept), outliers


def _dequantize(data: bytes, outliers: Sequence[int], num_rows: int, hidden_size: int) -> Tensor:
    num_groups = -(-hidden_size // GROUP)
    ends = list(itertools.accumulate([0, 2 * num_rows * num_groups, num_rows * hidden_size]))
    scales, values, kept = (data[a:b] for a, b in itertools.pairwise([*ends, len(data)]))
    steps = _finite(_from_bytes(scales, torch.bfloat16)).float().view(num_rows, num_groups, 1)
    whole = torch.nn.functional.pad(
        _from_bytes(values, torch.int8).view(num_rows, hidden_size), (0, -hidden_size % GROUP)
    )
    rows = (whole.view(num_rows, num_groups, GROUP) * steps).view(num_rows, -1)[:, :hidden_size]
    if outliers:
        columns = _finite(_from_bytes(kept, torch.bfloat16)).float().view(num_rows, len(outliers))
        rows[:, list(outliers)] = columns
    return _finite(rows)


def _to_bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)  # a copy: bytes cannot be written to, tensors must


def _finite(values: Tensor) -> Tensor:
    # A sum is ten times as fast, and is finite only if all is; a sum that overflows is looked at again.
    if not math.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        raise WireError("hidden_states holds NaN or infinite values")
    return values


def pack(hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """``[batch, seq, hidden]`` and its padding mask -> rows of real tokens ``[sum(lengths), hidden]``, lengths.

    Raises:
        WireError: A sequence without a real token, or with padding between real tokens.
    """
    batch, seq, _ = hidden_states.shape
    if attention_mask is None:
        return hidden_states.reshape(batch * seq, -1), [seq] * batch
    real = attention_mask.bool()
    starts = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
    if not (starts.sum(1) == 1).all():
        raise WireError("attention_mask must have one unbroken run of real tokens per sequence")
    return hidden_states[real], real.sum(1).tolist()


def unpack(rows: Tensor, attention_mask: Tensor | None, batch: int) -> Tensor:
    """Inverse of `pack`: ``[batch, seq, hidden]`` with zeros at the padding."""
    if attention_mask is None:
        return rows.view(batch, -1, rows.shape[-1])
    real = attention_mask.bool()
    hidden_states = rows.new_zeros(*real.shape, rows.shape[-1])
    hidden_states[real] = rows
    return hidden_states


@dataclass(frozen=True)
class Packed:
    """A ragged batch: ``rows`` is ``[sum(lengths), hidden]``, ``positions`` ``[sum(lengths)]`` or None."""

    rows: Tensor
    lengths: list[int]
    positions: Tensor | None


def pack_batch(hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Packed:
    """What of one forward pass goes to the trunk; shapes as in `slots.Trunk.start`.

    Without a mask, positions that start anew begin another document of the same row, which transformers keeps apart
    from the one before: here it becomes a sequence of its own.

    Raises:
        WireError: See `pack`.
    """
    rows, lengths = pack(hidden_states, attention_mask)
    batch, seq, _ = hidden_states.shape
    if position_ids is None:
        position_ids = torch.arange(seq, device=rows.device)[None]
    positions = pack(position_ids.expand(batch, seq)[..., None], attention_mask)[0][:, 0].cpu()
    if attention_mask is None:
        lengths = [n for row in position_ids.expand(batch, seq).cpu() for n in _documents(row)]
    implied = torch.cat([torch.arange(n) for n in lengths])
    return Packed(rows, lengths, None if torch.equal(positions, implied) else positions)


def _documents(positions: Tensor) -> list[int]:
    """Find the lengths of the unbroken runs in one row's position ids ``[seq]``."""
    starts = (positions.diff() != 1).nonzero()[:, 0] + 1
    return [b - a for a, b in itertools.pairwise([0, *starts.tolist(), len(positions)])]


def cut(packed: Packed, max_tokens: int) -> list[Packed]:
    """Cut a ragged batch between sequences into parts of at most `max_tokens`, or of one sequence that is longer."""
    parts: list[Packed] = []
    first = start = end = 0
    for i, length in enumerate(packed.lengths):
        if end > start and end + length - start > max_tokens:
            parts.append(_slice(packed, slice(first, i), slice(start, end)))
            first, start = i, end
        end += length
    return [*parts, _slice(packed, slice(first, None), slice(start, end))]


def _slice(packed: Packed, sequences: slice, tokens: slice) -> Packed:
    positions = None if packed.positions is None else packed.positions[tokens]
    return Packed(packed.rows[tokens], packed.lengths[sequences], positions)


def encode_request(packed: Packed, dtype: pb.DType) -> pb.ForwardRequest:
    """Everything that one call sends to the trunk."""
    data, outliers = encode_rows(packed.rows, dtype)
    positions = [] if packed.positions is None else packed.positions.tolist()
    return pb.ForwardRequest(
        dtype=dtype, hidden_states=data, lengths=packed.lengths, positions=positions, outliers=outliers
    )


@dataclass(frozen=True)
class CallLimits:
    """What one call may hold."""

    hidden_size: int
    max_tokens: int
    max_sequence_length: int


def decode_request(request: pb.ForwardRequest, limits: CallLimits) -> Packed:
    """Inverse of `encode_request`, for input that nobody vouches for.

    Raises:
        WireError: Something does not fit; names the field, the value and the limit, never a tensor value.
    """
    if not 1 <= len(request.lengths) <= limits.max_tokens:
        raise WireError(f"lengths has {len(request.lengths)} entries: expected 1 to {limits.max_tokens}")
    lengths = list(request.lengths)
    if min(lengths) < 1:
        raise WireError("lengths holds 0: a sequence has at least 1 token")
    if max(lengths) > limits.max_sequence_length:
        raise WireError(f"lengths holds {max(lengths)}: a sequence has at most {limits.max_sequence_length} tokens")
    total = sum(lengths)
    if total > limits.max_tokens:
        raise WireError(f"lengths add up to {total} tokens: one call takes at most {limits.max_tokens}")
    if request.positions and len(request.positions) != total:
        raise WireError(f"positions has {len(request.positions)} entries for {total} tokens")
    if request.positions and max(request.positions) >= limits.max_sequence_length:
        raise WireError(f"positions holds {max(request.positions)}: expected less than {limits.max_sequence_length}")
    rows = decode_rows(request.hidden_states, request.dtype, request.outliers, total, limits.hidden_size)
    return Packed(rows, lengths, torch.tensor(request.positions) if request.positions else None)


def encode_reply(rows: Tensor, dtype: pb.DType, trunk_id: bytes = b"") -> pb.ForwardReply:
    """Output rows ``[sum(lengths), hidden]`` in the dtype that the request came in."""
    data, outliers = encode_rows(rows, dtype)
    return pb.ForwardReply(dtype=dtype, hidden_states=data, outliers=outliers, trunk_id=trunk_id)


def decode_reply(reply: pb.ForwardReply, request: pb.ForwardRequest, hidden_size: int) -> Tensor:
    """Inverse of `encode_reply`, checked against the request that it answers: ``[sum(lengths), hidden]``.

    Raises:
        WireError: The reply does not fit the request.
    """
    if reply.dtype != request.dtype:
        raise WireError(f"dtype={reply.dtype} in a reply to a request with dtype={request.dtype}")
    return decode_rows(reply.hidden_states, reply.dtype, reply.outliers, sum(request.lengths), hidden_size)


def encode_pull(packed: Packed, gradient: Tensor, dtype: pb.DType) -> pb.PullRequest:
    """What an exact gradient sends: hidden states, and dL/dh2 ``[sum(lengths), hidden]``. Not INT8."""
    return pb.PullRequest(forward=encode_request(packed, dtype), gradient=encode_rows(gradient, dtype)[0])


def encode_shares(packed: Packed, mask: pb.Mask, rest: Tensor) -> tuple[pb.PullRequest, pb.PullRequest]:
    """What an exact gradient in shares sends: to the first trunk, and to the second. FLOAT32 only.

    Args:
        packed: Hidden states; both get them.
        mask: For the first.
        rest: What the mask leaves of dL/dh2, ``[sum(lengths), hidden]``; for the second.
    """
    forward = encode_request(packed, pb.FLOAT32)
    return (
        pb.PullRequest(forward=forward, mask=mask),
        pb.PullRequest(forward=forward, gradient=encode_rows(rest, pb.FLOAT32)[0]),
    )


def decode_pull(request: pb.PullRequest, limits: CallLimits) -> tuple[Packed, Tensor]:
    """Inverse of `encode_pull`, for input that nobody vouches for.

    Raises:
        WireError: As `decode_request`.
    """
    if request.forward.dtype == pb.INT8:
        raise WireError("forward.dtype is INT8: gradients travel as FLOAT32 or BFLOAT16")
    packed = decode_request(request.forward, limits)
    return packed, decode_rows(request.gradient, request.forward.dtype, (), len(packed.rows), limits.hidden_size)


def encode_pull_reply(gradient: Tensor, dtype: pb.DType, trunk_id: bytes = b"") -> pb.PullReply:
    """dL/dh1, ``[sum(lengths), hidden]``, in the dtype of the request."""
    return pb.PullReply(dtype=dtype, gradient=encode_rows(gradient, dtype)[0], trunk_id=trunk_id)


def decode_pull_reply(reply: pb.PullReply, request: pb.PullRequest, hidden_size: int) -> Tensor:
    """Inverse of `encode_pull_reply`: ``[sum(lengths), hidden]``.

    Raises:
        WireError: The reply does not fit the request.
    """
    if reply.dtype != request.forward.dtype:
        raise WireError(f"dtype={reply.dtype} in a reply to a request with dtype={request.forward.dtype}")
    return decode_rows(reply.gradient, reply.dtype, (), sum(request.forward.lengths), hidden_size)
