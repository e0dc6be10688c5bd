"""Micro-batches in turns, so that one computes while others wait for the trunk; results as if one after another.

Data path: bottom of micro-batch 1, 2, ... -> trunk -> **wait, in order** -> top and backward of micro-batch 1, 2, ...

Each micro-batch runs in a thread of its own, but only one thread runs at any time, and the order is fixed: a
micro-batch is left when it has to wait for the trunk, and taken up again, oldest first, when as many wait as may be.
So gradients are summed in the order of the micro-batches, bit for bit as without this module. Random numbers, of
dropout, are kept for each micro-batch while others run; one that begins with a seed draws the same as ever.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_current = threading.local()


class _Abandoned(BaseException):
    """Ends a micro-batch because another one failed."""


class _Turns(Generic[T]):
    """One micro-batch: a thread that runs only between `advance` and its next wait for the trunk, or its end."""

    def __init__(self, task: Callable[[], T]) -> None:
        self._task = task
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._result: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, name="micro-batch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _current.turns = self
        self._go.acquire()
        try:
            if not self._abandoned:
                self._result.set_result(self._task())
        except BaseException as error:
            self._result.set_exception(error)
        finally:
            self._back.release()

    def wait(self) -> None:
        """In the thread itself: let others run until it is this one's turn again."""
        state = _rng_state()
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        _set_rng_state(state)

    def advance(self) -> None:
        """From outside: let it run until its next wait, or its end."""
        self._go.release()
        self._back.acquire()
        if self._result.done():
            self._result.result()  # raises what it raised

    def finish(self) -> T:
        """From outside: let it run to its end.

        Raises:
            Exception: Whatever the task raised.
        """
        while not self._result.done():
            self.advance()
        return self._result.result()

    def abandon(self) -> None:
        """From outside: end it where it waits."""
        self._abandoned = True
        self._go.release()
        self._thread.join()


class _InTurn(Future[T]):
    """A future of the trunk whose `result` lets other micro-batches run first."""

    def __init__(self, future: "Future[T]", turns: _Turns[Any]) -> None:
        super().__init__()
        self._future, self._turns = future, turns

    def result(self, timeout: float | None = None) -> T:
        """Wait for the turn, then for the trunk."""
        self._turns.wait()
        return self._future.result(timeout)


def in_turn(future: "Future[T]") -> "Future[T]":
    """What a model is to wait for; within `run_in_turns`, waiting lets other micro-batches run."""
    turns: _Turns[Any] | None = getattr(_current, "turns", None)
    return future if turns is None else _InTurn(future, turns)


def run_in_turns(tasks: Sequence[Callable[[], T]], in_flight: int) -> Iterator[T]:
    """Run tasks with up to `in_flight` of them waiting for the trunk; yields their results in order.

    Args:
        tasks: Forward and backward of one micro-batch each.
        in_flight: 1 runs them one after another.

    Raises:
        Exception: What the first task to fail raised; the others have ended by then.
    """
    if in_flight == 1 or len(tasks) == 1:
        yield from (task() for task in tasks)
        return
    waiting: deque[_Turns[T]] = deque()
    try:
        for task in tasks:
            if len(waiting) == in_flight:
                yield waiting[0].finish()
                waiting.popleft()
            waiting.append(_Turns(task))
            waiting[-1].advance()
        while waiting:
            yield waiting[0].finish()
            waiting.popleft()
    finally:
        for turns in waiting:
            turns.abandon()


def _rng_state() -> Any:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if on_gpu else None
    return torch.get_rng_state(), cuda


def _set_rng_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
