"""Micro-batches in turns: results and gradients are those of one after another, bit for bit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from fl_split.config import Lora
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import Batch, accumulate
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.model.turns import in_turn, run_in_turns
from fl_split.node.evaluate import evaluate


class SlowTrunk(LocalTrunk):
    """Answers from another thread, after a while that varies, and not before `at_once` were in flight together."""

    def __init__(self, model: torch.nn.Module, at_once: int = 1) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.at_once, self.calls, self.open, self.most_open = at_once, 0, 0, 0
        self._threads, self._lock, self._together = ThreadPoolExecutor(8), threading.Lock(), threading.Event()

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Future[Tensor]:
        with self._lock:
            delay = (0.02, 0.0, 0.01)[self.calls % 3]
            self.calls += 1
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            if self.open >= self.at_once:
                self._together.set()

        def run() -> Tensor:
            if not self._together.wait(30):
                raise TimeoutError(f"expected {self.at_once} in flight at once, got {self.most_open}")
            time.sleep(delay)
            out = super(SlowTrunk, self).start(hidden_states, attention_mask, position_ids).result()
            with self._lock:
                self.open -= 1
            return out

        return self._threads.submit(run)


def batches(count: int) -> list[Batch]:
    found = []
    for seed in range(count):
        ids = torch.randint(3, 99, (2, 6 + seed % 3), generator=torch.Generator().manual_seed(seed))
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has dropout of its own
@pytest.mark.parametrize("kind", ["none", "identity", "blocks"])
@pytest.mark.parametrize("in_flight", [2, 9])
def test_gradients_equal_the_sequential_ones(
    checkpoint: Callable[[str], Path], family: str, kind: str, in_flight: int
) -> None:
    folder = checkpoint(family)
    outcomes = []
    for flying in (1, in_flight):
        trunk = SlowTrunk(load_trunk(folder, 1, 2), at_once=min(flying, 2))
        client = load_ends(folder, 1, 2, trunk, surrogate=kind, surrogate_layers=2)  # type: ignore[arg-type]
        model = adapters.attach(client, Lora(dropout=0.2), train_bottom=kind != "none", seed=0)
        model.train()
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start: A would get no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(5)
        losses = [accumulate(model, batches(5), flying) for _ in range(2)]
        outcomes.append((losses, [p.grad for p in model.parameters() if p.grad is not None]))
        assert trunk.most_open <= flying
    (losses, gradients), (losses_in_turns, gradients_in_turns) = outcomes
    assert losses_in_turns == losses
    assert len(gradients) == len(gradients_in_turns) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_in_turns, strict=True))


def test_evaluation_equals_the_sequential_one(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    trunk = SlowTrunk(load_trunk(folder, 1, 2))
    model = adapters.attach(load_ends(folder, 1, 2, trunk), Lora(), train_bottom=True, seed=0)
    assert isinstance(model, PeftModel)
    assert evaluate(model, batches(6), 4) == evaluate(model, batches(6), 1)


def test_waiting_overlaps() -> None:
    """Answers that come only when four are waited for: with four in flight they come, with three they would not."""
    threads, four = ThreadPoolExecutor(8), threading.Barrier(4)

    def answer() -> int:
        four.wait(30)
        return 7

    def task() -> int:
        return in_turn(threads.submit(answer)).result()

    assert list(run_in_turns([task] * 8, 4)) == [7] * 8


def test_only_one_micro_batch_computes_at_a_time() -> None:
    threads, running, most = ThreadPoolExecutor(4), [0], [0]

    def compute() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.002)
        running[0] -= 1

    def task() -> None:
        compute()
        in_turn(threads.submit(time.sleep, 0.005)).result()
        compute()

    list(run_in_turns([task] * 10, 4))
    assert most == [1]


@pytest.mark.parametrize("before", [True, False])
def test_an_error_ends_all_micro_batches(before: bool) -> None:
    threads = ThreadPoolExecutor(4)
    num_threads = threading.active_count()

    def task(i: int) -> int:
        if before and i == 2:
            raise ValueError("the third")
        in_turn(threads.submit(time.sleep, 0.001)).result()
        if i == 2:
            raise ValueError("the third")
        return i

    got = []
    with pytest.raises(ValueError, match="the third"):
        for result in run_in_turns([lambda i=i: task(i) for i in range(6)], 3):  # type: ignore[misc]
            got.append(result)
    assert got == ([] if before else [0, 1])
    assert threading.active_count() <= num_threads + 4  # the pool's own
