"""Does a classifier federation whose nodes hold two ends reach what the same federation reaches with whole models?

    python benchmarks/bench_classifier.py --bench DIR [--quick] [--json FILE] [--rounds N] [--steps N] [--kinds ...]

DIR holds a model folder (the only one with a config.json) and ``medquad/<institution>.jsonl`` with `answer` and
`topic`. Each institution is a node that learns to tell the topic of an answer; after each round the top's adapters are
averaged, and the heads stay private. `whole` trains the full model, with LoRA on the same layers, on the same batches.
The trunk runs in this process in float32, so that `exact` and `whole` differ by rounding only.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from about import about, write
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Aggregation, Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import Examples, load_examples
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.evaluate import Scores, evaluate
from fl_split.server.aggregation import Update, combine

BOTTOM, TOP, BATCH, MAX_LENGTH = 2, 2, 8, 96
KINDS = ("whole", "exact", "blocks", "identity", "none")  # the same model unsplit, and split with each surrogate


def topics(files: list[Path]) -> list[str]:
    return sorted({json.loads(line)["topic"] for file in files for line in file.read_text().splitlines()})


def whole_model(folder: Path, labels: list[str]) -> PeftModel:
    """The full model with LoRA on the layers that a node would hold, and the same start."""
    torch.manual_seed(0)
    full = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), dtype=torch.float32)
    anatomy = examine(full.config, AutoModelForSequenceClassification)
    full.boundaries, full.head_modules = Boundaries.of(anatomy, BOTTOM, TOP), anatomy.head
    full.config.use_cache = False
    return adapters.attach(full.eval().requires_grad_(False), Lora(), train_bottom=True, seed=0)


def make(kind: str, folder: Path, labels: list[str], trunk: LocalTrunk) -> PeftModel:
    if kind == "whole":
        return whole_model(folder, labels)
    client = load_ends(folder, BOTTOM, TOP, trunk, surrogate=kind, labels=labels)
    return adapters.attach(client, Lora(), train_bottom=kind != "none", seed=0)


def federate(
    models: list[PeftModel], nodes: list[Examples], tokenizer: object, config: Train, rounds: int
) -> list[Scores]:
    """FedAvg of the tops, by the nodes' numbers of texts; returns the scores of each node."""
    how = Aggregation(share="top")
    optimizers = [train.make_optimizer(model, config) for model in models]
    batches = [training_batches(node.train, tokenizer, BATCH, 0, 0) for node in nodes]
    for number in range(rounds):
        for model, optimizer, own in zip(models, optimizers, batches, strict=True):
            part = islice(own, config.steps)
            settings = train.RoundSettings(number * config.steps, rounds * config.steps)
            train.train_round(model, optimizer, part, config, settings)
        updates = [
            Update(adapters.shared_state(model, how), len(node.train), adapters.scaling_of(model))
            for model, node in zip(models, nodes, strict=True)
        ]
        shared = combine(updates, how.combine)
        for model in models:
            adapters.load_adapter_state(model, shared)
    return [
        evaluate(model, heldout_batches(node.heldout, tokenizer, BATCH))
        for model, node in zip(models, nodes, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--institutions", nargs="+", default=["niddk", "seniorhealth"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="per round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["whole", "exact", "blocks", "none"])
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--quick", action="store_true", help="few steps: the shape of the table, not its numbers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.bench.is_dir():
        parser.error(f"--bench {options.bench} is not a folder")
    if options.quick:
        options.rounds, options.steps = 2, 3
    block = about(0)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    folder = next(options.bench.resolve().glob("*/config.json")).parent
    files = [options.bench.resolve() / "medquad" / f"{name}.jsonl" for name in options.institutions]
    labels = topics(files)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    keys = {"text": "answer", "label": "topic", "labels": ",".join(labels), "max-length": MAX_LENGTH, "holdout": 0.2}
    nodes = [
        load_examples(Data.model_validate({"path": str(file), **keys}), NodeConfig(), tokenizer, 0) for file in files
    ]
    if options.quick:
        nodes = [replace(node, heldout=node.heldout[:32]) for node in nodes]
    config = Train.model_validate(
        {"steps": options.steps, "bottom-lr": options.rate, "top-lr": options.rate, "scheduler": "linear"}
    )
    trunk = LocalTrunk(load_trunk(folder, BOTTOM, TOP))
    sizes = ", ".join(f"{n}: {len(x.train)}" for n, x in zip(options.institutions, nodes, strict=True))
    print(
        f"{len(labels)} topics, {sizes} texts, "
        f"{options.rounds} rounds of {options.steps} steps of {BATCH} x {MAX_LENGTH} tokens, rate {options.rate:g}"
    )
    figures: dict[str, float] = {}
    for name, node in zip(options.institutions, nodes, strict=True):
        classes = [example["labels"] for example in node.heldout]
        figures[f"accuracy-commonest/{name}"] = classes.count(statistics.mode(classes)) / len(classes)
        print(f"always the commonest topic of {name}: accuracy {figures[f'accuracy-commonest/{name}']:.3f}")
    print("kind       loss    accuracy  macro-F1  accuracy - whole's  seconds")
    for kind in options.kinds:
        started = time.monotonic()
        models = [make(kind, folder, labels, trunk) for _ in nodes]
        scores = federate(models, nodes, tokenizer, config, options.rounds)
        for key, name in (("loss", "loss"), ("accuracy", "accuracy"), ("macro-f1", "macro_f1")):
            values = [score[name] for score in scores]
            figures[f"{key}/{kind}"] = statistics.mean(values)
            figures |= {f"{key}/{kind}/{n}": v for n, v in zip(options.institutions, values, strict=True)}
        line = f"{kind:9}  {figures[f'loss/{kind}']:.4f}  {figures[f'accuracy/{kind}']:.3f}     "
        line += f"{figures[f'macro-f1/{kind}']:.3f}     "
        if "accuracy/whole" in figures:
            figures[f"accuracy-minus-whole/{kind}"] = figures[f"accuracy/{kind}"] - figures["accuracy/whole"]
            line += f"{figures[f'accuracy-minus-whole/{kind}']:+.3f}"
        print(f"{line:50}  {time.monotonic() - started:7.0f}", flush=True)
    print(block)
    write(options.json, figures | block)


if __name__ == "__main__":
    main()
