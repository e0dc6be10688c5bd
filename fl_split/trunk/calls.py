"""One call to a trunk: its name, its message, how it ended. The log line it leaves holds counts and times only."""

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError

from fl_split.errors import WireError
from fl_split.trunk.access import Unauthenticated
from fl_split.trunk.admission import TooManyCalls
from fl_split.trunk.batching import DeadlinePassed, ForwardFailed, where
from fl_split.trunk.cache_pool import CacheFull
from fl_split.trunk.fair_queue import QueueFull
from fl_split.trunk.metrics import TrunkMetrics
from fl_split.trunk.published import NothingPublished
from fl_split.wire import PUSHBACK, REQUEST_ID

logger = logging.getLogger(__name__)

_Code = grpc.StatusCode
_ID = re.compile(r"[A-Za-z0-9-]{8,64}")


class NoMessage(WireError):
    """A call ended before it brought what it should."""


class TooLarge(Exception):
    """A message beyond `max_message_bytes`: gRPC has told the caller."""


class StreamEnded(Exception):
    """A stream cannot go on here; its caller can open another."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Refusal:
    """A status that is not OK, and what a caller is told."""

    code: grpc.StatusCode
    text: str
    trailers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def later(cls, text: str, retry_after_s: float) -> "Refusal":
        """No room now: RESOURCE_EXHAUSTED, with the time after which to ask again."""
        return cls(_Code.RESOURCE_EXHAUSTED, text, ((PUSHBACK, str(int(retry_after_s * 1000))),))

    @classmethod
    def of(cls, error: Exception, call_id: str) -> "Refusal":
        """The one place where what went wrong becomes a status. Callers learn nothing of the inside."""
        match error:
            case Unauthenticated():
                return cls(_Code.UNAUTHENTICATED, "this trunk needs a valid bearer token: ask its operator for one")
            case StreamEnded():
                return cls(error.code, str(error))
            case QueueFull() | CacheFull():
                return cls.later(str(error), error.retry_after_s)
            case TooManyCalls():
                return cls.later("too many calls at once: make fewer, or wait for some to end", 0.5)
            case TooLarge():
                return cls(_Code.RESOURCE_EXHAUSTED, "the message is larger than the limit")
            case grpc.aio.InternalError():  # of writing the reply
                return cls(_Code.CANCELLED, "the caller is gone")
            case WireError():
                return cls(_Code.INVALID_ARGUMENT, str(error))
            case DecodeError():
                return cls(_Code.INVALID_ARGUMENT, "the message cannot be parsed")
            case NothingPublished():
                return cls(_Code.NOT_FOUND, "this trunk publishes no surrogate")
            case DeadlinePassed():
                return cls(_Code.DEADLINE_EXCEEDED, "the deadline passed while the call was waiting")
            case TimeoutError():
                return cls(_Code.DEADLINE_EXCEEDED, "the request was not sent within limits.receive-timeout-s")
        logger.error("call %s failed: %s", call_id, error if isinstance(error, ForwardFailed) else where(error))
        return cls(_Code.INTERNAL, f"the trunk failed on this call; its operator's log says more ({call_id})")

    def answer(self, context: grpc.aio.ServicerContext) -> None:
        """Make it the call's status."""
        # Not `abort`: its exception holds this frame, and with it the call's memory, until a collection.
        context.set_code(self.code)
        context.set_details(self.text)
        context.set_trailing_metadata(self.trailers)


@dataclass
class Call:
    """One call while it is served."""

    method: str
    context: grpc.aio.ServicerContext
    institution: str = "unknown"
    caller: str = ""  # what its share is counted by
    num_tokens: int = 0
    num_sequences: int = 0
    size_bytes: int = 0
    sent_bytes: int = 0
    batch_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    id: str = ""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Take the caller's request id if it is one, else make one up."""
        given = dict(self.context.invocation_metadata() or ()).get(REQUEST_ID, "")
        self.id = given if isinstance(given, str) and _ID.fullmatch(given) else uuid.uuid4().hex

    async def read(self, timeout_s: float, max_bytes: int | None = None) -> bytes:
        """Receive a message.

        Raises:
            TimeoutError: It was not there in time.
            NoMessage: The call ended without one.
            TooLarge: gRPC has refused it.
            WireError: It is larger than it may be.
        """
        async with asyncio.timeout(timeout_s):
            data = await self.receive()
        if data is None:
            await self.check_not_refused()
            raise NoMessage("the call holds no message: expected one")
        if max_bytes is not None and len(data) > max_bytes:
            raise WireError(f"the message has {len(data)} bytes: expected at most {max_bytes}")
        return data

    async def receive(self) -> bytes | None:
        """The next message, None if there is none; see `check_not_refused`."""
        data: bytes = await self.context.read()  # grpc's iterator holds its last message until a collection
        if data is grpc.aio.EOF:
            return None
        self.size_bytes += len(data)
        return data

    async def check_not_refused(self) -> None:
        """A message beyond gRPC's limit looks like none, but then the call is cancelled.

        Raises:
            TooLarge: There was one.
        """
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            raise TooLarge from None

    def finish(self, code: grpc.StatusCode, metrics: TrunkMetrics) -> None:
        """Count the call and write its line."""
        seconds = time.monotonic() - self.started
        metrics.calls.labels(self.method, code.name, self.institution).inc()
        metrics.call_s.observe(seconds)
        if self.method in ("Forward", "Decode"):
            metrics.bytes_in.labels(self.institution).inc(self.size_bytes)
            metrics.bytes_out.labels(self.institution).inc(self.sent_bytes)
        if (code is grpc.StatusCode.OK or self.method == "Decode") and self.num_tokens:
            metrics.tokens.labels(self.institution).inc(self.num_tokens)
        logger.info(
            "call",
            extra={
                "event": {
                    "request-id": self.id,
                    "method": self.method,
                    "code": code.name,
                    "institution": self.institution,
                    "tokens": self.num_tokens,
                    "sequences": self.num_sequences,
                    "received-bytes": self.size_bytes,
                    "sent-bytes": self.sent_bytes,
                    "batch-tokens": self.batch_tokens,
                    "queue-s": round(self.queue_s, 6),
                    "compute-s": round(self.compute_s, 6),
                    "call-s": round(seconds, 6),
                }
            },
        )
