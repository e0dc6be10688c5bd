"""Tensors <-> messages, in inverse pairs.

Data path: bottom -> **wire.encode_request** -> Trunk.Forward -> **wire.decode_reply** -> surrogate joins.

A message holds the hidden states of real tokens only, as raw little-endian bytes: no padding, no pickle, nothing
that a decoder could execute. What leaves the node is exactly what `encode_request` writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb

DTYPES: dict[pb.DType, torch.dtype] = {pb.BFLOAT16: torch.bfloat16, pb.FLOAT32: torch.float32}
NAMES: dict[str, pb.DType] = {"bfloat16": pb.BFLOAT16, "float32": pb.FLOAT32}


def to_bytes(rows: Tensor, dtype: pb.DType) -> bytes:
    """Encode a floating-point tensor of any shape as raw bytes of the wire `dtype`."""
    flat = rows.detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: pb.DType, num_rows: int, hidden_size: int) -> Tensor:
    """Decode raw bytes into ``[num_rows, hidden_size]`` of the wire `dtype`.

    Raises:
        WireError: Unknown dtype, a size that does not fit, or values that are not finite; names the field.
    """
    if dtype not in DTYPES:
        raise WireError(f"dtype={dtype} is unknown: expected one of {sorted(DTYPES)} ({', '.join(NAMES)})")
    expected = num_rows * hidden_size * DTYPES[dtype].itemsize
    if len(data) != expected:
        raise WireError(
            f"hidden_states has {len(data)} bytes, but {num_rows} tokens x {hidden_size} x "
            f"{DTYPES[dtype].itemsize} bytes make {expected}"
        )
    rows = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(num_rows, hidden_size)
    if not torch.isfinite(rows).all():
        raise WireError("hidden_states holds NaN or infinite values")
    return rows


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


def encode_request(
    hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, dtype: pb.DType
) -> pb.ForwardRequest:
    """Everything that one forward pass sends to the trunk; shapes as in `split.Trunk.start`."""
    rows, lengths = pack(hidden_states, attention_mask)
    batch, seq, _ = hidden_states.shape
    if position_ids is None:
        position_ids = torch.arange(seq, device=rows.device)[None]
    positions, _ = pack(position_ids.expand(batch, seq)[..., None], attention_mask)
    implied = torch.cat([torch.arange(n, device=rows.device) for n in lengths])
    explicit: list[int] = [] if torch.equal(positions[:, 0], implied) else positions[:, 0].tolist()
    return pb.ForwardRequest(dtype=dtype, hidden_states=to_bytes(rows, dtype), lengths=lengths, positions=explicit)


@dataclass(frozen=True)
class Limits:
    """What one call may hold."""

    hidden_size: int
    max_tokens: int
    max_sequence_length: int


@dataclass(frozen=True)
class Packed:
    """A decoded request: ``rows`` is ``[sum(lengths), hidden]``, ``positions`` ``[sum(lengths)]`` or None."""

    rows: Tensor
    lengths: list[int]
    positions: Tensor | None


def decode_request(request: pb.ForwardRequest, limits: Limits) -> Packed:
    """Inverse of `encode_request`, for input that nobody vouches for.

    Raises:
        WireError: Something does not fit; names the field, the value and the limit, never a tensor value.
    """
    lengths = list(request.lengths)
    if not lengths or min(lengths) < 1:
        raise WireError("lengths must hold at least one sequence, each of at least 1 token")
    if max(lengths) > limits.max_sequence_length:
        raise WireError(f"lengths holds {max(lengths)}: a sequence has at most {limits.max_sequence_length} tokens")
    total = sum(lengths)
    if total > limits.max_tokens:
        raise WireError(f"lengths add up to {total} tokens: one call takes at most {limits.max_tokens}")
    if request.positions and len(request.positions) != total:
        raise WireError(f"positions has {len(request.positions)} entries for {total} tokens")
    if request.positions and max(request.positions) >= limits.max_sequence_length:
        raise WireError(f"positions holds {max(request.positions)}: expected less than {limits.max_sequence_length}")
    rows = from_bytes(request.hidden_states, request.dtype, total, limits.hidden_size)
    return Packed(rows, lengths, torch.tensor(request.positions) if request.positions else None)


def encode_reply(rows: Tensor, dtype: pb.DType) -> pb.ForwardReply:
    """Output rows ``[sum(lengths), hidden]`` in the dtype that the request came in."""
    return pb.ForwardReply(dtype=dtype, hidden_states=to_bytes(rows, dtype))


def decode_reply(reply: pb.ForwardReply, request: pb.ForwardRequest, hidden_size: int) -> Tensor:
    """Inverse of `encode_reply`, checked against the request that it answers: ``[sum(lengths), hidden]``.

    Raises:
        WireError: The reply does not fit the request.
    """
    if reply.dtype != request.dtype:
        raise WireError(f"dtype={reply.dtype} in a reply to a request with dtype={request.dtype}")
    return from_bytes(reply.hidden_states, reply.dtype, sum(request.lengths), hidden_size)


def pad(packed: Packed) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lay packed sequences out as a batch for a model: padded on the right, ``[batch, seq, hidden]``.

    Returns:
        Hidden states, attention mask ``[batch, seq]`` (None if nothing is padded), position ids (None if implied).
    """
    batch, seq = len(packed.lengths), max(packed.lengths)
    mask = None if min(packed.lengths) == seq else mask_of(packed.lengths)
    positions = None
    if packed.positions is not None:
        positions = unpack(packed.positions[:, None], mask, batch)[..., 0]
    return unpack(packed.rows, mask, batch), mask, positions


def mask_of(lengths: Sequence[int]) -> Tensor:
    """Padding mask ``[batch, seq]`` of sequences padded on the right."""
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
