"""Many callers' requests -> one batch -> each caller's rows. Bounded and fair.

Data path: decoded request -> **fair queue -> batch** -> layout, layers -> **each its rows** -> encoded reply.

The queue holds so many tokens, and no more than a few seconds' work: what waits longer than its caller does is work
for nobody.
"""

import asyncio
import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from fl_split.trunk.config import Batching
from fl_split.trunk.fair_queue import Done, FairQueue, Job, QueueFull
from fl_split.wire import Packed

logger = logging.getLogger(__name__)

_ACTIVE_S = 1.0  # a caller that called within this time is worth a short wait


class DeadlinePassed(Exception):
    """The caller has stopped waiting."""


class ForwardFailed(Exception):
    """The layers raised; the text says where, and not what, which may quote a tensor."""


def where(error: BaseException) -> str:
    """An exception's type and frames, outermost first, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return " > ".join([type(error).__name__, *(f"{f.filename}:{f.lineno} {f.name}" for f in frames[-12:])])


class Batcher:
    """Runs `compute` over batches of requests in one worker thread. Lives in one event loop."""

    def __init__(
        self,
        compute: Callable[[Sequence[Packed]], list[Tensor]],
        settings: Batching,
        queue_tokens: int,
        queue_s: float = math.inf,
        wait_share: float = 0.0,
    ) -> None:
        """Prepare; `run` serves from then on.

        Args:
            compute: Requests in, each one's output rows out, in the same order. Called in the worker thread.
            settings: Size and patience of a batch.
            queue_tokens: Tokens waiting, at most.
            queue_s: Seconds of work waiting, at most, but always room for two batches.
            wait_share: Of the last batch's time, that it is worth to wait after it for senders who were just answered.
        """
        self._compute, self._settings = compute, settings
        self._queue = FairQueue(queue_tokens)
        self._queue_tokens, self._queue_s = queue_tokens, queue_s
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="trunk")
        self._changed = asyncio.Event()
        self._seen: dict[object, float] = {}  # when each sender last sent
        self._tokens_per_s = 0.0
        self._wait_share, self._last_s, self._ended = wait_share, 0.0, 0.0  # of the last batch: its time, its end
        self.on_batch: Callable[[list[Job], float], None] = lambda jobs, seconds: None

    @property
    def queued_tokens(self) -> int:
        """Tokens waiting now."""
        return self._queue.num_tokens

    def check_room(self, caller: str) -> None:
        """Refuse a request that is still to be received.

        Raises:
            QueueFull: There would be no room for it.
        """
        if self._queue.refuses(caller):
            raise QueueFull(self._retry_after_s())

    async def submit(self, caller: str, packed: Packed, timeout_s: float, sender: object = None) -> Done:
        """Wait in line, run, return. Cancelling it takes the request out of the queue.

        Args:
            caller: Whose share it counts in.
            packed: What to run.
            timeout_s: Until its turn.
            sender: Who has one request at a time, such as one of a caller's streams; by default the caller.

        Raises:
            QueueFull: No room.
            DeadlinePassed: `timeout_s` was over before the turn came.
            ForwardFailed: The layers raised on this request.
        """
        now = time.monotonic()
        job = Job(caller, packed, now + timeout_s, asyncio.get_running_loop().create_future(), sender=sender or caller)
        try:
            evicted = self._queue.put(job)
        except QueueFull:
            del job
            raise QueueFull(self._retry_after_s()) from None
        while evicted:
            old = evicted.pop()
            if not old.done.done():  # its caller has just gone
                old.done.set_exception(QueueFull(self._retry_after_s()))
            del old
        self._seen[job.sender] = now
        self._changed.set()
        try:
            return await job.done
        except asyncio.CancelledError:
            self._queue.remove(job)
            raise
        finally:
            del job  # its future holds an exception, whose frames hold it: memory that only the collector would find

    def forget(self, sender: object) -> None:
        """Wait for nothing more of this sender."""
        self._seen.pop(sender, None)

    def _retry_after_s(self) -> float:
        """Estimate when half of what is waiting now should be done."""
        rate = self._tokens_per_s
        return min(max(0.5 * self._queue.num_tokens / rate, 0.05), 10.0) if rate else 0.2

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            batch = await self._next_batch()
            started = time.monotonic()
            outputs = await self._run_batch(batch)
            self._ended = time.monotonic()
            seconds = self._last_s = self._ended - started
            total = sum(job.num_tokens for job in batch)
            self._tokens_per_s = 0.8 * (self._tokens_per_s or total / seconds) + 0.2 * total / seconds
            worth = max(2 * self._settings.max_batch_tokens, self._queue_s * self._tokens_per_s)
            self._queue.max_tokens = int(min(self._queue_tokens, worth))
            for job, rows in zip(batch, outputs, strict=True):
                if job.done.done():
                    continue
                if isinstance(rows, ForwardFailed):
                    job.done.set_exception(rows)
                else:
                    job.done.set_result(Done(rows, started - job.arrived, seconds, total))
            self.on_batch(batch, seconds)

    async def _run_batch(self, batch: list[Job]) -> list[Tensor | ForwardFailed]:
        """Run a batch, for outputs by request; if a batch fails, whatever the reason, each request on its own."""
        requests = [job.packed for job in batch]
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._worker, self._compute, requests))
        except Exception as error:
            text = where(error)  # and no more: an exception holds frames, and they hold the requests
        if len(batch) == 1:
            return [ForwardFailed(text)]
        logger.warning("a batch of %d calls failed, each is run alone: %s", len(batch), text)
        return [rows for job in batch for rows in await self._run_batch([job])]

    async def warm_up(self, packed: Packed) -> None:
        """Run one request in the worker, past the queue."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._compute, [packed])

    async def _next_batch(self) -> list[Job]:
        while True:
            while not self._queue.callers:
                self._changed.clear()
                await self._changed.wait()
            await self._gather()
            jobs = self._queue.take(self._settings.max_batch_tokens if self._settings.enabled else 0)
            for job in jobs:
                if job.deadline < time.monotonic() and not job.done.done():  # done: its caller is gone as well
                    job.done.set_exception(DeadlinePassed())
            if batch := [job for job in jobs if not job.done.done()]:
                return batch

    async def _gather(self) -> None:
        """Wait a moment for callers who were here just now; a lone caller has nobody to wait for."""
        if not self._settings.enabled:
            return
        patience_s = self._settings.max_wait_ms / 1000
        while self._queue.callers and self._queue.num_tokens < self._settings.max_batch_tokens:
            now = time.monotonic()
            self._seen = {sender: at for sender, at in self._seen.items() if now - at < _ACTIVE_S}
            left_s = max(self._queue.oldest + patience_s, self._ended + self._wait_share * self._last_s) - now
            if left_s <= 0 or not self._seen.keys() - self._queue.senders:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return

    def close(self) -> None:
        """Give the worker thread back."""
        self._worker.shutdown(wait=False, cancel_futures=True)
