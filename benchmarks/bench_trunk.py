"""What does the trunk service cost over a trunk in the same process, and what does it bear?

    python benchmarks/bench_trunk.py [--bench DIR] [--quick] [--only SECTION ...] [--json FILE]

Sections: overhead, throughput, hiding, bytes, overload, fuzz, soak, gpu. DIR holds a model folder (the only one with a
config.json) and ``medquad/<institution>.jsonl``, for held-out losses; without it they are of the demo. Every ratio is
of times taken by turns in one run. Servers listen on 127.0.0.1 and compute with one thread.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from trunk_fuzz import bench_fuzz
from trunk_load import bench_overload, bench_soak
from trunk_parts import ROOT, Server, interleaved, percentile, random_model, ratio, relay_line

from fl_split import demo, wire
from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.malloc import keep_heap, share_heap
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.slots import Trunk
from fl_split.model.trunk import LocalTrunk
from fl_split.node import train
from fl_split.node.evaluate import evaluate
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.trunk import server
from fl_split.trunk.access import add_token
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.padding import passes, run_packed
from fl_split.wire import Packed

Figures = dict[str, float]
Code = Callable[[Tensor], Tensor]  # what is read of hidden states, ``[tokens, hidden]``, that were sent


@dataclass(frozen=True)
class Setting:
    """What all sections have in common."""

    bench: Path | None
    quick: bool
    seeds: int
    work: Path


# ------------------------------------------------------------------------------------------------------ overhead


def bench_overhead(setting: Setting) -> Figures:
    """A forward pass over loopback gRPC against the same trunk called in this process."""
    folder = random_model(setting.work / "overhead", 768, 12)
    held, expected = hold_layers(folder, 1, 1), Expected.from_checkpoint(folder, 1, 1)
    figures: Figures = {}
    tables: dict[str, Figures] = {}
    with server.embedded(held) as address:
        shapes = [("large", 8, 256, 7), ("small", 1, 32, 30)]
        if setting.quick:
            shapes = [("large", 2, 96, 2), ("small", 1, 32, 5)]
        for name, batch, seq, repeats in shapes:
            hidden_states = torch.randn(batch, seq, 768)
            for dtype in ("bfloat16", "float32", "int8"):
                with TrunkConnection(address, expected, wire_dtype=dtype) as client:
                    times = interleaved(
                        {
                            "remote": lambda h=hidden_states, c=client: c.start(h, None, None).result(),
                            "local": lambda h=hidden_states: held.run(h, None, None),
                        },
                        repeats,
                    )
                key = f"overhead/{name}" if dtype == "bfloat16" else f"overhead/{name}-{dtype}"
                figures[key], figures[f"{key}-spread"] = ratio(times, "remote", "local")
                figures[f"{key}-local-s"] = statistics.median(times["local"])
                if dtype == "bfloat16":
                    more_ms = 1e3 * statistics.median(
                        a - b for a, b in zip(times["remote"], times["local"], strict=True)
                    )
            parts = _parts(hidden_states, held)
            parts["grpc-and-waiting"] = more_ms - sum(parts.values())
            parts["remote-less-local"] = more_ms
            tables[name] = parts
            figures |= {f"overhead-{name}/{part}-ms": ms for part, ms in parts.items()}
    print(f"\nwhere the overhead goes, ms, bfloat16\n  {'part':20}" + "".join(f"{name:>10}" for name in tables))
    for part in tables["small"]:
        print(f"  {part:20}" + "".join(f"{parts[part]:10.2f}" for parts in tables.values()))
    return figures


def _parts(hidden_states: Tensor, held: HeldLayers) -> Figures:
    """Milliseconds of each step around the layers, in bfloat16; what is left of the difference is gRPC's."""
    packed = wire.pack_batch(hidden_states, None, None)
    request = wire.encode_request(packed, 2)
    limits = wire.CallLimits(hidden_states.shape[-1], 1 << 20, 1 << 20)
    reply = wire.encode_reply(packed.rows.bfloat16(), 2)
    message = request.SerializeToString()
    steps: dict[str, Callable[[], object]] = {
        "pack-encode": lambda: wire.encode_request(wire.pack_batch(hidden_states, None, None), 2),
        "serialize": request.SerializeToString,
        "parse": lambda: type(request).FromString(message),
        "decode": lambda: wire.decode_request(request, limits),
        "layout": lambda: run_packed(lambda h, mask, positions: h, [packed], causal=True),
        "encode-reply": lambda: wire.encode_reply(packed.rows.bfloat16(), 2),
        "decode-reply": lambda: wire.decode_reply(reply, request, limits.hidden_size).float(),
    }
    return {name: 1e3 * statistics.median(seconds) for name, seconds in interleaved(steps, 10).items()}


# ---------------------------------------------------------------------------------------------------- throughput


def bench_throughput(setting: Setting) -> Figures:
    """Tokens per second of closed-loop callers against one in-process loop over merged batches."""
    folder = random_model(setting.work / "throughput", 256, 6)
    held, expected = hold_layers(folder, 1, 1), Expected.from_checkpoint(folder, 1, 1)
    generator = torch.Generator().manual_seed(0)
    figures: Figures = {}
    tokens, mine = setting.work / "throughput.json", [setting.work / f"token-{i}" for i in range(16)]
    with ExitStack() as stack:
        for i, file in enumerate(mine):  # a token each: callers are told apart by it
            file.write_text(add_token(tokens, f"clinic-{i}", None))
        process = Server(folder, 1, 1, f"security.tokens={tokens}")
        stack.callback(process.stop)
        credentials = [Credentials(token_file=str(file)) for file in mine]
        clients = [
            stack.enter_context(TrunkConnection(process.address, expected, in_flight=1, credentials=own))
            for own in credentials
        ]
        for client in clients:
            client.connect()
        for callers in (1, 4, 16) if setting.quick else (1, 2, 4, 8, 16):
            each = max(1, 8 // callers) if setting.quick else max(2, 24 // callers)
            calls = [[_ragged(generator) for _ in range(each)] for _ in range(callers)]
            packed = [packed for own in calls for packed in own]
            num_tokens, merged = sum(len(p.rows) for p in packed), _merge(packed, 4096)
            latencies: list[float] = []
            times = interleaved(
                {
                    "service": lambda c=calls, seen=latencies: _call_all(clients, c, seen),
                    "limit": lambda m=merged: [held.run(h, None, None) for h in m],
                },
                2 if setting.quick else 5,
            )
            key = f"throughput-ratio/{callers}"
            figures[key], figures[f"{key}-spread"] = ratio(times, "limit", "service")
            figures[f"throughput/{callers}-tokens-per-s"] = num_tokens / statistics.median(times["service"])
            figures[f"throughput/{callers}-p50-s"] = percentile(latencies, 0.5)
            figures[f"throughput/{callers}-p99-s"] = percentile(latencies, 0.99)
    return figures


def _ragged(generator: torch.Generator) -> Packed:
    lengths = torch.randint(64, 192, (4,), generator=generator).tolist()
    return Packed(torch.randn(sum(lengths), 256, generator=generator), lengths, None)


def _merge(requests: list[Packed], max_tokens: int) -> list[Tensor]:
    """The padded batches that the best order would give, ready to run."""
    whole = Packed(torch.cat([r.rows for r in requests]), [n for r in requests for n in r.lengths], None)
    batches: list[Tensor] = []
    for spans in passes([whole]):
        while spans:
            count = max(1, max_tokens // spans[0].length)
            part, spans = spans[:count], spans[count:]
            batches.append(torch.zeros(len(part), part[0].length, whole.rows.shape[1]))
            for i, span in enumerate(part):
                batches[-1][i, : span.length] = whole.rows[span.rows]
    return batches


def _call_all(clients: list[TrunkConnection], calls: list[list[Packed]], latencies: list[float]) -> None:
    def caller(client: TrunkConnection, mine: list[Packed]) -> None:
        for packed in mine:
            started = time.perf_counter()
            client._call(packed)
            latencies.append(time.perf_counter() - started)

    with ThreadPoolExecutor(len(calls)) as threads:
        list(threads.map(caller, clients, calls))


# ------------------------------------------------------------------------------------------------ latency hiding


_ROUND_TRIP_S = 0.05
_ACCUMULATION = 8


def bench_hiding(setting: Setting) -> Figures:
    """Training steps per second with 50 ms added to the round trip, one and four calls in flight.

    A step in which the node has much to do hides a delay by itself; in a small one, calls in flight have to. Beside
    what was measured is what the formula of docs/trunk.md says.
    """
    folder = random_model(setting.work / "hiding", 256, 8)
    expected = Expected.from_checkpoint(folder, 2, 2)
    figures: Figures = {}
    with ExitStack() as stack:
        process = Server(folder, 2, 2)
        stack.callback(process.stop)
        near = stack.enter_context(TrunkConnection(process.address, expected))
        near.connect()
        line = stack.enter_context(relay_line(process.port, _ROUND_TRIP_S / 2))
        far = stack.enter_context(TrunkConnection(line.address, expected))
        far.connect()
        print("\nseconds a step: measured (formula)")
        for key, batch, seq in (("latency-hiding", 4, 32 if setting.quick else 96), ("latency-hiding-small", 1, 16)):
            figures |= _hidden(key, folder, near, far, (batch, seq), 1 if setting.quick else 15)
    return figures


def _hidden(
    key: str, folder: Path, near: TrunkConnection, far: TrunkConnection, shape: tuple[int, int], repeats: int
) -> Figures:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 512, shape, generator=generator) for _ in range(_ACCUMULATION)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    hidden_states = torch.randn(*shape, 256, generator=generator)

    def step(trunk: TrunkConnection, in_flight: int) -> Callable[[], object]:
        model = adapters.attach(load_ends(folder, 2, 2, trunk), Lora(), train_bottom=True, seed=0)
        model.train()
        return lambda: accumulate(model, batches, in_flight)

    times = interleaved(
        {
            "near": step(near, 4),
            "far": step(far, 4),
            "near-1": step(near, 1),
            "far-1": step(far, 1),
            "call": lambda: near.start(hidden_states, None, None).result(),
        },
        repeats,
    )
    seconds = {name: statistics.median(values) for name, values in times.items()}
    trunk_s = seconds["call"]
    node_s = max(0.0, seconds["near-1"] / _ACCUMULATION - trunk_s)

    def formula(delay_s: float, in_flight: int) -> float:
        n, call_s = _ACCUMULATION, trunk_s + delay_s
        return max(n * node_s, n * trunk_s, n / in_flight * (node_s + call_s)) + call_s

    hidden, width = ratio(times, "near", "far")
    figures = {
        key: hidden,
        f"{key}-spread": width,
        f"{key}/one-in-flight": ratio(times, "near-1", "far-1")[0],
        f"{key}/gain-without-delay": ratio(times, "near-1", "near")[0],
        f"{key}/gain-of-four-in-flight": ratio(times, "far-1", "far")[0],
        f"{key}/node-s": node_s,
        f"{key}/trunk-s": trunk_s,
    }
    for name, delay_s, in_flight in (("near", 0.0, 4), ("far", _ROUND_TRIP_S, 4), ("far-1", _ROUND_TRIP_S, 1)):
        figures[f"{key}/step-{name}-s"] = seconds[name]
        figures[f"{key}/step-{name}-formula-s"] = formula(delay_s, in_flight)
        print(f"  {shape!s:10} {name:6} {seconds[name]:8.3f} ({formula(delay_s, in_flight):.3f})")
    return figures


# --------------------------------------------------------------------------------------------------------- bytes


def bench_bytes(setting: Setting) -> Figures:
    """Bytes per training token against activations and gradients both ways in float32; held-out loss beside it.

    The bytes are those on the connection, both ways, as a relay counts them: scales, headers, framing and all. Large
    models have channels that dwarf the others, the one here has not: it trains once more with such a channel put in
    for the way to the trunk and back, in float32, in the wire's int8, and in int8 with a scale per token only.
    """
    if setting.bench is None:
        folder, texts = demo.model_folder(), sorted(demo.data_folder().glob("*.jsonl"))[0]
    else:
        folder = next(path.parent for path in sorted(setting.bench.glob("*/config.json")))
        texts = setting.bench / "medquad" / "niddk.jsonl"
    held, expected = hold_layers(folder, 2, 2), Expected.from_checkpoint(folder, 2, 2)
    about = {"steps": 3 if setting.quick else 200, "bottom-lr": 8e-3, "top-lr": 1.6e-2, "scheduler": "linear"}
    config, tokenizer = Train.model_validate(about), prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    data = Data(path=str(texts), max_length=96)
    loaded = {seed: load_examples(data, NodeConfig(), tokenizer, seed) for seed in range(setting.seeds)}
    figures: Figures = {}
    ratios: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}

    def trained(trunk: Trunk, seed: int) -> tuple[int, Callable[[], float]]:
        """Tokens of a training, and its held-out loss, which asks the trunk once more."""
        examples = loaded[seed]
        heldout = heldout_batches(examples.heldout[: 16 if setting.quick else None], tokenizer, 16)
        client = load_ends(folder, 2, 2, trunk, surrogate="blocks", surrogate_layers=2)
        model = adapters.attach(client, Lora(), train_bottom=True, seed=seed)
        batches = training_batches(examples.train, tokenizer, config.batch_size, seed, 0)
        done = train.train_round(model, train.make_optimizer(model, config), batches, config)
        return done.num_tokens, lambda: evaluate(model, heldout)["loss"]

    codes: dict[str, Code] = {"float32": Tensor.float, "int8": _int8, "int8-per-token": _int8_per_token}
    for seed in loaded:
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8")):
            with ExitStack() as stack:
                port = int(stack.enter_context(server.embedded(held)).rpartition(":")[2])
                line = stack.enter_context(relay_line(port))
                trunk = stack.enter_context(TrunkConnection(line.address, expected, wire_dtype=dtype))
                num_tokens, loss = trained(trunk, seed)
                ratios.setdefault(name, []).append(line.num_bytes / num_tokens / (4 * 4 * expected.hidden_size))
                losses.setdefault(dtype, []).append(loss())
        for name, code in codes.items():
            _, loss = trained(_Outliers(LocalTrunk(held.model), code), seed)
            losses.setdefault(f"outliers-{name}", []).append(loss())
    for name, values in ratios.items():
        figures[f"bytes-ratio/{name}"] = statistics.mean(values)
    for name, values in losses.items():
        figures[f"heldout-loss/{name}"] = statistics.mean(values)
        if setting.seeds > 1:
            away = [a - b for a, b in zip(values, losses["float32"], strict=True)]
            figures[f"heldout-loss/{name}-minus-float32"] = statistics.mean(away)
            figures[f"heldout-loss/{name}-minus-float32-largest"] = max(away, key=abs)
    return figures


class _Outliers:
    """A trunk in this process, reached through a code both ways while one channel is 100 times as large as the rest."""

    def __init__(self, trunk: LocalTrunk, code: Code) -> None:
        self._trunk, self._code = trunk, code

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        done: Future[Tensor] = Future()
        out = self._trunk.start(self._through(hidden_states), attention_mask, position_ids).result()
        done.set_result(self._through(out))
        return done

    def _through(self, hidden_states: Tensor) -> Tensor:
        outlier = torch.zeros(hidden_states.shape[-1])
        outlier[0] = 100 * hidden_states.square().mean().sqrt()
        rows = (hidden_states + outlier).flatten(0, -2)
        return self._code(rows).view_as(hidden_states) - outlier


def _int8(rows: Tensor) -> Tensor:
    encoded, outliers = wire.encode_rows(rows, wire.NAMES["int8"])
    return wire.decode_rows(encoded, wire.NAMES["int8"], outliers, *rows.shape)


def _int8_per_token(rows: Tensor) -> Tensor:
    scales = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scales).round() * scales


# ----------------------------------------------------------------------------------------------------------- gpu


def bench_gpu(setting: Setting) -> Figures:
    """Tokens per second of a 1B-shaped random trunk in bfloat16: alone, batched, compiled."""
    if not torch.cuda.is_available():
        print("gpu: skipped, no GPU here")
        return {}
    folder = random_model(setting.work / "gpu", 2048, 18)
    figures: Figures = {}
    for compiled in (False, True):
        held = hold_layers(folder, 1, 1, torch.bfloat16, device_map="cuda:0")
        if compiled:
            held.model.compile(dynamic=True)
        num_params = sum(p.numel() for name, p in held.model.named_parameters() if "layers" in name)
        for name, batch in (("alone", 1), ("batched", 16)):
            hidden_states = torch.randn(batch, 512, 2048, dtype=torch.bfloat16, device="cuda:0")

            def run(h: Tensor = hidden_states, held: HeldLayers = held) -> None:
                held.run(h, None, None)
                torch.cuda.synchronize()

            seconds = statistics.median(interleaved({"run": run}, 20)["run"])
            key = f"gpu/{name}{'-compiled' if compiled else ''}"
            figures[f"{key}-tokens-per-s"] = batch * 512 / seconds
            figures[f"{key}-tflops"] = 2 * num_params * batch * 512 / seconds / 1e12
    return figures


# ---------------------------------------------------------------------------------------------------------- main

SECTIONS: dict[str, Callable[[Any], Figures]] = {
    "overhead": bench_overhead,
    "throughput": bench_throughput,
    "hiding": bench_hiding,
    "bytes": bench_bytes,
    "overload": bench_overload,
    "fuzz": bench_fuzz,
    "soak": bench_soak,
    "gpu": bench_gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, help="folder of a trained model and texts")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, small shapes, short loads: the shape of the table"
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings per wire dtype, for held-out losses")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, help="write the figures here, added to those in it")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if args.bench and not args.bench.is_dir():
        parser.error(f"--bench {args.bench} is not a folder")
    bench = args.bench and args.bench.resolve()
    torch.set_num_threads(1)
    share_heap()  # as the server does, or what it is held against would be slower for that alone
    keep_heap()
    with tempfile.TemporaryDirectory() as work:
        for name in args.only:
            started = time.monotonic()
            figures = SECTIONS[name](Setting(bench, args.quick, args.seeds, Path(work)))
            print(f"\n{name} ({time.monotonic() - started:.0f} s)")
            for key, value in figures.items():
                print(f"  {key:44} {value:12.4g}")
            if args.json:
                _add(args.json, figures)


def _add(file: Path, figures: Figures) -> None:
    packages = ("torch", "transformers", "grpcio", "protobuf")
    about: dict[str, Any] = {f"version/{name}": version(name) for name in packages}
    about |= {"machine": platform.machine(), "cpu": _cpu(), "commit": _commit(), "seed": 0}
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **about, **figures}, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    """Of the code that was measured; with a plus if it was changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
