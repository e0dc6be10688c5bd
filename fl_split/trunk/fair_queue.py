"""Requests that wait: bounded in tokens, and served by turns.

Data path: decoded request -> **fair queue** -> batch (`batching`).

When it is full, the caller with the most tokens in it gives way to callers with fewer, and is told when to come again.
Batches are filled by turns, counted in tokens, so that a caller with a thousand calls gets the same share of the trunk
as a caller with one.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from fl_split.wire import Packed


class QueueFull(Exception):
    """No room for this request now; `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full: ask again in {retry_after_s:.2f} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Job:
    """One request on its way through the batcher; times are of `time.monotonic`."""

    caller: str
    packed: Packed
    deadline: float
    done: "asyncio.Future[Done]"
    arrived: float = field(default_factory=time.monotonic)
    sender: object = None  # whose next job is worth a short wait

    @property
    def num_tokens(self) -> int:
        """Tokens of the request."""
        return len(self.packed.rows)


@dataclass(frozen=True)
class Done:
    """Output rows ``[sum(lengths), hidden]``, and how they came about."""

    rows: Tensor
    queue_s: float
    compute_s: float
    batch_tokens: int


class FairQueue:
    """A queue bounded in tokens, from which callers are served in turns. Not for several threads."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0  # waiting
        self._jobs: dict[str, deque[Job]] = {}
        self._waiting: dict[str, int] = {}  # tokens in the queue, per caller
        self._served: dict[str, int] = {}  # tokens taken, per caller, from a common start
        self._turn = 0  # `_served` of the caller whose turn was last: newcomers start there, not at zero

    @property
    def callers(self) -> set[str]:
        """Who is waiting."""
        return set(self._jobs)

    @property
    def senders(self) -> set[object]:
        """Whose jobs are waiting."""
        return {job.sender for jobs in self._jobs.values() for job in jobs}

    @property
    def oldest(self) -> float:
        """When the longest waiting job came; the queue must not be empty."""
        return min(jobs[0].arrived for jobs in self._jobs.values())

    def refuses(self, caller: str) -> bool:
        """Whether a request of the usual size would have no room: asked before such a request is even received."""
        num_jobs = sum(len(jobs) for jobs in self._jobs.values())
        usual = self.num_tokens / max(1, num_jobs)
        mine = self._waiting.get(caller, 0) + usual
        return self.num_tokens + usual > self.max_tokens and mine >= max(self._waiting.values())

    def put(self, job: Job) -> list[Job]:
        """Add a job at the end of its caller's line.

        Returns:
            Jobs that gave way, newest first, of callers that had more tokens waiting than this one now has.

        Raises:
            QueueFull: There is no room, and this caller already holds as much as any other. Its `retry_after_s` is 0.
        """
        evicted: list[Job] = []
        mine = self._waiting.get(job.caller, 0) + job.num_tokens
        while self._jobs and self.num_tokens + job.num_tokens > self.max_tokens:  # an empty queue has room for anything
            heaviest = max(self._waiting, key=self._waiting.__getitem__)
            if heaviest == job.caller or self._waiting[heaviest] <= mine:
                for old in reversed(evicted):
                    self._append(old)
                raise QueueFull(0.0)
            evicted.append(self._jobs[heaviest][-1])
            self.remove(evicted[-1])
        if job.caller not in self._jobs:
            self._served[job.caller] = max(self._turn, self._served.get(job.caller, 0))
        self._append(job)
        return evicted

    def _append(self, job: Job) -> None:
        self._jobs.setdefault(job.caller, deque()).append(job)
        self._waiting[job.caller] = self._waiting.get(job.caller, 0) + job.num_tokens
        self.num_tokens += job.num_tokens

    def remove(self, job: Job) -> None:
        """Take a job out that is in the queue; nothing happens if it is not."""
        jobs = self._jobs.get(job.caller, deque())
        if job in jobs:
            jobs.remove(job)
            self._waiting[job.caller] -= job.num_tokens
            self.num_tokens -= job.num_tokens
            if not jobs:
                del self._jobs[job.caller], self._waiting[job.caller]

    def take(self, max_tokens: int) -> list[Job]:
        """Take jobs by turns, until the next one would exceed `max_tokens`; the first is taken whatever its size."""
        batch: list[Job] = []
        total = 0
        while self._jobs:
            caller = min(self._jobs, key=lambda name: self._served.get(name, 0))
            job = self._jobs[caller][0]
            if batch and total + job.num_tokens > max_tokens:
                break
            self.remove(job)
            self._turn = self._served.get(caller, 0)
            self._served[caller] = self._turn + job.num_tokens
            batch.append(job)
            total += job.num_tokens
        self._served = {c: n for c, n in self._served.items() if c in self._jobs or n > self._turn}
        return batch
