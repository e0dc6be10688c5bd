"""What does each party's memory peak at, and is that what `fl-split plan` says from the configuration alone?

    python benchmarks/bench_memory.py [--quick] [--json FILE] [--work DIR] [--repeats N]

A Llama with random weights is generated as float32 shards in a temporary folder. Client, trunk and the full model with
LoRA on all of its layers load it and train one step, each in a process of its own. A peak is the high-water mark of
resident memory (which counts mapped files) above what the process holds after its imports. The client talks to the
trunk over loopback gRPC; the bytes of its requests are counted there. What the plan says is also held against other
models and settings (`CASES`), once each; `plan-memory-error` is the worst of all.

The client's share is its weights, its adapters in training (with gradients and optimizer) and its activations as
planned; `client-peak-over-weights` leaves the activations out of it. A stated constant is taken off each peak before
it is divided by a share; `-raw` figures take nothing off.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from about import about, write
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from fl_split.config import Lora, RunConfig
from fl_split.model import adapters
from fl_split.model.checkpoint import read_config
from fl_split.model.ends import checkpoint_activations, load_ends
from fl_split.model.loss import Batch
from fl_split.node import train
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.plan.plan import make_plan
from fl_split.trunk.layers import hold_layers
from fl_split.trunk.server import embedded

BOTTOM, TOP = 2, 2
CONSTANT = 64 * 2**20  # buffers of the allocator, of gRPC and of the loader that no weight explains
LLAMA = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_hidden_layers=24,
    vocab_size=32000,
)


@dataclass(frozen=True)
class Case:
    """A model, and what differs from the first case's run."""

    model: PretrainedConfig
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> RunConfig:
        plain = {
            "split.bottom-layers": BOTTOM,
            "split.top-layers": TOP,
            "surrogate.kind": "blocks",
            "surrogate.layers": 2,
            "train.batch-size": 4,
            "train.steps": 1,
            "data.max-length": 96,
        }
        return RunConfig.from_flat({**plain, **self.keys})

    def write(self, folder: Path, quick: bool) -> int:
        """Generate the checkpoint, in the run's dtype; returns its bytes."""
        torch.manual_seed(0)
        config = copy.deepcopy(self.model)
        if quick:
            config.num_hidden_layers, config.vocab_size, config.hidden_size = 6, 4000, 384
        model = AutoModelForCausalLM.from_config(config).to(self.run.model.torch_dtype)
        model.save_pretrained(folder, max_shard_size="200MB")
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


FIRST = "llama"
CASES = {
    FIRST: Case(LLAMA),
    # few tokens: a CPU without instructions for bfloat16 takes a hundred times as long for its backward pass
    "llama-bfloat16": Case(LLAMA, {"model.dtype": "bfloat16", "train.batch-size": 1}),
    "llama-long": Case(LLAMA, {"train.batch-size": 2, "data.max-length": 512}),
    "llama-checkpointing": Case(LLAMA, {"data.max-length": 256, "train.activation-checkpointing": True}),
    "llama-in-flight": Case(LLAMA, {"train.accumulation": 4, "trunk.in-flight": 3}),
    "gpt2": Case(GPT2Config(n_embd=1024, n_layer=12, n_head=16), {"train.batch-size": 8, "data.max-length": 128}),
    "gpt-neox": Case(
        GPTNeoXConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=50304
        ),
        {"train.batch-size": 2, "data.max-length": 384},
    ),
}


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


class Watch:
    """Resident memory above what there was when the watch began."""

    def __init__(self) -> None:
        torch.randn(256, 256) @ torch.randn(256, 256)  # libraries that load when they are first used
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = _status("VmRSS")
        self.marks: dict[str, int] = {}

    def mark(self, name: str) -> None:
        self.marks[f"{name}-peak"] = _status("VmHWM") - self._before
        self.marks[f"{name}-resident"] = _status("VmRSS") - self._before


def batch_of(run: RunConfig, vocab_size: int) -> Batch:
    shape = (run.train.batch_size, run.data.max_length)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def client(config: RunConfig, folder: Path) -> dict[str, int]:
    address = sys.stdin.readline().strip()  # of the trunk, once it serves
    watch = Watch()
    dtype = config.model.torch_dtype
    with TrunkConnection(address, Expected.from_checkpoint(folder, BOTTOM, TOP), timeout_s=600) as trunk:
        trunk.connect()
        model = load_ends(folder, BOTTOM, TOP, trunk, surrogate="blocks", surrogate_layers=2, dtype=dtype)
        watch.mark("loading")
        if config.train.activation_checkpointing:
            checkpoint_activations(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peft = adapters.attach(model, config.lora, train_bottom=True, seed=0)
        optimizer = train.make_optimizer(peft, config.train)
        batches = repeat(batch_of(config, model.config.vocab_size))
        train.train_round(peft, optimizer, batches, config.train, train.RoundSettings(in_flight=config.trunk.in_flight))
        watch.mark("training")
        trained = sum(p.numel() * p.element_size() for p in peft.parameters() if p.requires_grad)
        sent = {"bytes-sent": trunk.bytes_sent, "bytes-received": trunk.bytes_received}
    return {**watch.marks, **sent, "weights": weights, "training-state": 4 * trained}


def trunk(config: RunConfig, folder: Path) -> dict[str, int]:
    watch = Watch()
    held = hold_layers(folder, BOTTOM, TOP, config.model.torch_dtype)
    watch.mark("loading")
    with embedded(held) as own:
        print(own, flush=True)
        sys.stdin.readline()  # until the client has done its step
    watch.mark("training")
    return {**watch.marks, "weights": sum(p.numel() * p.element_size() for p in held.model.parameters())}


def full(config: RunConfig, folder: Path) -> dict[str, int]:
    """LoRA on every layer of the whole model: what a node would need without a split."""
    from peft import LoraConfig, TaskType, get_peft_model

    watch = Watch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    watch.mark("loading")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    lora = Lora()
    peft = get_peft_model(
        model,
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
    )
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-3)
    peft.train()
    peft(**batch_of(config, model.config.vocab_size)).loss.backward()
    optimizer.step()
    watch.mark("training")
    return {**watch.marks, "weights": weights}


PARTIES = {"client": client, "trunk": trunk, "full": full}


def start(party: str, name: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--party", party, "--case", name, "--folder", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result(process: "subprocess.Popen[str]", word: str = "") -> dict[str, int]:
    """What a party found, once it has the word to begin, or to end."""
    out, _ = process.communicate(f"{word}\n", timeout=1800)
    if process.returncode:
        raise RuntimeError("a party failed: its own output says why")
    marks: dict[str, int] = json.loads(out.splitlines()[-1])
    return marks


def measure(name: str, folder: Path) -> dict[str, dict[str, int]]:
    serving, asking = start("trunk", name, folder), start("client", name, folder)  # they import side by side
    address = serving.stdout.readline().strip() if serving.stdout else ""
    return {"client": result(asking, address), "trunk": result(serving)}


def check_plan(case: Case, folder: Path, client: dict[str, int]) -> dict[str, Any]:
    """Figures of a case that is measured for the plan's sake."""
    node, peak = make_plan(read_config(str(folder)), case.run).node, client["training-peak"]
    share = client["weights"] + client["training-state"] + node.activations
    return {
        "plan-memory-error": abs(node.total - peak) / peak,
        "client-peak-over-share": (peak - CONSTANT) / share,
        "client/training-peak-bytes": peak,
        "plan/total-bytes": node.total,
        "plan/activations-bytes": node.activations,
    }


def summarize(runs: list[dict[str, dict[str, int]]], folder: Path, size: int) -> dict[str, Any]:
    plan = make_plan(read_config(str(folder)), CASES[FIRST].run)

    def median(party: str, name: str) -> float:
        return statistics.median(run[party][name] for run in runs)

    def spread(party: str) -> float:
        peaks = [run[party]["training-peak"] for run in runs]
        return (max(peaks) - min(peaks)) / statistics.median(peaks)

    own = median("client", "weights") + median("client", "training-state")
    share = own + plan.node.activations
    peak = median("client", "training-peak")
    figures: dict[str, Any] = {
        "checkpoint-bytes": size,
        "constant-bytes": CONSTANT,
        "client-load-peak-over-weights": median("client", "loading-peak") / median("client", "weights"),
        "client-peak-over-share": (peak - CONSTANT) / share,
        "client-peak-over-share-raw": peak / share,
        "client-peak-over-weights": (peak - CONSTANT) / own,
        "client-peak-over-weights-raw": peak / own,
        "client-peak-over-full-lora": peak / median("full", "training-peak"),
        "trunk-peak-over-share": (median("trunk", "training-peak") - CONSTANT) / median("trunk", "weights"),
        "trunk-peak-over-share-raw": median("trunk", "training-peak") / median("trunk", "weights"),
        "plan-weights-error": abs(plan.node.weights - median("client", "weights")) / median("client", "weights"),
        f"plan-memory-error/{FIRST}": abs(plan.node.total - peak) / peak,
        "plan-bytes-error": max(
            abs(plan.request_bytes - median("client", "bytes-sent")) / median("client", "bytes-sent"),
            abs(plan.reply_bytes - median("client", "bytes-received")) / median("client", "bytes-received"),
        ),
        "plan/total-bytes": plan.node.total,
        "plan/weights-bytes": plan.node.weights,
        "plan/training-bytes": plan.node.training,
        "plan/activations-bytes": plan.node.activations,
    }
    for party in PARTIES:
        for name in ("weights", "loading-peak", "training-peak"):
            figures[f"{party}/{name}-bytes"] = median(party, name)
        figures[f"{party}/training-peak-spread"] = spread(party)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", type=Path, help="where the temporary folders go; needs 1.5 GB")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the cases")
    parser.add_argument("--quick", action="store_true", help="a small checkpoint and one repeat: no meaningful numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--party", choices=PARTIES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if options.party:
        print(json.dumps(PARTIES[options.party](CASES[options.case].run, options.folder)))
        return
    repeats = 1 if options.quick else options.repeats
    block = about(0) | {"repeats": repeats}
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name in options.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            folder = Path(scratch)
            size = case.write(folder, options.quick)
            if name == FIRST:
                runs = [measure(name, folder) | {"full": result(start("full", name, folder))} for _ in range(repeats)]
                figures |= summarize(runs, folder, size)
            else:
                checked = check_plan(case, folder, measure(name, folder)["client"])
                figures |= {f"{key}/{name}": value for key, value in checked.items()}
            print(f"{name}: done", flush=True)
    figures["plan-memory-error"] = max(figures[f"plan-memory-error/{name}"] for name in options.only)
    print(f"split {BOTTOM} + ... + {TOP}, blocks-2, one step; {FIRST}: medians of {repeats}, the others once")
    for name, value in figures.items():
        print(f"{name:46} {value / 1e6:10.1f} MB" if "-bytes" in name else f"{name:46} {value:10.3f}")
    print(block)
    write(options.json, figures | block)


if __name__ == "__main__":
    main()
