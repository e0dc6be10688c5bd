"""On a real pretrained decoder: what is a bottom worth, and how much of that does each kind of gradient keep?

    python benchmarks/bench_real.py --model DIR --data FILE [FILE ...] [--splits 2+2 ...] [--kinds ...] [--json FILE]

FILE holds an institution's questions and answers (JSON lines). Kinds: `none` (the top alone), `none-8` (a top of 8
layers alone), `identity`, `blocks-2`, `matched` (--matched FILE), `streamed` (two steps, for their time: its gradient
is the exact one), `shares`, `exact`, `all` (LoRA on all layers of the whole model), and `probes-4`: the estimate from 4
random probes of the trunk, which is not offered (docs/surrogates.md). `rate-2` trains nothing: it says which rate
`train.top-lr = "auto"` takes for a top of 2 layers. A bottom trains whatever its gradient is worth; with `tried-`
before a kind it has to win a trial first, as in an ordinary run, of four rounds. Each kind has its rates swept on the
first file and seed 0, in the given order and no further than they make it better, and runs at its best on all files and
seeds. Gap closed = (none - kind) / (none - exact), of the means of held-out losses per answer token, within a split,
over the files and seeds that all three have.

To be cheap, the trunk runs in this process, in bfloat16 (float32 for `shares` and `probes`; `all` is bfloat16 as a
whole), the ends in float32, the logits of training in bfloat16; an exact gradient takes one forward pass with a graph,
and both shares of a gradient go through one graph; of a frozen bottom, the trunk's outputs are kept in memory, for
every top and rate. Times are processor seconds.

With --json an interrupted benchmark goes on: runs whose figures are in the file are not repeated, and the table is of
all that is there.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from about import about, write
from peft import PeftModel
from real_table import BATCH, MAX_LENGTH, Figures, Runs, alone, where
from real_trunks import BOTTOM, ExactTrunk, ProbesTrunk, SharesTrunk, as_model, recorded
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Data, Lora, NodeConfig, RunConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import Examples, load_examples
from fl_split.malloc import keep_heap
from fl_split.model import adapters
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries
from fl_split.model.loss import Batch
from fl_split.model.slots import trunk_calls_of
from fl_split.node import rate_search, trial
from fl_split.node.evaluate import evaluate
from fl_split.node.train import RoundSettings, make_optimizer, train_round
from fl_split.tools.gradcheck import Candidate, bottom_gradient, build

KINDS = ("none", "exact", "identity", "blocks-2", "blocks-4")
RATES = ("1e-3,2e-3", "2e-3,4e-3", "4e-3,8e-3")  # of bottom and top
TOP_RATES = ("2e-3", "4e-3", "8e-3", "1.6e-2")  # of a top alone
COSINE_BATCHES = 2
ROUNDS = 4  # of a run, as far as a trial is concerned


class RoundedHead(torch.nn.Module):
    """The output embeddings; while training in bfloat16, which takes a third of the time."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight.detach().to(torch.bfloat16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:
            return self.head(hidden_states)
        return torch.nn.functional.linear(hidden_states.to(torch.bfloat16), self.weight).float()


def whole_model(folder: Path) -> PeftModel:
    """The model unsplit, with LoRA on all of its layers; the bottom's rate goes to the first half."""
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    anatomy = examine(full.config)
    half = anatomy.num_layers // 2
    full.boundaries = Boundaries(anatomy.layers_path, anatomy.num_layers, half, half)
    full.config.use_cache = False
    return adapters.attach(full.eval().requires_grad_(False), Lora(), train_bottom=True, seed=0)


class Bench:
    """What all runs have in common."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.model
        self.tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(options.model))
        self.config = RunConfig.from_flat({"data.max-length": MAX_LENGTH, "train.batch-size": BATCH})
        self.figures: dict[str, Any] = {}
        if options.json and options.json.exists():
            self.figures = json.loads(options.json.read_text())
        if self.figures.get("steps", options.steps) != options.steps:
            raise SystemExit(f"{options.json} is of {self.figures['steps']} steps: give --steps, or another file")
        self.figures |= about("0, 1, ...") | {"model": options.model.name, "steps": options.steps}
        tops = {int(kind.split("-")[1]) for kind in options.kinds if kind.startswith(("none-", "rate-"))}
        self.tops = tuple(sorted(tops | {int(split.split("+")[1]) for split in options.splits}))

    @property
    def runs(self) -> Runs:
        """All so far, those of earlier calls included."""
        return Runs(self.folder, self.options.data[0].stem, self.figures)

    def examples(self, file: Path, seed: int) -> Examples:
        data = Data.model_validate({"max-length": MAX_LENGTH, "holdout-max": self.options.heldout, "template": "plain"})
        return load_examples(data, NodeConfig(data_path=str(file)), self.tokenizer, seed)

    def build(self, split: str, kind: str) -> tuple[PeftModel, Any]:
        """A model and its trunk."""
        if kind == "all":
            return whole_model(self.folder), None
        name, _, count = kind.removeprefix("tried-").partition("-")
        bottom, top = map(int, split.split("+"))
        if name == "none":
            trunk: Any = recorded(self.folder, self.tops)
            bottom, top = BOTTOM, int(count)
            trunk.top, trunk.seconds = top, 0.0
        elif name == "shares":
            trunk = SharesTrunk(as_model(self.folder, bottom, top, torch.float32))
        elif name == "probes":
            trunk = ProbesTrunk(as_model(self.folder, bottom, top, torch.float32), int(count))
        else:
            trunk = ExactTrunk(as_model(self.folder, bottom, top, torch.bfloat16))
        if name in ("exact", "shares"):
            trunk.keeps_graph = True
        matched = self.options.matched if name == "matched" else None
        asks = name in ("shares", "probes")  # for a gradient, as `exact` does
        candidate = Candidate("exact" if asks else name, int(count or 1), matched)  # type: ignore[arg-type]
        model = build(self.folder, bottom, top, trunk, candidate, Lora())
        model.get_base_model().set_output_embeddings(RoundedHead(model.get_base_model().get_output_embeddings()))
        return model, trunk

    def run(self, split: str, file: Path, seed: int, kind: str, rates: str) -> Figures:
        """Train once: held-out loss before and after, seconds a step, cosines on the way."""
        steps = 2 if kind == "streamed" else self.options.steps
        examples = self.examples(file, seed)
        model, trunk = self.build(split, kind)
        bottom_lr, top_lr = map(float, rates.split(","))
        found: Figures = {}
        is_estimate = kind.partition("-")[0] in ("identity", "blocks", "matched", "probes")

        def look(when: str) -> None:
            if is_estimate:
                batches = training_batches(examples.train, self.tokenizer, BATCH, seed, 0)
                found[f"cosine-{when}"] = cosine(model, trunk, list(islice(batches, COSINE_BATCHES)))

        batches = training_batches(examples.train, self.tokenizer, BATCH, seed, 0)
        heldout = list(heldout_batches(examples.heldout, self.tokenizer, BATCH))
        found["heldout-loss-before"] = evaluate(model, heldout)["loss"]
        look("start")
        before, seconds = trunk.seconds if kind.startswith("none") else 0.0, 0.0
        rate = {"bottom-lr": bottom_lr, "top-lr": top_lr, "scheduler": "linear"}
        optimizer = make_optimizer(model, Train.model_validate(rate))
        follows = True
        for number in range(1, ROUNDS + 1):
            first, last = (steps * done // ROUNDS for done in (number - 1, number))
            config = Train.model_validate({"steps": max(last - first, 1), **rate})
            started = time.process_time()
            if kind.startswith("tried-") and trial.is_due(number, number - 1):
                settings, drawn = RoundSettings(first, steps), self.drawn(examples, number)
                result = trial.try_bottom(model, optimizer, *drawn, config, settings)
                follows = trial.passes(result, is_training=number > 1 and follows)
                found |= {f"trial-gain-{number}": result.mean, f"trial-error-{number}": result.error}
            if first < last:
                train_round(model, optimizer, batches, config, RoundSettings(first, steps, trains_bottom=follows))
            seconds += time.process_time() - started
            if 2 * number in (ROUNDS, 2 * ROUNDS):
                look("end" if number == ROUNDS else "middle")
            if kind.startswith("tried-"):
                found[f"bottom-trained-{number}"] = follows
        found["step-s"] = seconds / steps
        if kind.startswith("none"):
            found["step-s-recorded"] = (trunk.seconds - before) / steps  # of this, the trunk's; 0 where it was known
        if kind == "shares":
            found["share-leak-bits"] = trunk.leak_bits / (steps * BATCH)
        if kind != "streamed":
            found["heldout-loss"] = evaluate(model, heldout)["loss"]
        return found

    def drawn(self, examples: Examples, seed: int, *sizes: int) -> tuple[list[Batch], list[Batch]]:
        """What a node tries things with; arguments as of `trial.draw`."""
        found = trial.draw(examples.train, self.tokenizer, self.config, seed, *sizes)
        assert found, "too few examples"
        return found

    def find_rate(self, file: Path, seed: int, top: int) -> None:
        """Say what `train.top-lr = "auto"` comes to, for a top of so many layers."""
        key = f"rate/{file.stem}/{seed}/rate-{top}"
        if key in self.figures:
            return
        model, _ = self.build(f"{BOTTOM}+{top}", f"none-{top}")
        draw = partial(self.drawn, self.examples(file, seed), seed, rate_search.STEPS, rate_search.MEASURED)
        with tempfile.TemporaryDirectory() as answers:
            found = rate_search.find(self.config, model, draw, Path(answers) / "answers", late=False)
        self.figures[key] = found.rate
        write(self.options.json, self.figures)
        print(key, found, flush=True)

    def do(self, split: str, file: Path, seed: int, kind: str, rates: str) -> None:
        """Run once, unless it was."""
        key = f"{where(split, kind)}/{file.stem}/{seed}/{kind}/{rates}"
        if f"heldout-loss-before/{key}" in self.figures:
            return
        found = self.run(split, file, seed, kind, rates)
        self.figures |= {f"{name}/{key}": value for name, value in found.items()}
        write(self.options.json, self.figures)
        print(key, *(f"{name} {value:.4f}" for name, value in found.items()), flush=True)

    def sweep(self, split: str, kind: str) -> None:
        """A kind's rates on the first file and seed, then its best on all."""
        options = self.options
        if kind.startswith("rate-"):
            for seed, file in product(range(options.seeds), options.data):
                self.find_rate(file, seed, int(kind.removeprefix("rate-")))
            return
        kind = alone(split) if kind == "none" else kind
        for rates in [f"0,{rate}" for rate in options.top_rates] if kind.startswith("none-") else options.rates:
            self.do(split, options.data[0], 0, kind, rates)
            if kind == "streamed":
                return
            if self.runs.best_rates(split, kind) != rates:
                break
        rates = self.runs.best_rates(split, kind)
        for seed, file in product(range(options.seeds), options.data):
            self.do(split, file, seed, kind, rates)


def cosine(model: PeftModel, trunk: ExactTrunk, batches: list[Batch]) -> float:
    """Of the bottom adapter's gradient with the exact one, where training stands."""
    calls = trunk_calls_of(model.get_base_model())
    own, kind = bottom_gradient(model, batches), calls.kind
    calls.kind, trunk.keeps_graph = "exact", True
    exact = bottom_gradient(model, batches)
    calls.kind, trunk.keeps_graph = kind, False
    return torch.cosine_similarity(own, exact, dim=0).item()


def rounding(bench: Bench, split: str) -> float:
    """Cosine of the bottom's gradient with the trunk in bfloat16 and in float32."""
    bottom, top = map(int, split.split("+"))
    batches = training_batches(bench.examples(bench.options.data[0], 0).train, bench.tokenizer, BATCH, 0, 0)
    some, found = list(islice(batches, COSINE_BATCHES)), []
    for dtype in (torch.float32, torch.bfloat16):
        trunk = ExactTrunk(as_model(bench.folder, bottom, top, dtype))
        trunk.keeps_graph = True
        found.append(bottom_gradient(build(bench.folder, bottom, top, trunk, Candidate("exact"), Lora()), some))
    return torch.cosine_similarity(*found, dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--splits", nargs="+", default=["2+2"], help="layers of bottom and top")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rates", nargs="+", default=RATES, help="of bottom and top, to be swept")
    parser.add_argument("--top-rates", nargs="+", default=TOP_RATES, help="of a top alone")
    parser.add_argument("--matched", type=Path, help="a fitted surrogate, for the kind `matched`")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--heldout", type=int, default=64, help="examples to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="four steps: the shape of the table, not its numbers")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.heldout = 4, 1, 16
        options.rates, options.top_rates, options.data = options.rates[:1], options.top_rates[:1], options.data[:1]
    torch.set_num_threads(options.threads)
    keep_heap()
    transformers_logging.disable_progress_bar()
    bench = Bench(options)
    for split in options.splits:
        if f"cosine/{split}/bfloat16-trunk" not in bench.figures:
            bench.figures[f"cosine/{split}/bfloat16-trunk"] = rounding(bench, split)
        for kind in options.kinds:
            bench.sweep(split, kind)
    bench.figures |= bench.runs.table()
    write(options.json, bench.figures)
    if options.plot:
        bench.runs.plot(options.splits[0], options.plot)


if __name__ == "__main__":
    main()
