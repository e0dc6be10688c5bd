"""Calls to whichever replica of the trunk is there: checked before it gets anything, and made again if they are lost.

The trunk is stateless, so that any replica can answer any call.
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from fl_split import wire
from fl_split.address import split_address
from fl_split.errors import TrunkError, TrunkMismatch, TrunkRefused, TrunkUnavailable
from fl_split.node.call_errors import LOST, AnotherTrunk, LateReply, NoHandshake, translate
from fl_split.node.expected import Expected
from fl_split.node.ledger import Ledger
from fl_split.node.replicas import Credentials, Replica, Replicas
from fl_split.node.trouble import explain
from fl_split.node.vetting import Pinned, Vetting, vetting_of
from fl_split.proto import trunk_pb2 as pb

logger = logging.getLogger(__name__)

R = TypeVar("R")

_Code = grpc.StatusCode
_OTHERS = 4  # replies of a trunk that was not checked, in one call, before it is given up
_CALL_BYTES = 3 * 2**20  # aim of a call, if there are sequences to cut between: below what proxies take unasked


class Calls:
    """Reaches one trunk, and counts what that takes. For several threads; see `TrunkConnection` for the arguments."""

    def __init__(
        self,
        address: str,
        expected: Expected,
        wire_dtype: str,
        timeout_s: float,
        credentials: Credentials,
        meet: Callable[[str], None] | None,
        ledger: Ledger | None,
    ) -> None:
        self.address, self.timeout_s, self.hidden_size = address, timeout_s, expected.hidden_size
        self.wire_dtype: pb.DType = wire.NAMES[wire_dtype]
        self._expected, self._credentials, self._meet, self._ledger = expected, credentials, meet, ledger
        self._metadata = credentials.metadata()
        self._vetting = vetting_of(credentials, split_address(address))
        self._replicas = Replicas(address, credentials, ledger.call if ledger else None)
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


def _precision(about: pb.DescribeReply) -> str:
    return " ".join(filter(None, (about.compute_dtype, about.quantization))) or "of unknown precision"
