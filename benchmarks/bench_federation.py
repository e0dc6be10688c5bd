"""What does it bring an institution to share, in which way, and at what price in bytes?

    python benchmarks/bench_federation.py --bench DIR [--quick] [--json FILE] [--work DIR] [--jobs N] [--modes ...]

DIR holds a model folder (the only one with a config.json) and ``medquad/<institution>.jsonl``, one node each. Every
mode trains the same nodes on the same batches for the same rounds, through the code of a node's round and a real trunk
on loopback, without Flower's messages around it, and without the surrogate's trial: both ends train. Two losses on each
node's own held-out examples: of its adapter as it has trained it, and of what it gets from the server after the last
round, before it trains on.

Each mode has its learning rate swept with seed 0 (least mean loss as trained), then runs at its own best rate with all
seeds; a seed sets adapters, order and held-out examples. The mixed modes give nodes ranks 4, 8, 16, 8;
``mixed-ignored`` leaves alpha / rank out, as is often done.

Runs are kept in ``--work`` and not repeated, so that an interrupted benchmark goes on; empty it when code has changed.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from about import about, write
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fl_split.config import Combine, NodeConfig, RunConfig, Scalar
from fl_split.node.round import Instructions, RoundResult, run_round
from fl_split.server.aggregation import Update, combine
from fl_split.trunk import server
from fl_split.trunk.layers import hold_layers

RANKS = (4, 8, 16, 8)
RATES = (4e-3, 8e-3, 1.6e-2)
Figures = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    model: Path
    files: tuple[Path, ...]  # of the institutions
    rounds: int
    steps: int  # per round
    surrogate: str
    holdout: float = 0.06

    @property
    def name(self) -> str:
        return f"{self.rounds}x{self.steps}-{self.surrogate}-{'-'.join(file.stem for file in self.files)}"

    def config(self, task: "Task", work: Path) -> RunConfig:
        values: dict[str, Scalar] = {
            "model.name": str(self.model),
            "data.max-length": 96,
            "data.holdout": self.holdout,
            "train.steps": self.steps,
            "train.bottom-lr": task.rate,
            "train.top-lr": task.rate,
            "train.scheduler": "linear",
            "train.seed": task.seed,
            "surrogate.kind": self.surrogate,
            "surrogate.check": False,  # every mode trains both ends, or those that share both would share nothing more
            "num-server-rounds": self.rounds,
            "run.dir": str(work),
            "run.name": task.mode,
        }
        return RunConfig.from_flat(values | dict(MODES[task.mode].changes))


@dataclass(frozen=True)
class Mode:
    """One way to share."""

    changes: Mapping[str, str]
    mixed: bool = False
    scaled: bool = True  # whether alpha / rank is honoured


MODES = {
    "local": Mode({}),
    "top": Mode({"aggregation.share": "top"}),
    "both": Mode({"aggregation.share": "both"}),
    "a-only": Mode({"aggregation.share": "both", "aggregation.tensors": "a-only"}),
    "b-only": Mode({"aggregation.share": "both", "aggregation.tensors": "b-only"}),
    "svd": Mode({"aggregation.share": "both", "aggregation.combine": "svd"}),
    "stack": Mode({"aggregation.share": "both", "aggregation.combine": "stack"}),
    "exact": Mode({"aggregation.share": "both", "aggregation.combine": "exact"}),
    "mixed-svd": Mode({"aggregation.share": "both", "aggregation.combine": "svd"}, mixed=True),
    "mixed-stack": Mode({"aggregation.share": "both", "aggregation.combine": "stack"}, mixed=True),
    "mixed-ignored": Mode({"aggregation.share": "both", "aggregation.combine": "svd"}, mixed=True, scaled=False),
}


@dataclass(frozen=True)
class Task:
    """One federation."""

    mode: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        return f"{self.mode} {self.seed} {self.rate:g}"


def size(arrays: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in arrays.values())


def run(setting: Setting, task: Task) -> Figures:
    """Train one federation from its start, in this process."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work, server.embedded(hold_layers(setting.model, 2, 2)) as address:
        return federate(setting, task, Path(work), address)


def federate(setting: Setting, task: Task, work: Path, address: str) -> Figures:
    """Losses per institution, and bytes per round."""
    config, mode = setting.config(task, work), MODES[task.mode]
    how: Combine = config.aggregation.combine
    nodes = [
        NodeConfig(
            partition_id=i,
            num_partitions=len(setting.files),
            data_path=str(file),
            out_dir=str(work / str(i)),
            lora_rank=RANKS[i % len(RANKS)] if mode.mixed else 0,
        )
        for i, file in enumerate(setting.files)
    ]
    received: dict[str, Tensor] = {}
    up: list[int] = []
    down: list[int] = []

    def ask(config: RunConfig, node: NodeConfig, number: int) -> RoundResult:
        alpha_over_rank = config.lora.alpha / (node.lora_rank or config.lora.rank)
        blind = 1.0 if mode.scaled else alpha_over_rank  # undoes what the node divides by
        arrays = {n: x * blind if ".lora_B." in n else x for n, x in received.items()}
        return run_round(config, node, arrays, Instructions(number, task.mode, "benchmark", address))

    for number in range(1, setting.rounds + 1):
        results = [ask(config, node, number) for node in nodes]
        up.append(sum(size(result.shared) for result in results))
        if results[0].shared:
            updates = [
                Update(r.shared, r.metrics["num-examples"], r.scaling if mode.scaled else 1.0, f"node {i}")
                for i, r in enumerate(results)
            ]
            received = combine(updates, how, received)
        down.append(len(nodes) * size(received))
    figures = {"sent": statistics.mean(up) / len(nodes), "bytes": statistics.mean(map(sum, zip(up, down, strict=True)))}
    probe = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
    for file, node, result in zip(setting.files, nodes, results, strict=True):
        figures[f"base/{file.stem}"] = float(result.metrics["heldout-loss-base"])
        figures[f"own/{file.stem}"] = result.metrics["heldout-loss-after"]
        if received:
            figures[f"combined/{file.stem}"] = ask(probe, node, setting.rounds + 1).metrics["heldout-loss-before"]
    return figures


class Runs:
    """Federations done so far, by key, in a file of one JSON object a line."""

    def __init__(self, setting: Setting, work: Path, jobs: int) -> None:
        self._file = work / f"runs-{setting.name}.jsonl"
        self._setting, self._jobs = setting, jobs
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._done: dict[str, Figures] = {entry["key"]: entry["figures"] for entry in map(json.loads, lines)}

    def do(self, tasks: Iterable[Task]) -> None:
        todo = [task for task in dict.fromkeys(tasks) if task.key not in self._done]
        with ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn")) as pool:
            started = time.monotonic()
            waiting = {pool.submit(run, self._setting, task): task for task in todo}
            for future in as_completed(waiting):
                key = waiting[future].key
                self._done[key] = future.result()
                with self._file.open("a") as file:
                    file.write(json.dumps({"key": key, "figures": self._done[key]}) + "\n")
                print(f"  {key}: {self.loss(waiting[future]):.4f} at {time.monotonic() - started:.0f} s", flush=True)

    def of(self, task: Task) -> Figures:
        return self._done[task.key]

    def loss(self, task: Task) -> float:
        """Mean over the institutions, as trained."""
        return statistics.mean(self.of(task)[f"own/{file.stem}"] for file in self._setting.files)


def summarize(runs: Runs, names: list[str], rates: Mapping[str, float], seeds: int) -> Figures:
    """Means over the seeds; gains are over training alone, of the same seed and so the same held-out examples."""
    figures: Figures = {}
    for mode, rate in rates.items():
        done = [runs.of(Task(mode, seed, rate)) for seed in range(seeds)]
        figures |= {
            f"rate/{mode}": rate,
            f"bytes-per-round/{mode}": statistics.mean(d["bytes"] for d in done),
            f"sent-bytes-per-node/{mode}": statistics.mean(d["sent"] for d in done),
        }
        for name in names:
            figures[f"heldout-loss-base/{name}"] = statistics.mean(d[f"base/{name}"] for d in done)
            figures[f"heldout-loss/{mode}/{name}"] = statistics.mean(d[f"own/{name}"] for d in done)
            if f"combined/{name}" in done[0]:
                combined = statistics.mean(d[f"combined/{name}"] for d in done)
                figures[f"heldout-loss-combined/{mode}/{name}"] = combined
        losses = [statistics.mean(d[f"own/{name}"] for name in names) for d in done]
        figures[f"heldout-loss/{mode}"] = statistics.mean(losses)
        figures[f"heldout-loss-spread/{mode}"] = max(losses) - min(losses)
        if mode == "local" or "local" not in rates:
            continue
        alone = [runs.of(Task("local", seed, rates["local"])) for seed in range(seeds)]
        gains = {n: [a[f"own/{n}"] - d[f"own/{n}"] for a, d in zip(alone, done, strict=True)] for n in names}
        means = [statistics.mean(each) for each in zip(*gains.values(), strict=True)]
        figures |= {f"gain-over-local/{mode}/{n}": statistics.mean(each) for n, each in gains.items()}
        figures[f"gain-over-local/{mode}"] = statistics.mean(means)
        figures[f"gain-over-local-spread/{mode}"] = max(means) - min(means)
    return figures


def show(figures: Figures, modes: Iterable[str], names: list[str]) -> None:
    print("held-out loss as trained / as received after the last round; gain over local: mean (spread over seeds)")
    print(f"{'mode':14}{'rate':>6}" + "".join(f"{n:>16}" for n in names) + f"{'mean':>8}{'gain':>17}  MB a round")
    for mode in modes:
        own = [figures[f"heldout-loss/{mode}/{n}"] for n in names]
        got = [figures.get(f"heldout-loss-combined/{mode}/{n}") for n in names]
        cells = [f"{a:.3f} / " + ("  -  " if b is None else f"{b:.3f}") for a, b in zip(own, got, strict=True)]
        gain = figures.get(f"gain-over-local/{mode}")
        compared = "" if gain is None else f"{gain:+.3f} ({figures[f'gain-over-local-spread/{mode}']:.3f})"
        line = f"{mode:14}{figures[f'rate/{mode}']:6.3f}" + "".join(f"{cell:>16}" for cell in cells)
        line += f"{figures[f'heldout-loss/{mode}']:8.3f}{compared:>17}{figures[f'bytes-per-round/{mode}'] / 1e6:12.2f}"
        print(line)
    print("base: " + ", ".join(f"{n} {figures['heldout-loss-base/' + n]:.3f}" for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--institutions", nargs="+", default=["cdc", "niddk", "ninds", "seniorhealth"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to sweep")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--surrogate", default="blocks")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fl-split-bench-federation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="few steps and modes: the shape of the table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.bench.is_dir():
        parser.error(f"--bench {options.bench} is not a folder")
    if options.quick:
        options.rounds, options.steps, options.modes = 2, 2, ["local", "both", "mixed-svd"]
        options.institutions, options.rates, options.seeds = options.institutions[:2], [8e-3], 1

    block = about(" ".join(map(str, range(options.seeds))))
    bench = options.bench.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        next(bench.glob("*/config.json")).parent,
        tuple(bench / "medquad" / f"{name}.jsonl" for name in options.institutions),
        options.rounds,
        options.steps,
        options.surrogate,
        0.02 if options.quick else Setting.holdout,
    )
    runs, modes = Runs(setting, options.work, options.jobs), options.modes
    runs.do(Task(mode, 0, rate) for rate in options.rates for mode in modes)
    rates = {mode: min(options.rates, key=lambda rate: runs.loss(Task(mode, 0, rate))) for mode in modes}  # noqa: B023
    runs.do(Task(mode, seed, rate) for seed in range(1, options.seeds) for mode, rate in rates.items())
    figures = summarize(runs, options.institutions, rates, options.seeds)
    print(
        f"\n{options.rounds} rounds of {options.steps} steps of 8 x 96 tokens, split 2 + 8 + 2, {options.seeds} seeds"
    )
    show(figures, modes, options.institutions)
    print(block)
    write(options.json, figures | block)


if __name__ == "__main__":
    main()
