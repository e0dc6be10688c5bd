"""Messages of a generation stream <-> what they mean, in inverse pairs; tensors as in `wire`.

Data path: bottom -> **encode_step** -> Trunk.Decode -> **decode_action** -> layers with a cache -> top.

What leaves the node is what `wire.encode_request` writes, and three kinds of small numbers: lengths, orders, room.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_split import wire
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb


@dataclass(frozen=True)
class Open:
    """The first message: room for so many tokens in each of so many sequences."""

    sequences: int
    max_tokens: int


@dataclass(frozen=True)
class Step:
    """New tokens: ``packed.lengths`` has an entry for each sequence of the stream, 0 for none."""

    packed: wire.Packed
    dtype: pb.DType


@dataclass(frozen=True)
class Truncate:
    """How many tokens of each sequence stay."""

    lengths: list[int]


@dataclass(frozen=True)
class Reorder:
    """Which sequence's tokens each one goes on from."""

    sources: list[int]


Action = Step | Truncate | Reorder


def encode_open(sequences: int, max_tokens: int) -> pb.DecodeRequest:
    """The first message of a stream."""
    return pb.DecodeRequest(open=pb.DecodeOpen(sequences=sequences, max_tokens=max_tokens))


def encode_step(packed: wire.Packed, dtype: pb.DType) -> pb.DecodeRequest:
    """New tokens; see `Step`."""
    return pb.DecodeRequest(step=wire.encode_request(packed, dtype))


def encode_truncate(lengths: Sequence[int]) -> pb.DecodeRequest:
    """See `Truncate`."""
    return pb.DecodeRequest(truncate=pb.DecodeTruncate(lengths=lengths))


def encode_reorder(sources: Sequence[int]) -> pb.DecodeRequest:
    """See `Reorder`."""
    return pb.DecodeRequest(reorder=pb.DecodeReorder(sources=sources))


def decode_open(data: bytes, limits: wire.CallLimits) -> Open:
    """Inverse of `encode_open`, for input that nobody vouches for.

    Raises:
        DecodeError: It is no DecodeRequest.
        WireError: It does not fit; names the field.
    """
    request = pb.DecodeRequest.FromString(data)
    if (action := request.WhichOneof("action")) != "open":
        raise WireError(f"action is {action or 'not set'}: a stream begins with open")
    if not 1 <= request.open.sequences <= limits.max_tokens:
        raise WireError(f"open.sequences={request.open.sequences}: expected 1 to {limits.max_tokens}")
    if not 1 <= request.open.max_tokens <= limits.max_sequence_length:
        raise WireError(
            f"open.max_tokens={request.open.max_tokens}: a sequence has 1 to {limits.max_sequence_length} tokens"
        )
    return Open(request.open.sequences, request.open.max_tokens)


def decode_action(data: bytes, limits: wire.CallLimits, kept: Sequence[int], max_tokens: int) -> Action:
    """Inverse of the other encoders, for input that nobody vouches for.

    Args:
        data: A DecodeRequest whose size was looked at.
        limits: What one message may hold.
        kept: Tokens that each sequence of the stream has.
        max_tokens: Each sequence's room.

    Raises:
        DecodeError: It is no DecodeRequest.
        WireError: It does not fit; names the field, never a tensor value.
    """
    request = pb.DecodeRequest.FromString(data)
    action = request.WhichOneof("action")
    if action is None or action == "open":
        raise WireError(f"action is {action or 'not set'}: expected step, truncate or reorder")
    if action == "step":
        return Step(_decode_step(request.step, limits, kept, max_tokens), request.step.dtype)
    if action == "truncate":
        lengths = _one_each("truncate.lengths", request.truncate.lengths, kept)
        if any(new > old for new, old in zip(lengths, kept, strict=True)):
            raise WireError("truncate.lengths holds more tokens than the sequence has")
        return Truncate(lengths)
    sources = _one_each("reorder.sources", request.reorder.sources, kept)
    if max(sources) >= len(kept):
        raise WireError(f"reorder.sources holds {max(sources)}: the stream has {len(kept)} sequences")
    return Reorder(sources)


def cut(packed: wire.Packed, max_tokens: int) -> Iterator[wire.Packed]:
    """Cut a step between tokens, into pieces of about `max_tokens` at most, each with the next tokens of all."""
    if len(packed.rows) <= max_tokens:
        yield packed
        return
    rows = packed.rows.split(packed.lengths)
    places = None if packed.positions is None else packed.positions.split(packed.lengths)
    done = 0
    while active := sum(length > done for length in packed.lengths):
        part = slice(done, done + max(1, max_tokens // active))
        new = [r[part] for r in rows]
        positions = None if places is None else torch.cat([p[part] for p in places])
        yield wire.Packed(torch.cat(new), [len(r) for r in new], positions)
        done = part.stop


def join(pieces: Sequence[tuple[Tensor, Sequence[int]]]) -> Tensor:
    """Inverse of `cut`, of rows and lengths each: rows of a sequence one after another again."""
    if len(pieces) == 1:
        return pieces[0][0]
    return torch.cat([r for rows in zip(*(p.split(list(n)) for p, n in pieces), strict=True) for r in rows])


def _decode_step(
    request: pb.ForwardRequest, limits: wire.CallLimits, kept: Sequence[int], max_tokens: int
) -> wire.Packed:
    lengths = _one_each("step.lengths", request.lengths, kept)
    total = sum(lengths)
    if not 1 <= total <= limits.max_tokens:
        raise WireError(f"step.lengths add up to {total} tokens: one step takes 1 to {limits.max_tokens}")
    if any(old + new > max_tokens for old, new in zip(kept, lengths, strict=True)):
        raise WireError(f"step.lengths go beyond the {max_tokens} tokens that open.max_tokens reserved for a sequence")
    if request.positions and len(request.positions) != total:
        raise WireError(f"step.positions has {len(request.positions)} entries for {total} tokens")
    if request.positions and max(request.positions) >= limits.max_sequence_length:
        raise WireError(
            f"step.positions holds {max(request.positions)}: expected less than {limits.max_sequence_length}"
        )
    rows = wire.decode_rows(request.hidden_states, request.dtype, request.outliers, total, limits.hidden_size)
    return wire.Packed(rows, lengths, torch.tensor(request.positions) if request.positions else None)


def _one_each(field: str, values: Sequence[int], kept: Sequence[int]) -> list[int]:
    if len(values) != len(kept):
        raise WireError(f"{field} has {len(values)} entries: the stream has {len(kept)} sequences")
    return list(values)
