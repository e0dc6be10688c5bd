"""What does it bring an institution to share, in which way, and at what price in bytes?

    python benchmarks/bench_federation.py --bench DIR [--quick] [--json FILE] [--modes local top svd ...]

DIR holds a model folder (the only one with a config.json) and ``medquad/<institution>.jsonl``, one node each. Every
mode trains the same nodes on the same batches for the same rounds, through the code of a node's round and a real trunk
on loopback, without Flower's messages around it. Two losses on each node's own held-out examples: of its adapter as it
has trained it, and of what it gets from the server after the last round, before it trains on.

The mixed modes give nodes ranks 4, 8, 16, 8. ``mixed-ignored`` leaves alpha / rank out, as is often done.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fl_split.aggregation import Combine, Update, combine
from fl_split.config import NodeConfig, RunConfig
from fl_split.node import Instructions, RoundResult, run_round
from fl_split.trunk import server

RANKS = (4, 8, 16, 8)


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


def size(arrays: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in arrays.values())


def federate(
    name: str, mode: Mode, base: dict[str, str | int | float], files: list[Path], rounds: int, work: Path, address: str
) -> dict[str, float]:
    """Losses per institution and bytes per round of one mode."""
    config = RunConfig.from_flat(
        {**base, **mode.changes, "num-server-rounds": rounds, "run.dir": str(work), "run.name": name}
    )
    how: Combine = config.aggregation.combine
    nodes = [
        NodeConfig(
            partition_id=i,
            num_partitions=len(files),
            data_path=str(file),
            out_dir=str(work / str(i)),
            lora_rank=RANKS[i % len(RANKS)] if mode.mixed else 0,
        )
        for i, file in enumerate(files)
    ]
    received: dict[str, Tensor] = {}
    sent_bytes: list[int] = []

    def ask(config: RunConfig, node: NodeConfig, number: int) -> RoundResult:
        alpha_over_rank = config.lora.alpha / (node.lora_rank or config.lora.rank)
        blind = 1.0 if mode.scaled else alpha_over_rank  # undoes what the node divides by
        arrays = {n: x * blind if ".lora_B." in n else x for n, x in received.items()}
        return run_round(config, node, arrays, Instructions(number, name, "benchmark", address))

    for number in range(1, rounds + 1):
        results = [ask(config, node, number) for node in nodes]
        up = sum(size(result.shared) for result in results)
        if results[0].shared:
            updates = [
                Update(r.shared, r.metrics["num-examples"], r.scaling if mode.scaled else 1.0, f"node {i}")
                for i, r in enumerate(results)
            ]
            received = combine(updates, how, received)
        sent_bytes.append(up + len(nodes) * size(received))
    probe = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
    figures = {f"bytes-per-round/{name}": statistics.mean(sent_bytes)}
    for file, node, result in zip(files, nodes, results, strict=True):
        figures[f"heldout-loss-base/{file.stem}"] = float(result.metrics["heldout-loss-base"])
        figures[f"heldout-loss/{name}/{file.stem}"] = result.metrics["heldout-loss-after"]
        if received:
            metrics = ask(probe, node, rounds + 1).metrics
            figures[f"heldout-loss-combined/{name}/{file.stem}"] = metrics["heldout-loss-before"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--institutions", nargs="+", default=["cdc", "niddk", "ninds", "seniorhealth"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="per round")
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--surrogate", default="blocks")
    parser.add_argument("--quick", action="store_true", help="few steps and modes: the shape of the table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.bench.is_dir():
        parser.error(f"--bench {options.bench} is not a folder")
    if options.quick:
        options.rounds, options.steps, options.modes = 2, 2, ["local", "both", "mixed-svd"]

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    model = next(options.bench.resolve().glob("*/config.json")).parent
    files = [options.bench.resolve() / "medquad" / f"{name}.jsonl" for name in options.institutions]
    base: dict[str, str | int | float] = {
        "model.name": str(model),
        "data.max-length": 96,
        "data.holdout": 0.06,
        "train.steps": options.steps,
        "train.bottom-lr": options.rate,
        "train.top-lr": options.rate,
        "train.scheduler": "linear",
        "surrogate.kind": options.surrogate,
    }
    figures: dict[str, float] = {}
    names = [file.stem for file in files]
    print(f"{options.rounds} rounds of {options.steps} steps of 8 x 96 tokens, rate {options.rate:g}, split 2 + 8 + 2")
    print("held-out loss as trained / as received after the last round")
    print(f"{'mode':14}" + "".join(f"{name:>18}" for name in names) + f"{'mean':>18}{'MB a round':>12}", flush=True)
    with tempfile.TemporaryDirectory() as work, server.embedded(server.hold_layers(model, 2, 2)) as address:
        for name in options.modes:
            figures |= federate(name, MODES[name], base, files, options.rounds, Path(work), address)
            own = [figures[f"heldout-loss/{name}/{n}"] for n in names]
            got = [figures.get(f"heldout-loss-combined/{name}/{n}") for n in names]
            figures[f"heldout-loss/{name}"] = statistics.mean(own)
            cells = [f"{a:.3f} / " + ("  -  " if b is None else f"{b:.3f}") for a, b in zip(own, got, strict=True)]
            print(
                f"{name:14}"
                + "".join(f"{cell:>18}" for cell in (*cells, f"{statistics.mean(own):.3f}"))
                + f"{figures[f'bytes-per-round/{name}'] / 1e6:12.2f}",
                flush=True,
            )
    packages = ("torch", "transformers", "peft")
    about = {p: version(p) for p in packages} | {"python": platform.python_version(), "machine": platform.machine()}
    losses = ", ".join(f"{n} {figures['heldout-loss-base/' + n]:.3f}" for n in names)
    print(f"base: {losses}; {about}, seed 0")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
