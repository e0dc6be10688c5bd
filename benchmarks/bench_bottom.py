"""Does the bottom learn, and how much of the exact gradient's gain does each surrogate keep?

    python benchmarks/bench_bottom.py --bench DIR [--quick] [--json FILE] [--plot FILE] [--work DIR] [--jobs N]

DIR holds a model folder (the only one with a config.json) and ``medquad/<institution>.jsonl``. The trunk runs in this
process. Each kind has its learning rates, one of each end, swept on the first institution and seed, and then that of
its surrogate if this is trained on the node; it runs at its own best on all institutions and seeds.
Gap closed = (top only - kind) / (top only - exact), of held-out losses.
A matched surrogate is also shown trained further on the node: on the trunk's outputs alone (+distilled), and on random
probes as well (+probes).

The matched surrogates are fitted here, to public text only: by default the documentation that comes with Python and
text sampled from the model itself, or ``--text FILES``. Nothing of the institutions' text goes into a fit.

Runs are kept in ``--work`` and not repeated, so that an interrupted benchmark goes on.
"""

import argparse
import ast
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from about import about, write
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import Examples, load_examples
from fl_split.model.distill import Distiller
from fl_split.model.loading import boundaries_of
from fl_split.model.loss import Batch, accumulate
from fl_split.model.trunk import LocalTrunk, load_trunk, run_trunk
from fl_split.node import train
from fl_split.node.evaluate import evaluate
from fl_split.node.expected import Expected
from fl_split.node.trunk_cache import CachedTrunk
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.tools.fit.folder import Fit
from fl_split.tools.fit.lessons import load_teacher, observe
from fl_split.tools.fit.surrogate import fit
from fl_split.tools.fit.text import read_text, sample_text
from fl_split.tools.gradcheck import Candidate, build, gradcheck, surrogate_params
from fl_split.trunk import server
from fl_split.trunk.layers import hold_layers

BOTTOM, TOP = 2, 2
MAX_LENGTH, BATCH = 96, 8
RATES = ("4e-3,8e-3", "8e-3,8e-3", "8e-3,1.6e-2", "1.6e-2,1.6e-2")  # of bottom and top
# Of a surrogate that is trained on the node; the rates of the ends are swept at the first.
DISTILL_RATES, PROBE_RATES = ("3e-4", "1e-3"), ("1e-3", "3e-4")


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    model: Path
    texts: Path
    steps: int
    work: Path
    public: int = 8192  # sequences to fit on, of each source at most
    rows: int | None = None  # of an institution, at most


@dataclass(frozen=True)
class Method:
    """A surrogate and how it is trained on the node, if at all."""

    candidate: Candidate
    trained: bool = False
    probe_every: int = 0

    @property
    def name(self) -> str:
        """Such as ``matched-2+probes``."""
        plain = self.candidate.name
        if self.probe_every:
            return f"{plain}+probes"
        return f"{plain}+distilled" if self.trained and self.candidate.kind == "matched" else plain

    @property
    def calls(self) -> float:
        """Tensors of hidden states on the wire over those of a forward pass, 2."""
        return 2.5 if self.candidate.kind == "exact" else 1 + (1 / self.probe_every if self.probe_every else 0)

    @property
    def surrogate_rates(self) -> tuple[str, ...]:
        """What is swept of its surrogate."""
        if not self.trained:
            return ()
        return PROBE_RATES if self.probe_every else DISTILL_RATES

    def build(self, setting: Setting, trunk: LocalTrunk, lr: float) -> tuple[PeftModel, Distiller | None]:
        """A client around `trunk`, and what trains its surrogate."""
        model = build(setting.model, BOTTOM, TOP, trunk, self.candidate, Lora())
        return model, train.make_distiller(model, lr, self.probe_every) if self.trained else None


@dataclass(frozen=True)
class Task:
    """One training run."""

    method: Method
    institution: str
    seed: int
    rates: str  # of bottom and top, and of a surrogate that is trained

    @property
    def key(self) -> str:
        return f"{self.method.name} {self.institution} {self.seed} {self.rates}"


def python_documentation(out: Path, size: int) -> Path:
    """Write text that comes with every Python, the language reference and docstrings of the library, up to a size."""
    text = "\n\n".join(topics.values())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if len(text) >= size:
            break
        if not {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(file.parts):
            nodes = ast.walk(ast.parse(file.read_bytes()))
            found = (ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
            text += "".join(f"\n\n{paragraph}" for paragraph in found if paragraph and len(paragraph) > 200)
    out.write_text(text[:size], encoding="utf-8")
    return out


def examples(setting: Setting, institution: str, seed: int) -> tuple[Examples, object]:
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(setting.model))
    config = Data.model_validate({"path": str(setting.texts / f"{institution}.jsonl"), "max-length": MAX_LENGTH})
    return load_examples(config, NodeConfig(), tokenizer, seed, max_rows=setting.rows), tokenizer


def run(setting: Setting, task: Task) -> float:
    """Train one client; returns its held-out loss."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    private, tokenizer = examples(setting, task.institution, task.seed)
    trunk = LocalTrunk(load_trunk(setting.model, BOTTOM, TOP))
    bottom, top, *own = map(float, task.rates.split(","))
    model, _ = task.method.build(setting, trunk, *(own or [0.0]))
    config = Train.model_validate(
        {"steps": setting.steps, "batch-size": BATCH, "bottom-lr": bottom, "top-lr": top, "scheduler": "linear"}
    )
    optimizer = train.make_optimizer(model, config)
    torch.manual_seed(task.seed)  # of the probes
    batches = training_batches(private.train, tokenizer, BATCH, task.seed, 0)
    train.train_round(model, optimizer, batches, config)
    return evaluate(model, heldout_batches(private.heldout, tokenizer, 16))["loss"]


class Runs:
    """Runs done so far, by key, in a file of one JSON object a line."""

    def __init__(self, setting: Setting, jobs: int) -> None:
        self._file = setting.work / f"runs-{setting.steps}.jsonl"
        self._setting, self._pool = setting, ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.losses: dict[str, float] = {entry["key"]: entry["loss"] for entry in map(json.loads, lines)}

    def do(self, tasks: Iterable[Task]) -> None:
        todo = [task for task in dict.fromkeys(tasks) if task.key not in self.losses]
        waiting = [(task, self._pool.submit(run, self._setting, task)) for task in todo]
        for task, future in waiting:
            self.losses[task.key] = future.result()
            print(f"  {task.key}: {self.losses[task.key]:.4f}", flush=True)
            with self._file.open("a") as file:
                file.write(json.dumps({"key": task.key, "loss": self.losses[task.key]}) + "\n")

    def loss(self, task: Task) -> float:
        return self.losses[task.key]


def public_text(setting: Setting, files: list[Path] | None) -> torch.Tensor:
    """Token ids to fit on: the files given, or Python's documentation and more in the model's own words."""
    if files:
        return read_text(files, setting.model, MAX_LENGTH)
    file = python_documentation(setting.work / "documentation.txt", 8 * MAX_LENGTH * setting.public)
    text = read_text([file], setting.model, MAX_LENGTH)
    text = torch.cat([text[: setting.public], sample_text(setting.model, setting.public, Fit(length=MAX_LENGTH))])
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]


def fit_surrogate(setting: Setting, files: list[Path] | None, layers: int, steps: int) -> Path:
    out = setting.work / f"matched-{layers}-{steps}.safetensors"
    if not out.exists():
        text = public_text(setting, files)
        print(f"fitting a surrogate worth {layers} layers, {steps} steps ...", flush=True)
        started = time.monotonic()
        card = fit(
            setting.model, BOTTOM, TOP, text, Fit(layers=layers, steps=steps, length=MAX_LENGTH, lessons=steps), out
        )
        print(
            f"  {time.monotonic() - started:.0f} s; gradient cosine {card['gradient-cosine']:.3f} on other public text"
        )
    return out


def spsa_cosine(setting: Setting, batch: Batch, queries: int) -> float:
    """Cosine of dL/dh1 as estimated from random perturbations of h1 with the exact one, for one batch."""
    full = load_teacher(setting.model, BOTTOM, TOP, Fit())
    lesson = observe(full, boundaries_of(full), batch["input_ids"], batch["labels"])
    trunk, generator = load_trunk(setting.model, BOTTOM, TOP), torch.Generator().manual_seed(0)
    estimate = torch.zeros_like(lesson.h1)
    for _ in range(queries):
        direction = torch.randn(lesson.h1.shape, generator=generator)
        epsilon = 1e-3 * lesson.h1.norm() / direction.norm()
        moved = run_trunk(trunk, lesson.h1 + epsilon * direction, None, None)
        slope = ((moved - lesson.h2) / epsilon * lesson.g2).sum(dim=(1, 2), keepdim=True)  # one per sequence
        estimate += slope * direction
    return torch.cosine_similarity(estimate.flatten(), lesson.g1.flatten(), dim=0).item()


def step_times(setting: Setting, methods: list[Method], batches: list[Batch]) -> dict[str, float]:
    """Median seconds per step of each kind, interleaved, over that of `none`; the trunk's time is in it."""
    trunk = LocalTrunk(load_trunk(setting.model, BOTTOM, TOP))
    models = {method.name: method.build(setting, trunk, 1e-3) for method in methods}
    times: dict[str, list[float]] = {name: [] for name in models}
    for batch in batches:
        for name, (model, distiller) in models.items():
            model.train()
            started = time.perf_counter()
            accumulate(model, [batch])
            if distiller is not None:
                distiller.step()
            model.zero_grad(set_to_none=True)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: value / medians["none"] for name, value in medians.items()}


def cache_saving(setting: Setting, institution: str, num_examples: int, epochs: int = 3) -> dict[str, float]:
    """What kind `none` saves by asking the trunk about each example once: bytes and time, with over without."""
    private, tokenizer = examples(setting, institution, 0)
    rows = private.train[:num_examples]
    steps = epochs * len(rows) // BATCH
    config = Train.model_validate({"steps": steps})
    expected = Expected.from_checkpoint(setting.model, BOTTOM, TOP)
    sent, seconds = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        server.embedded(hold_layers(setting.model, BOTTOM, TOP)) as address,
    ):
        for cached in (False, True):
            with TrunkConnection(address, expected) as client:
                trunk = CachedTrunk(client, Path(folder) / "cache.sqlite", 10**9, b"") if cached else client
                model = build(setting.model, BOTTOM, TOP, trunk, Candidate("none"), Lora())
                batches = training_batches(rows, tokenizer, BATCH, 0, 0)
                done = train.train_round(model, train.make_optimizer(model, config), batches, config)
                sent.append(client.bytes_sent)
                seconds.append(done.seconds)
    return {"cache/bytes-ratio": sent[1] / sent[0], "cache/time-ratio": seconds[1] / seconds[0]}


def plot(figures: dict[str, Any], names: list[str], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = plt.figure(figsize=(7, 4), layout="constrained").add_subplot()
    for i, name in enumerate(names):
        x, y, sd = (figures[f"{key}/{name}"] for key in ("surrogate-layers", "gap-closed", "gap-closed-sd"))
        axes.errorbar(x, 100 * y, yerr=100 * sd, fmt="os^Dvp*X"[i % 8], capsize=3, label=name)
    axes.figure.legend(loc="outside right upper", title="mean, sd over runs")
    axes.set_xlabel("surrogate on the node, in trunk layers")
    axes.set_ylabel("gap closed, %")
    axes.grid(alpha=0.3)
    axes.figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--institutions", nargs="+", default=["niddk", "ninds"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", nargs="+", default=RATES, help="learning rates to sweep: bottom,top")
    parser.add_argument("--fit-steps", type=int, default=4000)
    parser.add_argument("--layers", type=int, nargs="*", default=[2], help="budgets of the matched surrogates")
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2], help="numbers of trunk layers kept")
    parser.add_argument("--text", type=Path, nargs="+", help="public text to fit on")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fl-split-bench-bottom")
    parser.add_argument("--only", nargs="+", default=[], help="these kinds only, such as matched-2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--quick", action="store_true", help="few steps, one seed: the shape of the table, not its numbers"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.bench.is_dir():
        parser.error(f"--bench {options.bench} is not a folder")
    if options.quick:
        options.steps, options.seeds, options.fit_steps, options.institutions = 3, 1, 10, options.institutions[:1]
    rates = options.rates[1:2] if options.quick else options.rates

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    options.bench = options.bench.resolve()
    model = next(options.bench.glob("*/config.json")).parent
    options.work.mkdir(parents=True, exist_ok=True)
    fewer = {"public": 64, "rows": 160} if options.quick else {}
    setting = Setting(model, options.bench / "medquad", options.steps, options.work, **fewer)
    files = {k: fit_surrogate(setting, options.text, k, options.fit_steps) for k in options.layers}
    matched = [Candidate("matched", k, file) for k, file in files.items()]
    none, exact = Method(Candidate("none")), Method(Candidate("exact"))
    others = [Method(Candidate("identity")), *(Method(Candidate("blocks", k)) for k in options.blocks)]
    for candidate in (Candidate("distilled", 2), *matched):
        others += [Method(candidate)] if candidate.kind == "matched" else []
        others += [Method(candidate, trained=True), Method(candidate, trained=True, probe_every=1)]
    kinds = [c for c in (none, *others, exact) if not options.only or c.name in options.only]

    runs, first = Runs(setting, options.jobs), options.institutions[0]
    by_top = list({pair.split(",")[1]: pair for pair in rates}.values())  # a frozen bottom has no rate

    def sweep(choices: dict[Method, list[str]]) -> dict[Method, str]:
        tasks = {c: [Task(c, first, 0, choice) for choice in some] for c, some in choices.items()}
        runs.do(chain(*tasks.values()))
        return {c: min(some, key=runs.loss).rates for c, some in tasks.items()}

    best = sweep(
        {c: [",".join([ends, *c.surrogate_rates[:1]]) for ends in (by_top if c is none else rates)] for c in kinds}
    )
    best |= sweep(
        {c: [f"{best[c].rpartition(',')[0]},{rate}" for rate in c.surrogate_rates] for c in kinds if c.trained}
    )
    pairs = [(institution, seed) for seed in range(options.seeds) for institution in options.institutions]
    runs.do(Task(c, i, s, best[c]) for c in kinds for i, s in pairs)

    if none not in kinds or exact not in kinds:
        return  # the table is for whoever comes with the other kinds and the same --work

    losses = {c: [runs.loss(Task(c, i, s, best[c])) for i, s in pairs] for c in kinds}
    private, tokenizer = examples(setting, first, 0)
    batches = list(islice(training_batches(private.train, tokenizer, BATCH, 0, 0), 3 if options.quick else 6))
    candidates = list(dict.fromkeys(c.candidate for c in kinds if c is not none))
    agreement = {row.candidate: row for row in gradcheck(model, BOTTOM, TOP, batches, candidates)}
    slower = step_times(setting, kinds, batches)
    trunk_model = load_trunk(model, BOTTOM, TOP)
    trunk = LocalTrunk(trunk_model)
    layer = sum(p.numel() for p in trunk_model.parameters()) / len(trunk_model.boundaries.trunk)
    figures: dict[str, Any] = {}
    print(
        f"\n{options.steps} steps of {BATCH} x {MAX_LENGTH} tokens, {len(pairs)} runs per kind, LoRA r=8 on all linears"
    )
    print(
        f"{'kind':20}{'rates':18}held-out (spread)   gap closed (spread)  cosine  norm   layers  memory  bytes   step"
    )
    for c in kinds:
        client, _ = c.build(setting, trunk, 1e-3)
        extra, whole = surrogate_params(client), sum(p.numel() for p in client.parameters())
        gaps = [(a - b) / (a - e) for a, b, e in zip(losses[none], losses[c], losses[exact], strict=True)]
        mean = {k: statistics.mean(v) for k, v in losses.items()}
        gap = (mean[none] - mean[c]) / (mean[none] - mean[exact])
        row = agreement.get(c.candidate)
        figures |= {
            f"heldout-loss/{c.name}": mean[c],
            f"heldout-loss-sd/{c.name}": statistics.pstdev(losses[c]),
            f"gap-closed/{c.name}": gap,
            f"gap-closed-sd/{c.name}": statistics.pstdev(gaps),
            f"bottom-rate/{c.name}": float(best[c].split(",")[0]),
            f"top-rate/{c.name}": float(best[c].split(",")[1]),
            **({f"surrogate-rate/{c.name}": float(best[c].split(",")[2])} if c.trained else {}),
            f"bytes-ratio/{c.name}": c.calls,
            f"surrogate-layers/{c.name}": extra / layer,
            f"memory-ratio/{c.name}": whole / (whole - extra),
            f"step-time-ratio/{c.name}": slower[c.name],
            **({f"cosine/{c.name}": row.cosine, f"norm-ratio/{c.name}": row.norm_ratio} if row else {}),
        }
        print(
            f"{c.name:20}{best[c]:18}{mean[c]:.4f} ({statistics.pstdev(losses[c]):.3f})     "
            f"{100 * gap:6.1f} % ({100 * statistics.pstdev(gaps):4.1f})    "
            + (f"{row.cosine:6.3f}  {row.norm_ratio:5.2f}" if row else "     -      -")
            + f"  {extra / layer:6.2f}  {whole / (whole - extra):6.2f}"
            + f"  x{c.calls:<4g}  x{slower[c.name]:.2f}"
        )
    for queries in (1, 16):
        figures[f"cosine/spsa-{queries}"] = spsa_cosine(setting, batches[0], queries)
        print(f"SPSA on h1, {queries} queries: gradient cosine {figures[f'cosine/spsa-{queries}']:.3f}")
    figures |= {f"sweep/{key}": loss for key, loss in runs.losses.items() if key.split()[1:3] == [first, "0"]}
    figures |= cache_saving(setting, first, 16 if options.quick else 64)
    print(
        f"trunk cache of kind none, 3 epochs: bytes to the trunk x{figures['cache/bytes-ratio']:.2f}, "
        f"time x{figures['cache/time-ratio']:.2f}"
    )
    figures |= about(f"0 to {options.seeds - 1}") | {"institutions": ", ".join(options.institutions)}
    write(options.json, figures)
    if options.plot:
        plot(figures, [c.name for c in kinds], options.plot)


if __name__ == "__main__":
    main()
