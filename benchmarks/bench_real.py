"""On a real pretrained decoder: what is a bottom worth, and how much of that does each kind of gradient keep?

    python benchmarks/bench_real.py --model DIR --data FILE [FILE ...] [--quick] [--json FILE]

FILE holds an institution's questions and answers (JSON lines). The trunk runs in this process, so what is compared is
the gradient and nothing else; every kind has the rates that are given, and counts at its best ones. `none` with more
layers in its top is another split: name it in --splits. Gap closed = (none - kind) / (none - exact), of the means of
held-out losses per answer token, within a split.

With --json an interrupted benchmark goes on: runs whose figures are in the file are not repeated.
"""

import argparse
import json
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from about import about, write
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.evaluate import evaluate
from fl_split.node.train import make_optimizer, train_round
from fl_split.tools.gradcheck import Candidate, build

BATCH, MAX_LENGTH = 8, 80
KINDS = ("none", "identity", "blocks-2", "streamed", "exact")


def run(options: argparse.Namespace, split: str, file: Path, seed: int, kind: str, rates: str) -> dict[str, float]:
    """Train once; the held-out loss before and after, and seconds a step."""
    bottom, top = map(int, split.split("+"))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(options.model))
    data = Data.model_validate({"max-length": MAX_LENGTH, "holdout-max": options.heldout, "template": "plain"})
    examples = load_examples(data, NodeConfig(data_path=str(file)), tokenizer, seed)
    name, _, layers = kind.partition("-")
    trunk = LocalTrunk(load_trunk(options.model, bottom, top))
    model = build(options.model, bottom, top, trunk, Candidate(name, int(layers or 1)), Lora())  # type: ignore[arg-type]
    bottom_lr, top_lr = map(float, rates.split(","))
    config = Train.model_validate({"steps": options.steps, "bottom-lr": bottom_lr, "top-lr": top_lr})
    before = evaluate(model, heldout_batches(examples.heldout, tokenizer, BATCH))["loss"]
    started = time.monotonic()
    train_round(
        model, make_optimizer(model, config), training_batches(examples.train, tokenizer, BATCH, seed, 0), config
    )
    seconds = (time.monotonic() - started) / options.steps
    after = evaluate(model, heldout_batches(examples.heldout, tokenizer, BATCH))["loss"]
    return {"heldout-loss-before": before, "heldout-loss": after, "step-s": seconds}


def table(options: argparse.Namespace, figures: Mapping[str, Any]) -> dict[str, float]:
    """Print a row per split and kind, at its best rates; return what is said in it."""
    said: dict[str, float] = {}
    for split in options.splits:
        best: dict[str, tuple[float, str, float]] = {}
        for kind in options.kinds:
            for rates in options.rates:
                keys = [f"{split}/{f.stem}/{s}/{kind}/{rates}" for f, s in product(options.data, range(options.seeds))]
                losses = [figures[f"heldout-loss/{key}"] for key in keys if f"heldout-loss/{key}" in figures]
                if len(losses) == len(keys):
                    seconds = mean(figures[f"step-s/{key}"] for key in keys)
                    best[kind] = min(best.get(kind, (float("inf"), "", 0.0)), (mean(losses), rates, seconds))
        for kind, (loss, rates, seconds) in best.items():
            said[f"heldout-loss/{split}/{kind}"], said[f"step-s/{split}/{kind}"] = loss, seconds
            closed = ""
            if "none" in best and "exact" in best and best["none"][0] > best["exact"][0]:
                gap = (best["none"][0] - loss) / (best["none"][0] - best["exact"][0])
                said[f"gap-closed/{split}/{kind}"], closed = gap, f"{100 * gap:4.0f} %"
            print(
                f"{split:6} {kind:10} rates {rates:10} held-out {loss:.4f}  gap closed {closed:6}  {seconds:.1f} s/step"
            )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--splits", nargs="+", default=["2+2"], help="layers of bottom and top")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--rates", nargs="+", default=["1e-3,2e-3", "2e-3,4e-3"], help="of bottom and top")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--heldout", type=int, default=96, help="examples to measure on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two steps: the shape of the table, not its numbers")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.heldout = 2, 1, 16
        options.rates, options.data, options.splits = options.rates[:1], options.data[:1], options.splits[:1]
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    figures: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    figures |= about(f"0 to {options.seeds - 1}")
    runs = product(options.splits, options.data, range(options.seeds), options.kinds, options.rates)
    for split, file, seed, kind, rates in runs:
        key = f"{split}/{file.stem}/{seed}/{kind}/{rates}"
        if f"heldout-loss/{key}" not in figures:
            found = run(options, split, file, seed, kind, rates)
            figures |= {f"{name}/{key}": value for name, value in found.items()}
            write(options.json, figures)
            print(f"{key}: {found['heldout-loss-before']:.4f} -> {found['heldout-loss']:.4f}", flush=True)
    write(options.json, {**figures, **table(options, figures)})


if __name__ == "__main__":
    main()
