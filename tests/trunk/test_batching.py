"""Batching: bounded, fair, and blind to who shares a batch."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fl_split.trunk.batching import Batcher, DeadlinePassed, ForwardFailed
from fl_split.trunk.config import Batching
from fl_split.trunk.fair_queue import Done, FairQueue, Job, QueueFull
from fl_split.wire import Packed


def packed(*lengths: int, hidden_size: int = 4, seed: int = 0) -> Packed:
    rows = torch.randn(sum(lengths), hidden_size, generator=torch.Generator().manual_seed(seed))
    return Packed(rows, list(lengths), None)


def job(caller: str, num_tokens: int) -> Job:
    return Job(caller, packed(num_tokens), 0.0, None)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- queue


def test_a_heavy_caller_gets_no_more_than_its_turn() -> None:
    queue = FairQueue(10_000)
    for _ in range(50):
        queue.put(job("heavy", 100))
    for _ in range(2):
        queue.put(job("light", 100))
    order = [taken.caller for _ in range(4) for taken in queue.take(100)]
    assert sorted(order) == ["heavy", "heavy", "light", "light"]


def test_turns_are_counted_in_tokens() -> None:
    queue = FairQueue(10_000)
    for _ in range(8):
        queue.put(job("long", 400))
        queue.put(job("short", 100))
    taken = [taken.caller for _ in range(10) for taken in queue.take(1)]
    assert taken.count("short") == 8


def test_a_newcomer_does_not_make_up_for_the_time_before() -> None:
    queue = FairQueue(100_000)
    for _ in range(40):
        queue.put(job("old", 100))
    for _ in range(20):
        queue.take(1)
    for _ in range(20):
        queue.put(job("new", 100))
    order = [queue.take(1)[0].caller for _ in range(10)]
    assert 4 <= order.count("new") <= 6


def test_a_caller_who_leaves_and_returns_has_still_had_its_turn() -> None:
    queue = FairQueue(10_000)
    for _ in range(20):
        queue.put(job("steady", 100))
    taken = []
    for _ in range(15):
        if "fleeting" not in queue.callers:  # one large call at a time, and gone in between
            queue.put(job("fleeting", 400))
        taken += [job.caller for job in queue.take(1)]
    assert taken.count("fleeting") == 3  # of 15 turns: a call of 400 tokens for every four of 100


def test_full_queue_refuses_whoever_holds_most() -> None:
    queue = FairQueue(1000)
    for _ in range(10):
        queue.put(job("heavy", 100))
    with pytest.raises(QueueFull):
        queue.put(job("heavy", 100))
    evicted = queue.put(job("light", 200))
    assert [(old.caller, old.num_tokens) for old in evicted] == [("heavy", 100)] * 2
    assert queue.num_tokens == 1000


def test_a_request_that_would_be_refused_is_not_even_received() -> None:
    queue = FairQueue(1000)
    assert not queue.refuses("heavy")
    for _ in range(10):
        queue.put(job("heavy", 100))
    assert queue.refuses("heavy")
    assert not queue.refuses("light")
    queue.take(1)
    assert not queue.refuses("heavy")


def test_a_caller_with_as_much_as_any_other_makes_nobody_give_way() -> None:
    queue = FairQueue(1000)
    queue.put(job("a", 500))
    queue.put(job("b", 400))
    with pytest.raises(QueueFull):
        queue.put(job("b", 200))
    assert queue.num_tokens == 900


def test_take_fills_a_batch_and_takes_one_that_is_too_large_alone() -> None:
    queue = FairQueue(10_000)
    for num_tokens in (60, 30, 30, 500):
        queue.put(job("a", num_tokens))
    assert [[taken.num_tokens for taken in queue.take(100)] for _ in range(3)] == [[60, 30], [30], [500]]
    assert queue.take(100) == []
    assert queue.num_tokens == 0


# ------------------------------------------------------------------------------------------------------- batcher


async def submit_all(batcher: Batcher, requests: Sequence[tuple[str, Packed, float]]) -> list[Done | BaseException]:
    serving = asyncio.create_task(batcher.run())
    calls = (batcher.submit(caller, request, timeout_s) for caller, request, timeout_s in requests)
    results = await asyncio.gather(*calls, return_exceptions=True)
    serving.cancel()
    batcher.close()
    return results


def double(requests: Sequence[Packed]) -> list[Tensor]:
    time.sleep(0.01)
    return [2 * request.rows for request in requests]


def test_requests_of_several_callers_share_batches_and_get_their_own_rows_back() -> None:
    sizes: list[int] = []

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        sizes.append(len(requests))
        return double(requests)

    requests = [(f"caller {i % 3}", packed(3, 2, seed=i), 10.0) for i in range(12)]
    results = asyncio.run(submit_all(Batcher(compute, Batching(), 10_000), requests))
    for (_, request, _), done in zip(requests, results, strict=True):
        assert isinstance(done, Done)
        assert torch.equal(done.rows, 2 * request.rows)
    assert sum(sizes) == 12 and max(sizes) > 3


def test_without_batching_each_request_runs_alone() -> None:
    sizes: list[int] = []

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        sizes.append(len(requests))
        return [request.rows for request in requests]

    batcher = Batcher(compute, Batching(enabled=False), 10_000)
    asyncio.run(submit_all(batcher, [("a", packed(3), 10.0), ("b", packed(3), 10.0)]))
    assert sizes == [1, 1]


def test_a_lone_caller_never_waits() -> None:
    async def main() -> float:
        batcher = Batcher(lambda requests: [r.rows for r in requests], Batching(max_wait_ms=2000), 10_000)
        serving = asyncio.create_task(batcher.run())
        started = time.monotonic()
        for _ in range(5):
            await batcher.submit("alone", packed(3), 10.0)
        serving.cancel()
        return time.monotonic() - started

    assert asyncio.run(main()) < 1.0


def test_callers_who_were_here_just_now_are_waited_for() -> None:
    sizes: list[int] = []

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        sizes.append(len(requests))
        return [request.rows for request in requests]

    async def main() -> float:
        batcher = Batcher(compute, Batching(max_wait_ms=5000), 10_000)
        serving = asyncio.create_task(batcher.run())
        await asyncio.gather(*(batcher.submit(caller, packed(1), 10.0) for caller in "ab"))
        sizes.clear()
        started = time.monotonic()
        first = asyncio.create_task(batcher.submit("a", packed(2), 10.0))
        await asyncio.sleep(0.05)  # nobody else is there, but b was
        await asyncio.gather(first, batcher.submit("b", packed(3), 10.0))
        serving.cancel()
        return time.monotonic() - started

    assert asyncio.run(main()) < 2  # now all are there: no need for the rest of the five seconds
    assert sizes == [2]


def test_beyond_the_queue_calls_are_refused_with_a_time_to_come_back() -> None:
    results = asyncio.run(submit_all(Batcher(double, Batching(), 100), [("a", packed(40), 10.0)] * 6))
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert len(refused) >= 3
    assert all(0 < error.retry_after_s <= 10 for error in refused)


def test_a_call_that_ended_in_any_way_leaves_no_memory_to_the_collector() -> None:
    """Exceptions hold frames and frames hold tensors: a cycle would keep them until the next collection."""
    kept: list[weakref.ref[Tensor]] = []

    def request(num_tokens: int) -> Packed:
        made = packed(num_tokens)
        kept.append(weakref.ref(made.rows))
        return made

    async def call(batcher: Batcher, caller: str, num_tokens: int, timeout_s: float) -> str:
        try:
            await batcher.submit(caller, request(num_tokens), timeout_s)
        except (QueueFull, DeadlinePassed) as error:
            return type(error).__name__
        return "Done"

    async def main() -> list[str]:
        batcher = Batcher(double, Batching(), 100)
        serving = asyncio.create_task(batcher.run())
        calls = [("a", 60, 9.0), ("a", 40, 9.0), ("a", 60, 9.0), ("b", 30, 9.0), ("c", 10, 0.0)]
        ended = await asyncio.gather(*(call(batcher, *values) for values in calls))
        serving.cancel()
        batcher._worker.shutdown()  # its thread may still hold what it has just computed
        return ended

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(main()) == ["Done", "QueueFull", "QueueFull", "Done", "DeadlinePassed"]
        assert [ref() for ref in kept] == [None] * 5
    finally:
        gc.enable()


def test_a_light_caller_is_served_while_a_heavy_one_floods() -> None:
    flood = [("heavy", packed(40), 10.0)] * 50
    results = asyncio.run(submit_all(Batcher(double, Batching(), 400), [*flood, *[("light", packed(40), 10.0)] * 3]))
    assert all(isinstance(result, Done) for result in results[-3:])
    assert sum(isinstance(result, QueueFull) for result in results[:-3]) > 30


def test_work_whose_caller_is_gone_is_dropped() -> None:
    computed: list[int] = []
    others_gone = threading.Event()

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        computed.extend(len(r.rows) for r in requests)
        assert others_gone.wait(30)
        return [r.rows for r in requests]

    async def main() -> None:
        batcher = Batcher(compute, Batching(max_wait_ms=0), 10_000)
        serving = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.submit("a", packed(1), 10.0))
        while not computed:  # then the worker is busy with it
            await asyncio.sleep(0.005)
        gone = asyncio.create_task(batcher.submit("b", packed(2), 10.0))
        late = asyncio.create_task(batcher.submit("c", packed(3), 0.001))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 3
        others_gone.set()
        with pytest.raises(DeadlinePassed):
            await late
        await first
        serving.cancel()

    asyncio.run(main())
    assert computed == [1]


def test_a_caller_who_leaves_while_its_batch_is_computed_does_not_stop_the_trunk() -> None:
    computing, gone = threading.Event(), threading.Event()

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        computing.set()
        assert gone.wait(30)
        return [request.rows for request in requests]

    async def main() -> Done:
        batcher = Batcher(compute, Batching(), 10_000)
        serving = asyncio.create_task(batcher.run())
        leaving = asyncio.create_task(batcher.submit("a", packed(1), 10.0))
        while not computing.is_set():
            await asyncio.sleep(0.005)
        leaving.cancel()
        await asyncio.sleep(0)
        gone.set()
        done = await asyncio.wait_for(batcher.submit("b", packed(2), 10.0), 5)
        serving.cancel()
        return done

    assert len(asyncio.run(main()).rows) == 2


def test_without_batching_nobody_waits_for_others() -> None:
    async def main() -> float:
        batcher = Batcher(double, Batching(enabled=False, max_wait_ms=5000), 10_000)
        serving = asyncio.create_task(batcher.run())
        started = time.monotonic()
        await asyncio.gather(*(batcher.submit(caller, packed(1), 10.0) for caller in "ab"))  # b sees that a was here
        serving.cancel()
        return time.monotonic() - started

    assert asyncio.run(main()) < 2


def test_a_request_without_room_is_refused_before_it_is_received() -> None:
    async def main() -> None:
        batcher = Batcher(double, Batching(), 100)  # nothing runs: what comes, stays
        batcher.check_room("a")
        waiting = [asyncio.create_task(batcher.submit("a", packed(40), 10.0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="ask again in"):
            batcher.check_room("a")
        batcher.check_room("b")  # a would give way
        for call in waiting:
            call.cancel()

    asyncio.run(main())


def test_a_call_that_is_late_and_given_up_at_once_does_not_stop_the_trunk() -> None:
    async def main() -> Done:
        batcher = Batcher(double, Batching(), 10_000)
        gone = asyncio.create_task(batcher.submit("a", packed(1), -1.0))
        await asyncio.sleep(0)  # it is in the queue
        serving = asyncio.create_task(batcher.run())
        gone.cancel()  # and is cancelled, but not out of the queue yet, when its turn comes
        done = await asyncio.wait_for(batcher.submit("b", packed(2), 10.0), 5)
        serving.cancel()
        return done

    assert len(asyncio.run(main()).rows) == 2


def test_a_failed_batch_fails_its_calls_and_no_others() -> None:
    fail = [True]

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        if fail.pop() if fail else False:
            raise RuntimeError("out of memory")
        return [r.rows for r in requests]

    async def main() -> None:
        batcher = Batcher(compute, Batching(), 10_000)
        serving = asyncio.create_task(batcher.run())
        with pytest.raises(ForwardFailed, match="^RuntimeError > .*test_batching.py:[0-9]+ compute$"):
            await batcher.submit("a", packed(3), 10.0)
        await batcher.submit("a", packed(3), 10.0)
        serving.cancel()

    asyncio.run(main())


def test_a_batch_that_fails_fails_only_whoever_makes_it_fail() -> None:
    sizes: list[int] = []

    def compute(requests: Sequence[Packed]) -> list[Tensor]:
        sizes.append(len(requests))
        if any(len(request.rows) == 7 for request in requests):
            raise RuntimeError("tensor([0.123")
        return double(requests)

    requests = [("a", packed(3), 10.0), ("b", packed(7), 10.0), ("c", packed(4), 10.0)]
    results = asyncio.run(submit_all(Batcher(compute, Batching(), 10_000), requests))
    assert [type(result) for result in results] == [Done, ForwardFailed, Done]
    assert "0.123" not in str(results[1])
    assert sizes == [3, 1, 1, 1]


def test_queue_holds_no_more_work_than_callers_wait_for() -> None:
    async def scenario() -> tuple[int, int]:
        def slow(requests: Sequence[Packed]) -> list[Tensor]:
            time.sleep(0.02 * len(requests))  # 40 tokens each: 2,000 tokens a second
            return [request.rows for request in requests]

        batcher = Batcher(slow, Batching(max_batch_tokens=100), 100_000, queue_s=0.3)
        serving = asyncio.create_task(batcher.run())
        for _ in range(3):  # until it knows how fast it is
            await batcher.submit("a", packed(40), 10)
        waiting = [asyncio.create_task(batcher.submit("a", packed(40), 10)) for _ in range(100)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        serving.cancel()
        return sum(isinstance(r, Done) for r in results), sum(isinstance(r, QueueFull) for r in results)

    served, refused = asyncio.run(scenario())
    assert served + refused == 100
    assert 5 <= served <= 25  # 0.3 s are 600 tokens, 15 requests; two batches are 5
