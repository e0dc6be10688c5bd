"""The node's side of the trunk service.

Data path: bottom -> **encode, call, decode** -> surrogate joins. Calls run on threads of their own, so that the
node computes while the trunk does. The trunk is stateless, so a call that was lost is made again.
"""

import itertools
import logging
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from torch import Tensor
from transformers import AutoConfig

from fl_split import wire
from fl_split.checkpoint import config_digest, weights_digest
from fl_split.errors import TrunkError, TrunkMismatch, TrunkRefused, TrunkUnavailable, WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.split import Boundaries, examine
from fl_split.trunk.server import SERVICE

logger = logging.getLogger(__name__)

_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # replies are checked against their requests
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # a restarted trunk is found within seconds, not minutes
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Expected:
    """What a node needs its trunk to be."""

    config_digest: str
    weights_digest: str | None  # None: the node does not have the trunk's part of the checkpoint
    first_layer: int
    end_layer: int
    hidden_size: int

    @classmethod
    def from_checkpoint(cls, folder: Path, bottom_layers: int, top_layers: int) -> Self:
        """Work it out from the node's own copy of the base model.

        Raises:
            SplitError: The model cannot be split here.
        """
        config = AutoConfig.from_pretrained(folder)
        anatomy = examine(config)
        cut = Boundaries.of(anatomy, bottom_layers, top_layers)
        digest = weights_digest(folder, cut.layers_name, cut.trunk)
        return cls(config_digest(config), digest, cut.first, cut.end, config.hidden_size)

    def check(self, reply: pb.DescribeReply, address: str, dtype: pb.DType) -> None:
        """Compare with what a trunk says of itself.

        Raises:
            TrunkMismatch: They differ; names both sides.
        """
        held = (reply.first_layer, reply.end_layer)
        if held != (self.first_layer, self.end_layer):
            raise TrunkMismatch(
                f"the trunk at {address} holds layers {held[0]} to {held[1] - 1}, this node needs {self.first_layer} "
                f"to {self.end_layer - 1}: make split.bottom-layers and split.top-layers the same on both sides"
            )
        if reply.config_digest != self.config_digest or reply.hidden_size != self.hidden_size:
            raise TrunkMismatch(
                f"the trunk at {address} serves another model ({reply.model_type}, config {reply.config_digest[:12]}) "
                f"than this node's (config {self.config_digest[:12]}): set model.name to the one that the trunk serves"
            )
        if self.weights_digest is not None and reply.weights_digest != self.weights_digest:
            raise TrunkMismatch(
                f"the trunk at {address} has other weights ({reply.weights_digest[:12]}) than this node's copy of the "
                f"model ({self.weights_digest[:12]}): use the same checkpoint and model.revision on both sides"
            )
        if dtype not in reply.dtypes:
            raise TrunkMismatch(
                f"the trunk at {address} does not take trunk.wire-dtype={_name(dtype)!r}: "
                f"it takes {', '.join(_name(d) for d in reply.dtypes)}"
            )


def _name(dtype: pb.DType) -> str:
    return next((name for name, value in wire.NAMES.items() if value == dtype), f"dtype {dtype}")


class TrunkClient:
    """A `split.Trunk` that is a remote service. Use it as a context manager."""

    def __init__(
        self,
        address: str,
        expected: Expected,
        *,
        wire_dtype: str = "bfloat16",
        timeout_s: float = 120,
        in_flight: int = 4,
    ) -> None:
        """Prepare a client; nothing is sent before `connect` or the first call.

        Args:
            address: ``host:port``.
            expected: Checked before the first call, and again after a lost connection.
            wire_dtype: ``bfloat16`` or ``float32``.
            timeout_s: Seconds that one call may take, all retries included.
            in_flight: Calls at the same time, at most.
        """
        self.address = address
        self._expected, self._timeout_s = expected, timeout_s
        self._dtype: pb.DType = wire.NAMES[wire_dtype]
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._describe = self._method("Describe", pb.DescribeRequest, pb.DescribeReply)
        self._forward = self._method("Forward", pb.ForwardRequest, pb.ForwardReply)
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="trunk-call")
        self._lock = threading.Lock()
        self._checked = False
        self.bytes_sent = 0  # of hidden states and their lengths, retries not counted
        self.forward_s = 0.0  # summed over calls: from sent to decoded

    def _method(self, name: str, request: Any, reply: Any) -> Any:
        return self._channel.unary_unary(f"/{SERVICE}/{name}", request.SerializeToString, reply.FromString)

    def connect(self) -> None:
        """Reach the trunk and check that it is the right one.

        Raises:
            TrunkUnavailable: Nobody answers within the time limit.
            TrunkMismatch: It serves something else.
        """
        self._retry(lambda _: None)

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Send one batch; see `split.Trunk.start`. Leaves the node: `wire.encode_request`, nothing else.

        The future raises `TrunkUnavailable`, `TrunkMismatch`, `TrunkRefused` or `WireError`.
        """
        request = wire.encode_request(hidden_states, attention_mask, position_ids, self._dtype)
        return self._threads.submit(self._call, request, hidden_states, attention_mask)

    def _call(self, request: pb.ForwardRequest, like: Tensor, attention_mask: Tensor | None) -> Tensor:
        started = time.monotonic()
        reply: pb.ForwardReply = self._retry(lambda left_s: self._forward(request, timeout=left_s))
        try:
            rows = wire.decode_reply(reply, request, self._expected.hidden_size)
        except WireError as error:
            raise WireError(f"the trunk at {self.address} sent a bad reply: {error}") from error
        with self._lock:
            self.bytes_sent += request.ByteSize()
            self.forward_s += time.monotonic() - started
        return wire.unpack(rows.to(device=like.device, dtype=like.dtype), attention_mask, like.shape[0])

    def _retry(self, call: Any) -> Any:
        """Make a call, again if it was lost, until the time is up; check the trunk first whenever it may be another."""
        deadline = time.monotonic() + self._timeout_s
        for attempt in itertools.count():
            left_s = deadline - time.monotonic()
            try:
                if not self._checked:
                    reply = self._describe(pb.DescribeRequest(), timeout=max(left_s, 0.001))
                    self._expected.check(reply, self.address, self._dtype)
                    self._checked = True
                return call(max(deadline - time.monotonic(), 0.001))
            except grpc.RpcError as error:
                if error.code() not in _LOST:
                    raise self._translate(error) from error
                self._checked = False
                pause_s = min(0.1 * 2**attempt, 2.0) * random.uniform(0.5, 1.0)
                if time.monotonic() + pause_s > deadline:
                    raise self._translate(error) from error
                if attempt == 0:
                    logger.warning("lost the trunk at %s; asking again for up to %.0f s", self.address, left_s)
                time.sleep(pause_s)

    def _translate(self, error: grpc.RpcError) -> TrunkError:
        """The one place where gRPC's errors become ours."""
        code = error.code()
        if code in _LOST:
            return TrunkUnavailable(
                f"no trunk answers at {self.address} (tried for {self._timeout_s:.0f} s): start one with "
                "'fl-split trunk serve', or set trunk.address"
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return TrunkUnavailable(
                f"the trunk at {self.address} did not answer within trunk.timeout-s={self._timeout_s:g}: it is "
                "overloaded or far away; raise trunk.timeout-s or send less at once (train.batch-size)"
            )
        return TrunkRefused(f"the trunk at {self.address} refused a call ({code.name}): {error.details()}")

    def close(self) -> None:
        """Give the connection and the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
