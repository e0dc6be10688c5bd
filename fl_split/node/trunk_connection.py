"""A node's connection to its trunk.

Data path: bottom -> **pack, cut, encode, call, decode** -> surrogate joins. Calls run on threads of their own, so
that the node computes while the trunk does. The trunk is stateless, so a call that was lost is made again, by
whichever replica is there.
"""

import itertools
import logging
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
import torch
from torch import Tensor

from fl_split import wire
from fl_split.address import split_address
from fl_split.errors import TrunkError, TrunkMismatch, TrunkRefused, TrunkUnavailable, WireError
from fl_split.malloc import share_heap
from fl_split.model.thin import read_card
from fl_split.node.call_errors import LOST, AnotherTrunk, LateReply, NoHandshake, translate
from fl_split.node.decode_stream import DecodeStream
from fl_split.node.expected import Expected
from fl_split.node.ledger import Ledger
from fl_split.node.replicas import Credentials, Replica, Replicas
from fl_split.node.surrogate_file import fetch_published
from fl_split.node.trouble import explain
from fl_split.node.vetting import Pinned, Vetting, vetting_of
from fl_split.proto import trunk_pb2 as pb

logger = logging.getLogger(__name__)

R = TypeVar("R")

_Code = grpc.StatusCode
_OTHERS = 4  # replies of a trunk that was not checked, in one call, before it is given up
_CALL_BYTES = 3 * 2**20  # aim of a call, if there are sequences to cut between: below what proxies take unasked


class TrunkConnection:
    """A `slots.Trunk` that is a service elsewhere. Use it as a context manager."""

    def __init__(
        self,
        address: str,
        expected: Expected,
        *,
        wire_dtype: str = "bfloat16",
        timeout_s: float = 120,
        in_flight: int = 4,
        credentials: Credentials = Credentials(),  # noqa: B008  # frozen
        meet: Callable[[str], None] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Prepare channels and threads; nothing is sent before `connect` or the first call.

        Args:
            address: ``host:port``, several with commas between.
            expected: Checked before the first call to each replica, and again after a lost connection. All replicas
                must be one trunk, of the same weights and precision.
            wire_dtype: ``bfloat16``, ``float32`` or ``int8``.
            timeout_s: Seconds that one call may take, all retries included; several replicas share them, so that
                one that hangs does not use them up.
            in_flight: Calls at the same time, at most.
            credentials: TLS and token, and what a trunk has to show before it gets anything else.
            meet: For gradient shares: looks at an address whenever it is checked, and raises if it must get none.
            ledger: Every message is noted there before it is sent, and what a trunk has shown.

        Raises:
            ConfigError: An address or credentials that cannot be used.
        """
        share_heap()  # before threads have heaps of their own: micro-batches run in threads, one at a time
        self.address = address
        self._expected, self.timeout_s, self.hidden_size = expected, timeout_s, expected.hidden_size
        self.wire_dtype: pb.DType = wire.NAMES[wire_dtype]
        self._meet = meet
        self._credentials, self._ledger = credentials, ledger
        self._metadata = credentials.metadata()
        self._vetting = vetting_of(credentials, split_address(address))
        self._replicas = Replicas(address, credentials, ledger.call if ledger else None)
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="trunk-call")
        self._lock = threading.Lock()
        self.trunk_id = b""  # of the first replica that was checked; the others must be the same trunk
        self.bytes_sent = 0  # of requests, retries not counted
        self.bytes_received = 0  # of their replies
        self.forward_s = 0.0  # summed over calls: from sent to decoded
        self.num_retries = 0

    def connect(self) -> None:
        """Reach a replica of the trunk and check that it is the right one.

        Raises:
            TrunkUnavailable: Nobody answers within the time limit.
            TrunkMismatch: It serves something else.
            TrunkRefused: It does not let this node in.
        """
        self._retry(lambda replica, left_s, metadata: None)

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Send one batch; see `slots.Trunk.start`. Leaves the node: `wire.pack_batch`, nothing else.

        The future raises `TrunkUnavailable`, `TrunkMismatch`, `TrunkRefused` or `WireError`.
        """
        if not self._replicas.descriptions:
            self.connect()
        packed = wire.pack_batch(hidden_states, attention_mask, position_ids)
        calls = [self._threads.submit(self._call, part) for part in wire.cut(packed, self.tokens_per_call())]

        device, dtype, batch = hidden_states.device, hidden_states.dtype, hidden_states.shape[0]

        def unpack(parts: list[Tensor]) -> Tensor:
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            return wire.unpack(rows.to(device=device, dtype=dtype), attention_mask, batch)

        return _gather(calls, unpack)

    @property
    def offers_streams(self) -> bool:
        """Whether every replica that was checked keeps keys and values for generation."""
        found = self._replicas.descriptions
        return bool(found) and all(about.HasField("decode") for about in found)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of one sequence, at most, at every replica that was checked."""
        return min((about.max_sequence_length for about in self._replicas.descriptions), default=sys.maxsize)

    def open(self, packed: wire.Packed, room: int) -> tuple[DecodeStream, Tensor]:
        """Begin a generation stream with its first step; see `generation.StreamingTrunk.open`.

        Raises:
            TrunkRefused: The trunk does not offer it.
            TrunkUnavailable: As `connect`, or no room within the time limit.
        """

        def begin(replica: Replica, left_s: float, metadata: Any) -> tuple[DecodeStream, Tensor]:
            about = cast(pb.DescribeReply, replica.description)
            if not about.HasField("decode"):
                raise TrunkRefused(
                    f"the trunk at {replica.address} does not offer generation with a cache (limits.cache-mb=0, "
                    "model.tensor-parallel, or layers that keep more than keys and values): pass use_cache=False, or "
                    "ask its operator"
                )
            tokens = min(room, about.max_sequence_length)
            if len(packed.lengths) * tokens * about.decode.bytes_per_token > about.decode.cache_bytes:
                raise TrunkRefused(
                    f"{len(packed.lengths)} answers of {tokens} tokens, prompts included, do not fit into the cache of "
                    f"the trunk at {replica.address} (limits.cache-mb={about.decode.cache_bytes / 1e6:g}, "
                    f"{about.decode.bytes_per_token} bytes a token): ask for fewer at a time, or for shorter ones"
                )
            stream = DecodeStream(self, replica, metadata)
            return stream, stream.begin(packed, tokens, left_s)

        return self._retry(begin)

    def put_off_or_raise(self, replica: Replica, error: grpc.RpcError, seconds: float) -> None:
        """Note that a stream was lost, and leave its replica alone for a while.

        Raises:
            TrunkError: Opening another would not help.
        """
        if not self._put_off(replica, error, seconds) and error.code() is not _Code.DEADLINE_EXCEEDED:
            raise self._error(error, replica, "of a stream") from error
        logger.warning("a stream to the trunk at %s was lost (%s): opening another", replica.address, error.code().name)
        with self._lock:
            self.num_retries += 1

    def check_origin(self, reply: Any) -> None:
        """Refuse a reply of a trunk that was not checked: as good as lost.

        Raises:
            grpc.RpcError: It is one.
        """
        if reply.trunk_id != self.trunk_id:
            raise AnotherTrunk

    def count(self, sent_bytes: int, received_bytes: int, seconds: float) -> None:
        """Add to what was sent and received, and to the time that it took."""
        with self._lock:
            self.bytes_sent += sent_bytes
            self.bytes_received += received_bytes
            self.forward_s += seconds

    def tokens_per_call(self, dtype: pb.DType | None = None) -> int:
        """Tokens in one message of a dtype, at most; by default of the connection's."""
        aim = _CALL_BYTES // wire.bytes_per_token(self.wire_dtype if dtype is None else dtype, self.hidden_size)
        return max(1, min([aim, *(about.max_tokens for about in self._replicas.descriptions)]))

    def _call(self, packed: wire.Packed) -> Tensor:
        started = time.monotonic()
        request = wire.encode_request(packed, self.wire_dtype)

        def forward(replica: Replica, left_s: float, metadata: Any) -> pb.ForwardReply:
            reply: pb.ForwardReply = replica.forward(request, timeout=left_s, metadata=metadata)
            self.check_origin(reply)
            return reply

        reply = self._retry(forward)
        try:
            rows = wire.decode_reply(reply, request, self.hidden_size)
        except WireError as error:
            raise WireError(f"the trunk at {self.address} sent a bad reply: {error}") from error
        self.count(request.ByteSize(), reply.ByteSize(), time.monotonic() - started)
        return rows

    def _retry(self, call: Callable[[Replica, float, Any], R]) -> R:
        """Make a call, again if it was lost or put off, until the time is up; check first whoever may be another."""
        deadline = time.monotonic() + self.timeout_s
        request_id = uuid.uuid4().hex
        metadata = (*self._metadata, (wire.REQUEST_ID, request_id))
        others = late = 0  # replies of another trunk; attempts without an answer in time
        warned = False
        while True:
            replica, started = self._replicas.pick(), time.monotonic()
            end = started + (deadline - started) / max(1, len(self._replicas) - late)
            try:
                self._check(replica, max(end - time.monotonic(), 0.001), metadata)
                reply = call(replica, max(end - time.monotonic(), 0.001), metadata)
                replica.failures = 0
                return reply
            except grpc.RpcError as error:
                others += isinstance(error, AnotherTrunk)
                late += error.code() is _Code.DEADLINE_EXCEEDED
                if others == _OTHERS or not self._put_off(replica, error, time.monotonic() - started):
                    raise self._error(error, replica, request_id) from error
                pause_s = self._replicas.shortest_rest_s()
                if time.monotonic() + pause_s > deadline:
                    raise self._error(error, replica, request_id) from error
                if not warned:
                    text = "the trunk at %s (%s): %s; asking again for up to %.0f s (call %s)"
                    why, left_s = explain(error, replica.address), deadline - time.monotonic()
                    logger.warning(text, replica.address, error.code().name, why, left_s, request_id)
                    warned = True
            with self._lock:
                self.num_retries += 1
            time.sleep(pause_s)

    def _check(self, replica: Replica, left_s: float, metadata: Any) -> None:
        """Find out who answers, if that is not known; one thread does, others wait."""
        end = time.monotonic() + left_s
        if replica.checked:
            return
        if not replica.lock.acquire(timeout=left_s):
            raise LateReply
        try:
            if not replica.checked:
                self._find_out(replica, max(end - time.monotonic(), 0.001), metadata)
        finally:
            replica.lock.release()

    def _find_out(self, replica: Replica, left_s: float, metadata: Any) -> None:
        """Ask a replica what it is. If it has to show something, then through a channel that takes one certificate.

        That channel becomes the replica's once all is accepted, and not before: other threads may be about to send.
        """
        asked = replica
        try:
            if self._vetting is None:
                reply = replica.describe(pb.DescribeRequest(), timeout=left_s, metadata=metadata)
            else:
                pinned = self._vetting.meet(replica.address)
                asked = replica.bound(pinned.pem, self._credentials)
                reply = self._see(self._vetting, asked, pinned, left_s, metadata)
            self._accept(reply, replica.address)
        except BaseException as error:
            if asked is not replica:
                asked.channel.close()
            if isinstance(error, TrunkUnavailable):
                raise NoHandshake(error.__cause__) from error
            raise
        if asked is not replica:
            replica.take(asked)
        replica.description, replica.checked = reply, True

    def _see(self, vetting: Vetting, asked: Replica, pinned: Pinned, left_s: float, metadata: Any) -> pb.DescribeReply:
        nonce = vetting.nonce()
        reply: pb.DescribeReply = asked.describe(pb.DescribeRequest(nonce=nonce), timeout=left_s, metadata=metadata)
        shown = vetting.check(reply, nonce, pinned, asked.address)
        if self._ledger is not None:
            self._ledger.note("", "trunk-shown", 0, **shown)
        return reply

    def _accept(self, reply: pb.DescribeReply, address: str) -> None:
        self._expected.check(reply, address, self.wire_dtype)
        if self._meet is not None:
            self._check_for_shares(reply, address)
            self._meet(address)
        with self._lock:
            self.trunk_id = self.trunk_id or reply.trunk_id
        if reply.trunk_id != self.trunk_id:
            raise TrunkMismatch(
                f"the trunk at {address} is another one ({reply.trunk_id.hex()}, {_precision(reply)}) than the "
                f"one that this node began with ({self.trunk_id.hex()}): start all replicas with the same [model]"
            )

    def _check_for_shares(self, reply: pb.DescribeReply, address: str) -> None:
        if not reply.gradient_shares:
            raise TrunkRefused(
                f"the trunk at {address} does not offer gradient shares: its operator has to start it with "
                "server.gradient-shares=true; or use another surrogate.kind"
            )
        if reply.compute_dtype != "float32" or reply.quantization:
            raise TrunkMismatch(
                f"the trunk at {address} computes in {_precision(reply)}: surrogate.kind='shares' needs float32, since "
                "the two trunks' answers are large and nearly cancel"
            )

    def _put_off(self, replica: Replica, error: grpc.RpcError, seconds: float) -> bool:
        """Tell whether asking again may help, and if so leave this replica alone for a while."""
        if error.code() in LOST:
            replica.checked = False  # whoever answers next may be another
            replica.failures += 1
            self._replicas.rest(replica, min(0.1 * 2**replica.failures, 2.0) * random.uniform(0.5, 1.0))
            return True
        if error.code() is _Code.DEADLINE_EXCEEDED and len(self._replicas) > 1:
            replica.failures += 1
            self._replicas.rest(replica, seconds * 2**replica.failures)  # most calls should not wait for it
            return True
        trailers = dict(error.trailing_metadata() or ())
        if error.code() is _Code.RESOURCE_EXHAUSTED and trailers.get(wire.PUSHBACK, "").isdecimal():
            # Never sooner than asked to, and not all callers at once.
            self._replicas.rest(replica, int(trailers[wire.PUSHBACK]) / 1000 * random.uniform(1.0, 1.5))
            return True
        return False

    def _error(self, error: grpc.RpcError, replica: Replica, call: str) -> TrunkError:
        return translate(error, replica.address, call, self.address, self.timeout_s)

    def fetch_surrogate(self, cache: Path) -> Path:
        """Fetch the fitted surrogate that the trunk publishes, once, into `cache`.

        Raises:
            SurrogateError: It publishes none, or one of another trunk.
            TrunkUnavailable: As `connect`.
        """

        def fetched(replica: Replica, left_s: float, metadata: Any) -> Path:
            def piece(offset: int) -> bytes:
                reply = replica.surrogate(pb.SurrogateRequest(offset=offset), timeout=left_s, metadata=metadata)
                data: bytes = reply.data
                return data

            return fetch_published(cast(pb.DescribeReply, replica.description), piece, cache)

        file = self._retry(fetched)
        self._expected.check_surrogate(read_card(file))
        return file

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """The trunk's exact vector-Jacobian product, see `slots.ExactTrunk.vjp`: **dL/dh2 leaves the node**.

        Raises:
            TrunkRefused: The trunk does not offer exact gradients.
            TrunkUnavailable: As `connect`.
        """
        if not self._replicas.descriptions:
            self.connect()
        packed = wire.pack_batch(hidden_states, attention_mask, position_ids)
        rows = torch.cat([packed.rows, wire.pack(gradient, attention_mask)[0].to(packed.rows)], 1)
        both = wire.Packed(rows, packed.lengths, packed.positions)  # cut together
        size = max(1, self.tokens_per_call() // 2)
        calls = [self._threads.submit(self._pull, self._exact(part), "pull") for part in wire.cut(both, size)]
        pulled = torch.cat([call.result() for call in calls]).to(device=gradient.device, dtype=gradient.dtype)
        return wire.unpack(pulled, attention_mask, hidden_states.shape[0])

    def _exact(self, both: wire.Packed) -> pb.PullRequest:
        dtype = self.wire_dtype if self.wire_dtype != pb.INT8 else pb.BFLOAT16
        rows, gradient = both.rows.chunk(2, 1)
        return wire.encode_pull(wire.Packed(rows, both.lengths, both.positions), gradient, dtype)

    @property
    def tokens_per_share(self) -> int:
        """Tokens whose hidden states and share of a gradient one call may hold."""
        return max(1, self.tokens_per_call(pb.FLOAT32) // 2)

    def share(self, request: pb.PullRequest) -> "Future[Tensor]":
        """Send one share of a gradient to this trunk, or the mask's seed; the future as of `start`.

        A call that was lost is made again with this same request, by a replica of this connection.
        """
        return self._threads.submit(self._pull, request, "share")

    def _pull(self, request: pb.PullRequest, method: str) -> Tensor:
        def pull(replica: Replica, left_s: float, metadata: Any) -> pb.PullReply:
            reply: pb.PullReply = getattr(replica, method)(request, timeout=left_s, metadata=metadata)
            self.check_origin(reply)
            return reply

        reply = self._retry(pull)
        self.count(request.ByteSize(), reply.ByteSize(), 0.0)
        return wire.decode_pull_reply(reply, request, self.hidden_size)

    def close(self) -> None:
        """Give the connections and the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._replicas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _precision(about: pb.DescribeReply) -> str:
    return " ".join(filter(None, (about.compute_dtype, about.quantization))) or "of unknown precision"


def _gather(calls: "list[Future[Tensor]]", unpack: Callable[[list[Tensor]], Tensor]) -> "Future[Tensor]":
    """Make a future of what `unpack` makes of all calls' results; it fails as the first of them that failed."""
    whole: Future[Tensor] = Future()
    left = itertools.count(len(calls) - 1, -1)

    def done(_: "Future[Tensor]") -> None:
        if next(left) == 0:
            try:
                whole.set_result(unpack([call.result() for call in calls]))
            except BaseException as error:
                whole.set_exception(error)

    for call in calls:
        call.add_done_callback(done)
    return whole
