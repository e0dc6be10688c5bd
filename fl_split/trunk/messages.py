"""What travels in a call, as bytes -> what is computed -> bytes. For input that nobody vouches for.

Data path: received bytes -> **sizes, fields, values checked** -> fair queue -> layers -> **reply's bytes**.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from google.protobuf.message import DecodeError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fl_split import wire
from fl_split.errors import WireError
from fl_split.model.trunk import pull_back
from fl_split.proto import trunk_pb2 as pb
from fl_split.shares import MAX_STD, SEED_BYTES, mask_of, step_of

Fields = Mapping[int, Any]  # of a message: its tensors, None for bytes, or the fields of a message in it
Decode = Callable[[bytes, wire.CallLimits], tuple[pb.DType, wire.Packed]]

R = TypeVar("R")

_INLINE_BYTES = 65_536  # decoding less than this takes less time than handing it to a thread
_FORWARD: Fields = {2: None}  # hidden_states
_PULL: Fields = {1: _FORWARD, 2: None}  # forward, gradient


def decode_forward(data: bytes, limits: wire.CallLimits) -> tuple[pb.DType, wire.Packed]:
    """A ForwardRequest: the dtype to answer in, and what to run.

    Raises:
        DecodeError: It is none.
        WireError: See `wire.decode_request`.
    """
    check_sizes(data, limits, _FORWARD)
    request = pb.ForwardRequest.FromString(data)
    return request.dtype, wire.decode_request(request, limits)


def decode_pull(data: bytes, limits: wire.CallLimits) -> tuple[pb.DType, wire.Packed]:
    """A PullRequest: as `decode_forward`, but the rows are ``[sum(lengths), 2 hidden]``, the gradient's on the right.

    Raises:
        DecodeError: It is none.
        WireError: See `wire.decode_pull`.
    """
    check_sizes(data, limits, _PULL)
    request = pb.PullRequest.FromString(data)
    packed, gradient = wire.decode_pull(request, limits)
    return request.forward.dtype, wire.Packed(torch.cat([packed.rows, gradient], 1), packed.lengths, packed.positions)


def decode_share(data: bytes, limits: wire.CallLimits) -> tuple[pb.DType, wire.Packed]:
    """A PullRequest with one share of a gradient, or with the mask that it is made of; as `decode_pull`.

    Raises:
        DecodeError: It is none.
        WireError: See `wire.decode_pull`; or the mask is none.
    """
    check_sizes(data, limits, _PULL)
    request = pb.PullRequest.FromString(data)
    if request.forward.dtype != pb.FLOAT32:
        raise WireError(f"forward.dtype={request.forward.dtype}: shares travel as FLOAT32")
    if not request.HasField("mask"):
        return decode_pull(data, limits)
    if request.gradient:
        raise WireError("gradient and mask are both there: expected one of them")
    seed, std, step = request.mask.seed, request.mask.std, request.mask.step
    if len(seed) != SEED_BYTES:
        raise WireError(f"mask.seed has {len(seed)} bytes: expected {SEED_BYTES}")
    if not 1 <= std <= MAX_STD:
        raise WireError(f"mask.std={std:g}: expected 1 to {MAX_STD:g}")
    if step != step_of(std):
        raise WireError(f"mask.step={step:g}: expected {step_of(std):g} for this mask.std")
    packed = wire.decode_request(request.forward, limits)
    rows = torch.cat([packed.rows, mask_of(seed, std, step, *packed.rows.shape)], 1)
    return pb.FLOAT32, wire.Packed(rows, packed.lengths, packed.positions)


def check_sizes(data: bytes, limits: wire.CallLimits, tensors: Fields) -> None:
    """Refuse before parsing what holds more numbers than any request: a byte of them makes four or more in memory.

    Args:
        data: The message.
        limits: A length and a position a token, and a few outliers, are what may be beside the tensors.
        tensors: Fields that do not count.

    Raises:
        DecodeError: It is no message at all.
        WireError: It is one that is too large.
    """
    most = 12 * limits.max_tokens + limits.hidden_size + 64
    if (size := _other_bytes(memoryview(data), tensors, most)) > most:
        raise WireError(f"the message has at least {size} bytes beside its tensors: expected at most {most}")


def _other_bytes(data: memoryview, tensors: Fields, most: int) -> int:
    """Count bytes outside of `tensors`, until they are more than `most`."""
    count = at = 0
    while at < len(data) and count <= most:
        begin = at
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at)
                if tag >> 3 in tensors:
                    inside = tensors[tag >> 3]
                    count += 0 if inside is None else _other_bytes(data[at : at + size], inside, most)
                    count -= size
                at += size
            case 5:
                at += 4
            case _:
                raise DecodeError("a group")
        count += at - begin
    return count


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise DecodeError("a number that does not end")


def encode_forward(rows: Tensor, dtype: pb.DType, trunk_id: bytes) -> bytes:
    """The ForwardReply."""
    return wire.encode_reply(rows, dtype, trunk_id).SerializeToString()


def encode_pull(rows: Tensor, dtype: pb.DType, trunk_id: bytes) -> bytes:
    """The PullReply."""
    return wire.encode_pull_reply(rows, dtype, trunk_id).SerializeToString()


def run_pulls(model: PreTrainedModel, requests: Sequence[wire.Packed]) -> list[Tensor]:
    """dL/dh1 of each request that `decode_pull` made."""
    return [_run_pull(model, packed) for packed in requests]


def _run_pull(model: PreTrainedModel, packed: wire.Packed) -> Tensor:
    def padded(rows: Tensor) -> Tensor:
        return pad_sequence(rows.split(packed.lengths), batch_first=True)

    hidden_states, gradient = padded(packed.rows.float()).chunk(2, -1)
    mask = padded(torch.ones(sum(packed.lengths), dtype=torch.long))
    positions = None if packed.positions is None else padded(packed.positions)
    return wire.pack(pull_back(model, hidden_states, mask, positions, gradient), mask)[0]


async def in_thread_if(size_bytes: int, function: Callable[..., R], *args: Any) -> R:
    """Call a function, in a thread if it is about much data."""
    return await asyncio.to_thread(function, *args) if size_bytes > _INLINE_BYTES else function(*args)
