"""How many calls at once, who may send, and how much may wait to be taken.

Data path: Trunk.Forward -> **counted, turn to send** -> read, decode -> ... -> encode -> **until the reply is taken**.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from fl_split.trunk.config import Limits

_IDLE_S = 1.0  # a request that takes longer to receive may have to give its turn up


class TooManyCalls(Exception):
    """A caller, or all of them together, have as many calls open as they may."""


@dataclass(eq=False)
class _Reader:
    """A request that is being received, or waits for it."""

    caller: str
    turn: "asyncio.Future[None]"
    since: float = 0.0  # of `time.monotonic`
    patience: asyncio.Timeout | None = None


class Gate:
    """Counts open calls, and lets a few requests at a time be received: what is not read stays with its sender.

    Turns to receive go to whoever has the fewest. A caller that has none, and finds all taken, takes the oldest one of
    the caller with most, if it is older than a second: callers that send nothing keep nobody out.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()  # bytes of replies
        self._waiting: list[_Reader] = []
        self._reading: list[_Reader] = []  # oldest first

    @asynccontextmanager
    async def call(self, caller: str) -> AsyncIterator[None]:
        """Count a call while it lasts.

        Raises:
            TooManyCalls: At once, before anything of the request is read.
        """
        if self._open.total() >= self._limits.calls or self._open[caller] >= self._limits.calls_per_caller:
            raise TooManyCalls
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            self._open += Counter()  # forgets zeros

    @contextmanager
    def replying(self, caller: str, size_bytes: int) -> Iterator[None]:
        """Count a reply until its caller has taken it."""
        self._unread[caller] += size_bytes
        try:
            yield
        finally:
            self._unread[caller] -= size_bytes
            self._unread += Counter()

    @asynccontextmanager
    async def reading(self, caller: str) -> AsyncIterator[None]:
        """Wait for a turn to receive a request.

        Raises:
            TooManyCalls: The caller has too many replies to take first, or another caller takes the turn.
        """
        if self._unread[caller] > self._limits.unread_mb * 1_000_000:
            raise TooManyCalls
        reader = _Reader(caller, asyncio.get_running_loop().create_future())
        self._waiting.append(reader)
        try:
            self._admit()
            while not reader.turn.done():
                has_none = all(other.caller != caller for other in self._reading)
                if has_none:
                    self._displace()
                await asyncio.wait([reader.turn], timeout=_IDLE_S / 4 if has_none else None)
            async with asyncio.timeout(None) as reader.patience:
                yield
        except TimeoutError:
            if reader.patience is not None and reader.patience.expired():
                raise TooManyCalls from None
            raise
        finally:
            (self._reading if reader in self._reading else self._waiting).remove(reader)
            self._admit()

    def _admit(self) -> None:
        """Give free turns to the callers with the fewest, in order of arrival."""
        while self._waiting and len(self._reading) < self._limits.reading:
            counts = Counter(reader.caller for reader in self._reading)
            reader = min(self._waiting, key=lambda reader: counts[reader.caller])
            if counts[reader.caller] >= self._limits.reading_per_caller:
                return
            self._waiting.remove(reader)
            self._reading.append(reader)
            reader.since = time.monotonic()
            reader.turn.set_result(None)

    def _displace(self) -> None:
        [(caller, count)] = Counter(reader.caller for reader in self._reading).most_common(1)
        oldest = next(reader for reader in self._reading if reader.caller == caller)
        if count > 1 and oldest.patience is not None and time.monotonic() - oldest.since > _IDLE_S:
            oldest.patience.reschedule(asyncio.get_running_loop().time())
