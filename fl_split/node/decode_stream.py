"""A generation stream to one replica of the trunk.

Data path: bottom -> **encode_step, over a stream, decode** -> top. The trunk keeps keys and values exactly as long as
the stream lasts. When it is lost, whoever opened it opens another, at any replica, with all that was sent.
"""

import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from torch import Tensor

from fl_split import wire, wire_decode
from fl_split.errors import WireError
from fl_split.model.generation import StreamLost
from fl_split.node.call_errors import LateReply
from fl_split.node.calls import Calls
from fl_split.node.replicas import Replica
from fl_split.proto import trunk_pb2 as pb

_TICK_S = 0.25  # how late a reply is found to be late


class DecodeStream:
    """A `generation.Stream` that is a stream of a trunk's replica."""

    def __init__(self, calls: Calls, replica: Replica, metadata: Any) -> None:
        self._calls, self._replica = calls, replica
        self._requests: queue.SimpleQueue[pb.DecodeRequest | None] = queue.SimpleQueue()
        self._due, self._late, self._closed = math.inf, False, threading.Event()
        self._call = replica.decode(iter(self._requests.get, None), metadata=metadata)
        threading.Thread(target=self._watch, name="trunk-stream", daemon=True).start()

    def begin(self, packed: wire.Packed, room: int, timeout_s: float) -> Tensor:
        """Open it, with its first step.

        Raises:
            grpc.RpcError: It was lost, put off or refused.
        """
        self._requests.put(wire_decode.encode_open(len(packed.lengths), room))
        try:
            return self._exchange(packed, timeout_s)
        except BaseException:
            self.close()
            raise

    def _watch(self) -> None:
        """End the call when a reply is late. Replies are taken without another thread: that took a token's time."""
        while not self._closed.wait(_TICK_S):
            if time.monotonic() > self._due:
                self._late = True
                self._call.cancel()
                return

    def step(self, packed: wire.Packed) -> Tensor:
        """See `generation.Stream.step`.

        Raises:
            StreamLost: Open another.
            TrunkError: Asking again would not help.
        """
        started = time.monotonic()
        try:
            return self._exchange(packed, self._calls.timeout_s)
        except grpc.RpcError as error:
            self.close()
            self._calls.put_off_or_raise(self._replica, error, time.monotonic() - started)
            raise StreamLost from error

    def _exchange(self, packed: wire.Packed, timeout_s: float) -> Tensor:
        calls, started = self._calls, time.monotonic()
        self._due = started + timeout_s
        sent = []
        for piece in wire_decode.cut(packed, calls.tokens_per_call()):
            request = wire_decode.encode_step(piece, calls.wire_dtype)
            self._requests.put(request)
            sent.append((request, piece.lengths))
        pieces = []
        for request, lengths in sent:
            reply = self._take()
            calls.check_origin(reply)
            try:
                rows = wire.decode_reply(reply, request.step, calls.hidden_size)
            except WireError as error:
                raise WireError(f"the trunk at {self._replica.address} sent a bad reply: {error}") from error
            pieces.append((rows, lengths))
            calls.count(request.ByteSize(), reply.ByteSize(), 0.0)
        self._due = math.inf
        calls.count(0, 0, time.monotonic() - started)
        return wire_decode.join(pieces)

    def _take(self) -> pb.ForwardReply:
        try:
            reply: pb.ForwardReply | None = next(self._call, None)
        except grpc.RpcError as error:
            raise (LateReply() if self._late else error) from None
        if reply is None:  # ended without a word
            raise LateReply
        return reply

    def truncate(self, lengths: Sequence[int]) -> None:
        """See `generation.Stream.truncate`."""
        self._requests.put(wire_decode.encode_truncate(lengths))

    def reorder(self, sources: Sequence[int]) -> None:
        """See `generation.Stream.reorder`."""
        self._requests.put(wire_decode.encode_reorder(sources))

    def close(self) -> None:
        """End the stream; what the trunk keeps for it is dropped."""
        self._closed.set()
        self._requests.put(None)
        self._call.cancel()
