"""Room for keys and values: a budget of bytes, reserved by the streams that are open, in fair shares.

Data path: Trunk.Decode, open -> **room** -> steps -> layers.

A caller may hold all of it while nobody else wants any. When it is full, the newest streams of the caller with most
give way to a caller that then still has less: nodes have kept what they sent, and go on when there is room.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_RETRY_S = 1.0  # answers end all the time; nobody knows when the next one does


class CacheFull(Exception):
    """No room for this stream now; `retry_after_s` says when to ask again."""

    def __init__(self) -> None:
        super().__init__(f"the cache is full: ask again in {_RETRY_S:g} s")
        self.retry_after_s = _RETRY_S


@dataclass(eq=False)
class Lease:
    """Bytes of one open stream. When `ended` is done, it has to end: another has them (True), or all end (False)."""

    caller: str
    size_bytes: int
    ended: "asyncio.Future[bool]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CachePool:
    """The budget. Lives in one event loop."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._leases: list[Lease] = []  # oldest first

    @property
    def used_bytes(self) -> int:
        """Reserved now."""
        return sum(lease.size_bytes for lease in self._leases)

    @property
    def num_streams(self) -> int:
        """Open now."""
        return len(self._leases)

    @contextmanager
    def lease(self, caller: str, size_bytes: int) -> Iterator[Lease]:
        """Reserve bytes while the context lasts, or until another takes them.

        Raises:
            CacheFull: There is no room, and no caller with so much more that it would have to give way.
        """
        for old in self._to_take(caller, size_bytes):
            self._leases.remove(old)
            old.ended.set_result(True)
        lease = Lease(caller, size_bytes)
        self._leases.append(lease)
        try:
            yield lease
        finally:
            if lease in self._leases:
                self._leases.remove(lease)

    def end_all(self) -> None:
        """Tell all streams that are open to end."""
        for lease in self._leases:
            if not lease.ended.done():
                lease.ended.set_result(False)

    def _to_take(self, caller: str, size_bytes: int) -> list[Lease]:
        """Choose the leases that have to give way for this one; none if there is room."""
        held = Counter[str]()
        for lease in self._leases:
            held[lease.caller] += lease.size_bytes
        mine = held[caller] + size_bytes
        missing = self.used_bytes + size_bytes - self.size_bytes
        left, taken = list(self._leases), list[Lease]()
        while missing > 0:
            heaviest = max(held, key=held.__getitem__, default=caller)
            if heaviest == caller or held[heaviest] <= mine:
                raise CacheFull
            taken.append(next(lease for lease in reversed(left) if lease.caller == heaviest))
            left.remove(taken[-1])
            held[heaviest] -= taken[-1].size_bytes
            missing -= taken[-1].size_bytes
        return taken
