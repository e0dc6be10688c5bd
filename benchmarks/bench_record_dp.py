"""What does differential privacy of single examples (`dp.record-*`) cost, in loss and in time?

    python benchmarks/bench_record_dp.py --model DIR --data FILE [--noise 0.8] [--quick] [--json FILE]

FILE holds an institution's questions and answers (JSON lines). The top of 2 layers is trained (`surrogate.kind = none`,
LoRA on all linears), without and with noise, from the same start, with as many steps and, on average, examples a step;
held-out loss per answer token, epsilon by our accountant, and its error against Opacus' own. Step time: gradients of
the same batch of 8 examples, as ever and each example alone, clipped, with noise; interleaved, medians of processor
seconds, the trunk's in this process included.

To be cheap, the trunk runs in bfloat16 and what it says of an example is kept, the logits of training are bfloat16, and
examples go through alone without noise as well.
"""

import argparse
import hashlib
import time
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from about import about, write
from bench_real import RoundedHead
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.account import Charge, epsilon_of
from fl_split.node.evaluate import evaluate
from fl_split.node.record_dp import RecordDp
from fl_split.node.train import RoundSettings, make_optimizer, train_round
from fl_split.tools.gradcheck import Candidate, build

ENDS, DELTA, BATCH = (2, 2), 1e-4, 8


class Kept:
    """A trunk that remembers what it said of each input: the bottom is frozen."""

    def __init__(self, trunk: LocalTrunk) -> None:
        self._trunk, self._said = trunk, dict[bytes, Tensor]()

    def start(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> "Future[Tensor]":
        """See `slots.Trunk.start`."""
        key = hashlib.sha256(h1.numpy().tobytes()).digest()
        if key not in self._said:
            self._said[key] = self._trunk.start(h1, attention_mask, position_ids).result().to(torch.bfloat16)
        done: Future[Tensor] = Future()
        done.set_result(self._said[key].to(h1.dtype))
        return done


class Bench:
    """One model and one institution's examples."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.model
        self.tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(self.folder))
        data = Data.model_validate({"max-length": options.tokens, "holdout-max": options.heldout, "template": "plain"})
        self.examples = load_examples(data, NodeConfig(data_path=str(options.data.resolve())), self.tokenizer, 0)
        self.trunk = LocalTrunk(load_trunk(self.folder, *ENDS, dtype=torch.bfloat16))
        self.kept = Kept(self.trunk)
        self.sampling = min(1.0, options.batch / len(self.examples.train))
        self.figures: dict[str, float] = {"examples": len(self.examples.train)}

    def record(self, noise: float, clip: float) -> RecordDp:
        steps = self.options.steps
        epsilon = epsilon_of([(self.sampling, noise, steps)], DELTA)
        charge = Charge(1, steps, self.sampling, noise, DELTA, epsilon)
        return RecordDp(charge, clip, self.examples.train, self.tokenizer, np.random.default_rng(0))

    def run(self, name: str, rate: float, record: RecordDp | None) -> None:
        """Train once from the start."""
        options = self.options
        lora = Lora.model_validate({"rank": options.rank, "alpha": 2.0 * options.rank})
        model: Any = build(self.folder, *ENDS, self.kept, Candidate("none"), lora)
        model.get_base_model().set_output_embeddings(RoundedHead(model.get_base_model().get_output_embeddings()))
        heldout = list(heldout_batches(self.examples.heldout, self.tokenizer, BATCH))
        if "heldout-loss/base" not in self.figures:
            self.figures["heldout-loss/base"] = evaluate(model, heldout)["loss"]
        keys = {"steps": options.steps, "accumulation": options.batch, "top-lr": rate}
        config, batches = Train.model_validate(keys), training_batches(self.examples.train, self.tokenizer, 1, 0, 0)
        started = time.process_time()
        train_round(model, make_optimizer(model, config), batches, config, RoundSettings(record_dp=record))
        self.figures[f"heldout-loss/{name}"] = loss = evaluate(model, heldout)["loss"]
        epsilon = "none"
        if record:
            self.figures[f"epsilon/{name}"] = record.charge.epsilon
            epsilon = f"{record.charge.epsilon:.2f}"
        print(
            f"{name:12} epsilon {epsilon:>6}  rate {rate:g}  held-out loss {self.figures['heldout-loss/base']:.4f} -> "
            f"{loss:.4f}  {time.process_time() - started:.0f} s",
            flush=True,
        )
        write(options.json, {**self.figures, **about(0)}, keep=True)

    def times(self, kind: Any, layers: int, repeats: int) -> None:
        """One gradient of the same examples, together and each alone."""
        candidate = Candidate(kind, layers)
        model: Any = build(self.folder, *ENDS, self.trunk, candidate, Lora()).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        [batch] = islice(training_batches(self.examples.train, self.tokenizer, BATCH, 0, 0), 1)
        each = list(islice(training_batches(self.examples.train, self.tokenizer, 1, 0, 0), BATCH))
        record, spent = self.record(1.0, 1.0), ([], [])
        for _ in range(repeats + 1):
            for seconds, step in zip(
                spent,
                (lambda: accumulate(model, [batch]), lambda: record.accumulate(model, parameters, each)),
                strict=True,
            ):
                started = time.process_time()
                step()
                seconds.append(time.process_time() - started)
                model.zero_grad(set_to_none=True)
        together, alone = (median(seconds[1:]) for seconds in spent)
        self.figures[f"step-time-ratio/{candidate.name}"] = alone / together
        print(f"step of {candidate.name}: {together:.2f} s together, {alone:.2f} s alone: x{alone / together:.2f}")

    def error(self) -> None:
        """Our epsilon against Opacus' own, at all settings here."""
        try:
            from opacus.accountants import PRVAccountant
        except ImportError:
            print("opacus is not installed: no dp-epsilon-error")
            return
        errors = []
        for noise in self.options.noise:
            opacus = PRVAccountant()
            opacus.history = [(noise, self.sampling, self.options.steps)]
            ours = epsilon_of([(self.sampling, noise, self.options.steps)], DELTA)
            errors.append(abs(ours / opacus.get_epsilon(DELTA, eps_error=0.005) - 1))
        self.figures["dp-epsilon-error"] = max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.8], help="dp.record-noise-multiplier")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rates", type=float, nargs=2, default=[8e-3, 8e-3], help="AdamW's, without and with noise")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="examples a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64, help="of an example, at most")
    parser.add_argument("--heldout", type=int, default=60, help="examples, at most")
    parser.add_argument("--quick", action="store_true", help="few small steps: the shape of the table, not its numbers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.noise, options.steps, options.batch, options.heldout = [1.0], 2, 8, 8
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    bench = Bench(options)
    for kind, layers in (("none", 1), ("blocks", 2)):
        bench.times(kind, layers, 1 if options.quick else 5)
    bench.error()
    bench.run("plain", options.rates[0], None)
    for noise in options.noise:
        bench.run(f"noise-{noise:g}", options.rates[1], bench.record(noise, options.clip))
    write(options.json, {**bench.figures, **about(0)}, keep=True)


if __name__ == "__main__":
    main()
