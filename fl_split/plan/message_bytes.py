"""What messages between a node and its trunk take on the wire, from lengths alone."""

import torch

from fl_split import wire
from fl_split.proto import trunk_pb2 as pb
from fl_split.shares import SEED_BYTES


def request_bytes(lengths: list[int], dtype: pb.DType, hidden_size: int) -> int:
    """Bytes of the request for sequences of these lengths; for int8 with as many outlier channels as may be."""
    rows = bytes(sum(lengths) * wire.bytes_per_token(dtype, hidden_size))
    return pb.ForwardRequest(
        dtype=dtype, hidden_states=rows, lengths=lengths, outliers=_outliers(dtype, hidden_size)
    ).ByteSize()


def reply_bytes(lengths: list[int], dtype: pb.DType, hidden_size: int) -> int:
    """Bytes of the reply to `request_bytes`."""
    rows = bytes(sum(lengths) * wire.bytes_per_token(dtype, hidden_size))
    reply = pb.ForwardReply(dtype=dtype, hidden_states=rows, outliers=_outliers(dtype, hidden_size), trunk_id=bytes(16))
    return reply.ByteSize()


def pull_bytes(lengths: list[int], dtype: pb.DType, hidden_size: int) -> tuple[int, int]:
    """Bytes of the request and the reply of an exact gradient, which int8 is not for."""
    dtype = pb.BFLOAT16 if dtype == pb.INT8 else dtype
    rows = torch.zeros(sum(lengths), hidden_size)
    request = wire.encode_pull(wire.Packed(rows, lengths, None), rows, dtype)
    return request.ByteSize(), wire.encode_pull_reply(rows, dtype, bytes(16)).ByteSize()


def share_bytes(lengths: list[int], hidden_size: int) -> tuple[int, int]:
    """Bytes of both requests and both replies of an exact gradient in shares."""
    rows = torch.zeros(sum(lengths), hidden_size)
    mask = pb.Mask(seed=bytes(SEED_BYTES), std=1.0, step=1.0)
    sent = wire.encode_shares(wire.Packed(rows, lengths, None), mask, rows)
    reply = wire.encode_pull_reply(rows, pb.FLOAT32, bytes(16))
    return sum(request.ByteSize() for request in sent), 2 * reply.ByteSize()


def _outliers(dtype: pb.DType, hidden_size: int) -> list[int]:
    return list(range(hidden_size - wire.max_outliers(hidden_size), hidden_size)) if dtype == pb.INT8 else []
