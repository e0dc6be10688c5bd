#!/usr/bin/env python3
"""Does it all work on the GPU of this machine, and how fast?

    python scripts/check_gpu.py --json FILE                   # at most 8 minutes; without a GPU it says so and ends
    python scripts/check_gpu.py --device cpu --quick          # tiny shapes: whether this script works, not its numbers

First the tests marked `gpu`. Then, in bfloat16 with random weights, tokens per second of a trunk's forward pass and of
a training step: frozen layers, adapters on the first and the last two, gradients through all of them, as one who holds
the whole model has them. `alone`: one sequence at a time; `batched`: many callers' sequences in one pass, or in one
micro-batch. A share of the peak is that of what this card reaches here with one large product of matrices, with two
operations a weight and token forward, four in a step: weights are frozen, so only activations have a way back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS_S, MEASURE_S = 240, 8.0  # of at most 480 seconds in all: four times two measurements, and two models to make
SHAPES = {  # hidden, inner, layers, heads, of keys and values
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
TINY = {"tiny": (64, 128, 6, 4, 2)}


def main() -> int:
    """Check, measure, and say what came of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no tests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so nothing was checked.")
        return 0
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    figures: dict[str, Any] = {"card": card, **_about()}
    failed = 0 if options.quick else _tests(options.device)
    figures["gpu-tests-passed"] = int(not failed) if not options.quick else None
    peak = _peak(torch.device(options.device), 256 if options.quick else 8192)
    figures["peak-tflops"] = peak / 1e12
    print(f"\n{card}, bfloat16; one large product of matrices: {peak / 1e12:.1f} TFLOP/s")
    print(f"{'shape':6} {'what':8} {'how':8} {'tokens/s':>10} {'of peak':>8}")
    for name, shape in (TINY if options.quick else SHAPES).items():
        for (what, how), (speed, operations) in _measure(shape, torch.device(options.device), options.quick).items():
            key, share = f"{name}/{what}/{how}", speed * operations / peak
            figures[f"{key}-tokens-per-s"], figures[f"{key}-of-peak"] = speed, share
            print(f"{name:6} {what:8} {how:8} {speed:10.0f} {100 * share:6.1f} %", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    return failed


def _about() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from about import about

    return about(0)


def _tests(device: str) -> int:
    """Run the tests marked `gpu`; returns 0 if all passed in time."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_gpu.py"]
    environment = {**os.environ, "FL_SPLIT_GPU": device, "PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=TESTS_S).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TESTS_S} s")
        return 1


def _speed(do: Callable[[], Any], device: Any, quick: bool) -> float:
    """Median seconds of one go, after two that do not count."""
    import torch

    seconds: list[float] = []
    end = time.monotonic() + (0.0 if quick else MEASURE_S)
    while len(seconds) < 4 or (time.monotonic() < end and len(seconds) < 30):
        started = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _peak(device: Any, size: int) -> float:
    """Operations per second of one product of two large matrices in bfloat16."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _speed(lambda: a @ b, device, size < 1024)


def _measure(shape: tuple[int, ...], device: Any, quick: bool) -> dict[tuple[str, str], tuple[float, float]]:
    """Tokens per second, and operations a token, of forward passes and training steps of one random model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fl_split import wire
    from fl_split.config import Lora
    from fl_split.model import adapters
    from fl_split.model.loading import Boundaries
    from fl_split.model.loss import accumulate
    from fl_split.model.trunk import run_trunk
    from fl_split.trunk.padding import run_packed

    hidden, inner, layers, heads, kv_heads = shape
    length, callers = (16, 4) if quick else (512, 16)
    config = LlamaConfig(
        vocab_size=99 if quick else 32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()
    weights = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    found: dict[tuple[str, str], tuple[float, float]] = {}
    request = wire.pack_batch(torch.randn(1, length, hidden), None, None)
    run = partial(run_trunk, model.model)
    for how, count in (("alone", 1), ("batched", callers)):
        seconds = _speed(lambda n=count: run_packed(run, [request] * n, causal=True), device, quick)
        found["forward", how] = count * length / seconds, 2.0 * weights
    model.boundaries, model.head_modules = Boundaries("layers", layers, 2, layers - 2), ()
    adapted = adapters.attach(model, Lora(), train_bottom=True, seed=0)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    for how, count in (("alone", 1), ("batched", callers // 2)):
        ids = torch.randint(99, (count, length))
        batch = {"input_ids": ids, "labels": ids}

        def step(batch: dict[str, Any] = batch) -> None:
            accumulate(adapted, [batch])
            optimizer.step()
            optimizer.zero_grad()

        try:
            found["step", how] = count * length / _speed(step, device, quick), 4.0 * (weights + head)
        except torch.OutOfMemoryError:
            print(f"a step of {count} x {length} tokens does not fit this card")
    return found


if __name__ == "__main__":
    sys.exit(main())
