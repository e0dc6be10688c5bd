"""How much of a node's text can the trunk's operator read, at which depth, and what do defences change?

    python benchmarks/bench_privacy.py --models DIR [DIR ...] --data FILE [--quick | --missing] [--json FILE]

The attacks are those of `fl-split audit`: on each hidden state by itself (one shot), and one token after another, each
tried after what was read before (sequence; under noise with the base model's next-token probabilities and a beam). The
attacker has the public base model and public text (Python's documentation), the split and the defence's parameters; not
the text, the adapter or the seed. Defences: none, a wire of int8, an adapter trained here on other examples of the same
file, noise relative to each hidden state's root mean square, once and as the mean of ten passes. Loss beside it: of the
whole model with the defence at the bottom's end, on the same text.

Redaction changes what hidden states are made of: an invented patient's record stands before each question, and a node
trains on that as it is, or with rules that describe the records' fields. Loss beside it: of held-out answers, the same
texts in both, after training; the mean of the differences with its error.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from about import about, write
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.data.redact import KINDS, redactor
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.trial import Losses, gain, measure
from fl_split.tools.audit.attack import Attacker, add_noise
from fl_split.tools.audit.bottom import Listener, sent
from fl_split.tools.audit.counts import count, kinds_of, share_found, share_right
from fl_split.tools.audit.sequential import rounding
from fl_split.tools.audit.text import own_ids, plant, public_ids
from fl_split.tools.gradcheck import Candidate, build

TOP = 2


def trained(folder: Path, data: Data, node: NodeConfig, depth: int, steps: int) -> PeftModel:
    """The model of a node that trained with the exact gradient."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    trunk = LocalTrunk(load_trunk(folder, depth, TOP))
    model = build(folder, depth, TOP, trunk, Candidate("exact"), Lora())
    rows = load_examples(data, node, tokenizer, 0, max_rows=None if steps > 1 else 64).train
    batches = training_batches(rows, tokenizer, 4, 0, 0)
    config = Train.model_validate({"steps": steps, "batch-size": 4, "bottom-lr": 2e-3, "top-lr": 4e-3})
    train.train_round(model, train.make_optimizer(model, config), batches, config)
    return model


def trained_adapter(folder: Path, data: Data, depth: int, steps: int) -> dict[str, Tensor]:
    """Its adapter."""
    return adapters.adapter_state(trained(folder, data, NodeConfig(), depth, steps))


def node_sends(
    folder: Path, depth: int, ids: list[list[int]], wire_dtype: str, adapter: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """What comes to the trunk."""
    listener = Listener()
    model = adapters.attach(
        load_ends(folder, depth, TOP, listener, surrogate="identity"), Lora(), train_bottom=True, seed=0
    )
    adapters.load_adapter_state(model, adapter or {})
    return sent(model, listener, ids, wire_dtype)


class Loss:
    """The whole model's loss with something else in the place of the bottom's output."""

    def __init__(self, folder: Path, depth: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.model.layers[depth - 1].register_forward_hook(self._put)
        self._rows: Tensor | None = None

    def _put(self, module: Any, args: Any, out: Any) -> Any:
        if self._rows is None:
            return out
        rows = self._rows[None]
        return (rows, *out[1:]) if isinstance(out, tuple) else rows

    @torch.inference_mode()
    def __call__(self, ids: Sequence[list[int]], rows: Sequence[Tensor] | None = None) -> float:
        losses = []
        for i, example in enumerate(ids):
            self._rows = None if rows is None else rows[i]
            row = torch.tensor([example])
            losses.append(float(self._model(input_ids=row, labels=row).loss))
        return sum(losses) / len(losses)


class Bench:
    """One model's figures."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.folder, self.quick = folder.name, folder, options.quick
        self.work, self.out, self.source = options.work, options.json, options.data
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
        self.data = Data.model_validate({"path": str(options.data.resolve()), "max-length": 64})
        examples, length = (3, 24) if options.quick else (options.examples, 64)
        plain = self.data.model_copy(update={"template": "plain"})
        self.own = own_ids(plain, NodeConfig(), tokenizer, examples, length, 0)
        self.planted, self.tokenizer = plant(examples // 2, 0), tokenizer
        records = [tokenizer.encode(record.text, add_special_tokens=False) for record in self.planted]
        self.texts, self.truth = [*self.own, *records], [torch.tensor(ids) for ids in self.own]
        self.public = public_ids((), folder, length, 0)
        self.figures: dict[str, float] = {}
        self.attacker: Attacker | None = None  # at the first depth

    def prepare(self, depth: int, whole: bool) -> Attacker:
        attacker = Attacker.prepare(self.folder, (depth, TOP), self.public, "bfloat16", whole=whole)
        self.figures[f"prepare-s/{self.name}/{depth}"] = attacker.seconds
        return attacker

    def read(self, attacker: Attacker, depth: int, defence: str, arrived: list[Tensor], noise: float = 0.0) -> None:
        """Attack, count, print."""
        started = time.monotonic()
        outcome = attacker.read(arrived, noise)
        kinds = kinds_of(self.tokenizer, attacker.bottom.vocab_size, self.public)
        found = count(outcome.first(len(self.own)), self.truth, kinds)
        found["recovered"], found["drift"] = found.pop("readable"), outcome.drift
        found["canary-fields"] = share_found(outcome.ids[len(self.own) :], self.planted, self.tokenizer)
        found["attack-s"] = time.monotonic() - started
        self.figures |= {f"{key}/{self.name}/{depth}/{defence}": value for key, value in found.items()}
        write(self.out, {**self.figures, **about(0)}, keep=True)  # what was measured, if somebody stops it
        print(
            f"{self.name:10} {depth:3} {defence:14} one shot {found['one-shot-top-1']:.4f} (10: "
            f"{found['one-shot-top-10']:.4f})  sequence {found['sequence-top-1']:.4f}  digits {found['digits']:.3f}  "
            f"rare {found['rare']:.3f}  canaries {found['canary-fields']:.3f}  drift {outcome.drift:.3f}  "
            f"{found['attack-s']:.0f} s",
            flush=True,
        )

    def plain(self, depth: int) -> None:
        """No defence, at another depth."""
        self.read(self.prepare(depth, False), depth, "none", node_sends(self.folder, depth, self.texts, "bfloat16"))

    def controls(self, attacker: Attacker, arrived: list[Tensor]) -> None:
        """What is guessing."""
        rows = torch.cat(arrived[: len(self.own)])
        mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].split(
            [len(ids) for ids in self.own]
        )
        read = [reading.ids[:, 0] for reading in attacker.reader.read(mixed)]
        self.figures[f"control-shuffled/{self.name}"] = share_right(read, self.truth)
        guesses = attacker.prior.guesses(self.own) if attacker.prior else []
        self.figures[f"control-prior/{self.name}"] = share_right(guesses, [ids[1:] for ids in self.truth])

    def adapter(self, depth: int, steps: int) -> dict[str, Tensor]:
        """A node's adapter after some training; kept in the work folder."""
        file = self.work / f"adapter-{self.name}-{depth}-{steps}.safetensors"
        if not file.exists():
            save_file(trained_adapter(self.folder, self.data, depth, steps), file)
        return load_file(file)

    def has(self, figure: str) -> bool:
        """Whether the file holds a figure of this model already."""
        return self.out is not None and self.out.exists() and figure in json.loads(self.out.read_text())

    def redaction(self, depth: int) -> None:
        """What is read of records whose fields rules describe, and what learning from such rows loses."""
        found = {row["answer"]: row for row in map(json.loads, self.source.read_text().splitlines())}
        rows = [row for row in found.values() if len(row["answer"].split()) <= 60][: 12 if self.quick else None]
        planted = plant(len(rows), 1)
        for row, record in zip(rows, planted, strict=True):
            row["question"] = f"{record.text} {row['question']}"
        words, rules = self.work / "names.txt", self.work / "rules.toml"
        words.write_text("\n".join(record.fields[0] for record in planted))
        rules.write_text(f"words = {str(words)!r}\n[patterns]\nrecord = '\\d\\d-\\d{{4}}-\\d\\d'\n")
        plain, node = self.data.model_copy(update={"max_length": 256}), NodeConfig(redact_rules=str(rules))
        redacted = plain.model_copy(update={"redact": ",".join(KINDS)})
        before = self.loss_after(depth, rows, plain, NodeConfig())
        after = self.loss_after(depth, rows, redacted, node)
        redact = redactor(redacted, node)
        texts = [redact.text(record.text) if redact else "" for record in planted[:8]]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        attacker = self.attacker or self.prepare(depth, False)
        read = attacker.read(node_sends(self.folder, depth, ids, "bfloat16")).ids
        difference = gain(after, before)
        self.figures |= {
            f"canary-fields/{self.name}/{depth}/redact": share_found(read, planted[:8], self.tokenizer),
            f"loss-rise/{self.name}/{depth}/redact": difference.mean,
            f"loss-rise-error/{self.name}/{depth}/redact": difference.error,
        }
        print(f"{self.name:10} {depth:3} redact         {[*self.figures.items()][-3:]}", flush=True)

    def loss_after(self, depth: int, rows: list[dict[str, str]], data: Data, node: NodeConfig) -> Losses:
        """Losses of the answers of every fourth row, after training on the others."""
        parts = {"test": rows[::4], "train": [row for i, row in enumerate(rows) if i % 4]}
        for name, part in parts.items():
            (self.work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        train_on, test_on = (data.model_copy(update={"path": str(self.work / f"{n}.jsonl")}) for n in ("train", "test"))
        model = trained(self.folder, train_on, node, depth, 1 if self.quick else 30)
        test = load_examples(test_on, node, self.tokenizer, 0)
        by_answer = sorted([*test.train, *test.heldout], key=lambda row: [n for n in row["labels"] if n >= 0])
        return measure(model, [batch for row in by_answer for batch in heldout_batches([row], self.tokenizer, 1)])

    def defences(self, depth: int) -> None:
        """All defences at one depth, with the loss beside them."""
        self.attacker = attacker = self.prepare(depth, True)
        loss = Loss(self.folder, depth)
        plain, whole = node_sends(self.folder, depth, self.texts, "bfloat16"), loss(self.own)
        self.read(attacker, depth, "none", plain)
        times = attacker.seconds, self.figures[f"attack-s/{self.name}/{depth}/none"]
        self.figures[f"audit-s/{self.name}"] = sum(times)
        self.controls(attacker, plain)
        state = self.adapter(depth, 1 if self.quick else 30)
        self.read(attacker, depth, "adapter", node_sends(self.folder, depth, self.texts, "bfloat16", state))
        rounded = node_sends(self.folder, depth, self.texts, "int8")
        coarse = replace(attacker, rounding=rounding(attacker.bottom.run(self.public[:16]).flatten(0, 1), "int8"))
        self.read(coarse, depth, "int8", rounded)
        self.figures[f"loss-rise/{self.name}/{depth}/int8"] = loss(self.own, rounded) - whole
        for noise, passes in ((1.0, 1),) if self.quick else ((0.3, 1), (1.0, 1), (1.0, 10)):
            once = add_noise(plain, noise, 1, torch.Generator().manual_seed(0))
            self.figures[f"loss-rise/{self.name}/{depth}/noise-{noise:g}"] = loss(self.own, once) - whole
            noisy = add_noise(plain, noise, passes, torch.Generator().manual_seed(0))
            self.read(attacker, depth, f"noise-{noise:g}-x{passes}", noisy, noise / math.sqrt(passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="model folders")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[2, 8, 12], help="bottom layers, if the model has them"
    )
    parser.add_argument("--examples", type=int, default=16, help="of 64 tokens each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fl-split-bench-privacy")
    parser.add_argument("--quick", action="store_true", help="little text: the shape of the table, not its numbers")
    parser.add_argument("--missing", action="store_true", help="only what --json lacks: goes on where it was stopped")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    for folder in options.models[-1:] if options.quick else options.models:
        bench = Bench(folder.resolve(), options)
        layers = AutoConfig.from_pretrained(folder).num_hidden_layers
        first, *others = (depth for depth in options.depths if depth + TOP < layers)
        if not (options.missing and bench.has(f"audit-s/{bench.name}")):
            bench.defences(first)
            write(options.json, {**bench.figures, **about(0)}, keep=True)
        for depth in [] if options.quick else others:
            if not (options.missing and bench.has(f"recovered/{bench.name}/{depth}/none")):
                bench.plain(depth)
        if not (options.missing and bench.has(f"loss-rise/{bench.name}/{first}/redact")):
            bench.redaction(first)
        write(options.json, {**bench.figures, **about(0)}, keep=True)


if __name__ == "__main__":
    main()
