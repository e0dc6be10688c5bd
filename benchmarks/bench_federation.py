"""What does it bring an institution to share, in which way, and at what price in bytes?

    python benchmarks/bench_federation.py --bench DIR [--quick] [--json FILE] [--work DIR] [--jobs N] [--modes ...]

DIR holds a model folder (the only one with a config.json) and ``medquad/<institution>.jsonl``. Settings: ``as-is``, a
node for each institution; ``scarce``, the same with 120 rows each, of which 80 % are held out: about 22 to train on;
``alike`` and ``alike-dirichlet``, one institution dealt out to 8 nodes, evenly or by topic; ``newcomer``, as
``as-is``, but the first institution joins in the last round but one. Every mode trains the same nodes on the same
batches for the same rounds, through the code of a node's round and a real trunk on loopback, without Flower's messages
around it, and without the surrogate's trial: both ends train. Two losses on each node's own held-out examples: of its
adapter as it has trained it, and of what it gets from the server after the last round, before it trains on. ``pooled``
trains one node on everybody's examples, as many a step as all nodes together: the bound that nobody may use. All
modes report on the same half of the held-out examples, that which ``personal`` does not choose by. With ``--surrogate
none`` only tops train, and ``both`` means the top.

Each mode, ``local`` too, has its learning rate swept with seed 0 (least mean loss as trained), then runs at its own
best rate with all seeds; a seed sets adapters, order and held-out examples. With ``personal-1.5`` the server goes half
as far again as the mean of the nodes' (``fedavgm`` with ``server-lr = 1.5``, no momentum). The mixed modes give nodes
ranks 4, 8, 16, 8; ``mixed-ignored`` leaves alpha / rank out, as is often done.

Runs are kept in ``--work`` and not repeated, so that an interrupted benchmark goes on; empty it when code has changed.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import nan
from multiprocessing import get_context
from pathlib import Path

import torch
from about import about, write
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fl_split.config import Combine, NodeConfig, RunConfig, Scalar
from fl_split.model import adapters
from fl_split.node import personal
from fl_split.node.ready import Instructions, Ready
from fl_split.node.round import run_round
from fl_split.node.steps import RoundResult
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
    kind: str  # see above
    files: tuple[Path, ...]  # of the nodes
    rounds: int
    steps: int  # per round
    surrogate: str
    holdout: float
    batch_size: int = 8

    @property
    def name(self) -> str:
        stems = "-".join(file.stem for file in self.files)
        return f"{self.kind}-{self.rounds}x{self.steps}x{self.batch_size}-{self.surrogate}-{stems}"

    def joins(self, node: int) -> int:
        """The round in which a node is there for the first time."""
        return max(1, self.rounds - 1) if self.kind == "newcomer" and node == 0 else 1

    def config(self, task: "Task", work: Path) -> RunConfig:
        values: dict[str, Scalar] = {
            "model.name": str(self.model),
            "data.max-length": 96,
            "data.holdout": self.holdout,
            "train.steps": self.steps,
            "train.batch-size": self.batch_size,
            "train.accumulation": len(self.files) if MODES[task.mode].pooled else 1,
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
        values |= MODES[task.mode].changes
        if self.surrogate == "none" and values.get("aggregation.share") == "both":
            values["aggregation.share"] = "top"
        return RunConfig.from_flat(values)


@dataclass(frozen=True)
class Mode:
    """One way to share."""

    changes: Mapping[str, Scalar]
    mixed: bool = False
    scaled: bool = True  # whether alpha / rank is honoured
    pooled: bool = False  # all data in one place
    server_lr: float = 1.0  # of `fedavgm` without momentum: how far the server goes from where it is to the mean


PERSONAL: dict[str, Scalar] = {"aggregation.share": "both", "aggregation.personal": True, "aggregation.min-nodes": 3}
SETTINGS = {"as-is": 0.2, "scarce": 0.8, "alike": 0.5, "alike-dirichlet": 0.5, "newcomer": 0.2}  # part held out
MODES = {
    "local": Mode({}),
    "pooled": Mode({"aggregation.share": "both"}, pooled=True),
    "personal": Mode(PERSONAL),
    "personal-1.5": Mode(PERSONAL, server_lr=1.5),
    "personal-stack": Mode({**PERSONAL, "aggregation.combine": "stack"}),
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
    Ready.halves = property(lambda this: personal.halves(this.examples.heldout))  # type: ignore[assignment,method-assign]
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

    trained = [pool(setting.files, work)] if mode.pooled else nodes
    for number in range(1, setting.rounds + 1):
        there = [node for node in trained if mode.pooled or number >= setting.joins(node.partition_id)]
        results = [ask(config, node, number) for node in there]
        up.append(sum(size(result.shared) for result in results))
        if results[0].shared:
            updates = [
                Update(r.shared, r.metrics["num-examples"], r.scaling if mode.scaled else 1.0, f"node {i}")
                for i, r in enumerate(results)
            ]
            mean = combine(updates, how, received)
            earlier = received or adapters.fresh_state({n: x.shape for n, x in mean.items()}, config.train.seed)
            far = mode.server_lr
            received = mean if far == 1 else {n: x + (far - 1) * (x - earlier[n]) for n, x in mean.items()}
        down.append(len(nodes) * size(received))
    figures = {"sent": statistics.mean(up) / len(nodes), "bytes": statistics.mean(map(sum, zip(up, down, strict=True)))}
    probe = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1, "accumulation": 1})})
    for i, (file, node) in enumerate(zip(setting.files, nodes, strict=True)):
        if received and not config.is_personal:
            metrics = ask(probe, node, setting.rounds + 1).metrics
            figures[f"combined/{file.stem}"] = metrics["heldout-loss-before"]
        metrics = metrics if mode.pooled else results[i].metrics
        figures[f"base/{file.stem}"] = float(metrics["heldout-loss-base"])
        figures[f"own/{file.stem}"] = metrics["heldout-loss-before" if mode.pooled else "heldout-loss-after"]
        if config.is_personal:
            figures[f"error/{file.stem}"] = metrics["gain-over-alone-error"]
            figures[f"weight/{file.stem}"] = metrics["shared-weight-top"]
    return figures


def pool(files: Iterable[Path], work: Path) -> NodeConfig:
    """One node with everybody's rows; a row's side, trained on or held out, depends on nothing but the row."""
    every = work / "everybody.jsonl"
    every.write_text("".join(file.read_text() for file in files))
    return NodeConfig(partition_id=0, num_partitions=1, data_path=str(every), out_dir=str(work / "pool"))


def deal(kind: str, sources: list[Path], work: Path, seed: int = 0) -> tuple[Path, ...]:
    """The nodes' files of a setting, those that are made in `work`."""
    if kind in ("as-is", "newcomer"):
        return tuple(sources)
    folder = work / kind
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed)
    hands: dict[str, list[str]] = {}
    if kind == "scarce":
        for source in sources:
            hands[source.stem] = order.sample(source.read_text().splitlines(), 120)
    else:
        lines = sources[1 % len(sources)].read_text().splitlines()
        order.shuffle(lines)
        shares = [1.0] * 8
        for topic in sorted({json.loads(line)["topic"] for line in lines}):
            of_topic = [line for line in lines if json.loads(line)["topic"] == topic]
            if kind == "alike-dirichlet":
                shares = [order.gammavariate(0.5, 1.0) for _ in range(8)]
            for node, line in zip(order.choices(range(8), shares, k=len(of_topic)), of_topic, strict=True):
                hands.setdefault(f"{sources[1 % len(sources)].stem}-{node}", []).append(line)
    for name, lines in hands.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tuple(folder / f"{name}.jsonl" for name in sorted(hands))


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


def summarize(runs: Runs, setting: Setting, rates: Mapping[str, float], seeds: int) -> Figures:
    """Means over the seeds; gains are over training alone, of the same seed and so the same held-out examples."""
    figures: Figures = {}
    names = [file.stem for file in setting.files]
    alone = [runs.of(Task("local", seed, rates["local"])) for seed in range(seeds)] if "local" in rates else []
    pooled = [runs.of(Task("pooled", seed, rates["pooled"])) for seed in range(seeds)] if "pooled" in rates else []
    for mode, rate in rates.items():
        done = [runs.of(Task(mode, seed, rate)) for seed in range(seeds)]
        key = f"{setting.kind}/{mode}"
        figures |= {
            f"rate/{key}": rate,
            f"bytes-per-round/{key}": statistics.mean(d["bytes"] for d in done),
            f"sent-bytes-per-node/{key}": statistics.mean(d["sent"] for d in done),
        }
        gains: dict[str, list[float]] = {}
        for name in names:
            figures[f"heldout-loss-base/{key}/{name}"] = statistics.mean(d[f"base/{name}"] for d in done)
            figures[f"heldout-loss/{key}/{name}"] = statistics.mean(d[f"own/{name}"] for d in done)
            for what in ("combined", "error", "weight"):
                if f"{what}/{name}" in done[0]:
                    figures[f"{what}/{key}/{name}"] = statistics.mean(d[f"{what}/{name}"] for d in done)
            if alone:
                gains[name] = [a[f"own/{name}"] - d[f"own/{name}"] for a, d in zip(alone, done, strict=True)]
                figures[f"gain-over-local/{key}/{name}"] = statistics.mean(gains[name])
        if not alone:
            continue
        means = [statistics.mean(each) for each in zip(*gains.values(), strict=True)]
        figures[f"gain-over-local/{key}"] = statistics.mean(means)
        figures[f"gain-over-local-spread/{key}"] = max(means) - min(means)
        figures[f"worst-gain/{key}"] = min(min(each) for each in gains.values())
        if pooled:
            bound = statistics.mean(
                a[f"own/{n}"] - p[f"own/{n}"] for a, p in zip(alone, pooled, strict=True) for n in names
            )
            figures[f"gap-to-pooled/{key}"] = bound - figures[f"gain-over-local/{key}"]
            figures[f"gap-closed/{key}"] = figures[f"gain-over-local/{key}"] / bound
    return figures


def show(figures: Figures, setting: Setting, modes: Iterable[str]) -> None:
    names = [file.stem for file in setting.files]
    print(f"\n{setting.kind}: gain over training alone, in nats per answer token")
    print(f"{'mode':15}{'rate':>7}" + "".join(f"{n:>14}" for n in names) + "     mean    worst  gap closed  MB a round")
    for mode in modes:
        key = f"{setting.kind}/{mode}"
        cells = "".join(f"{figures.get(f'gain-over-local/{key}/{n}', nan):+14.4f}" for n in names)
        line = f"{mode:15}{figures[f'rate/{key}']:7.3f}{cells}{figures.get(f'gain-over-local/{key}', nan):+9.4f}"
        line += f"{figures.get(f'worst-gain/{key}', nan):+9.4f}{figures.get(f'gap-closed/{key}', nan):12.2f}"
        print(line + f"{figures[f'bytes-per-round/{key}'] / 1e6:12.2f}")
        print("  held-out loss: " + ", ".join(f"{n} {figures[f'heldout-loss/{key}/{n}']:.3f}" for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--institutions", nargs="+", default=["cdc", "niddk", "ninds", "seniorhealth"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="gains need local")
    parser.add_argument("--batch-size", type=int, default=8)
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
        options.settings = ["as-is"]
        options.institutions, options.rates, options.seeds = options.institutions[:2], [8e-3], 1

    block = about(" ".join(map(str, range(options.seeds))))
    bench = options.bench.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for kind in options.settings:
        setting = Setting(
            next(bench.glob("*/config.json")).parent,
            kind,
            deal(kind, [bench / "medquad" / f"{name}.jsonl" for name in options.institutions], options.work),
            options.rounds,
            options.steps,
            options.surrogate,
            0.02 if options.quick else SETTINGS[kind],
            options.batch_size,
        )
        figures = measure(setting, options.modes, options)
        print(block)
        write(options.json, figures | block, keep=True)  # settings that were run before stay


def measure(setting: Setting, modes: list[str], options: argparse.Namespace) -> Figures:
    """Sweep the rates, run all seeds, print the table."""
    runs = Runs(setting, options.work, options.jobs)
    runs.do(Task(mode, 0, rate) for rate in options.rates for mode in modes)
    rates = {mode: min(options.rates, key=lambda rate: runs.loss(Task(mode, 0, rate))) for mode in modes}  # noqa: B023
    runs.do(Task(mode, seed, rate) for seed in range(1, options.seeds) for mode, rate in rates.items())
    figures = summarize(runs, setting, rates, options.seeds)
    show(figures, setting, modes)
    return figures


if __name__ == "__main__":
    main()
