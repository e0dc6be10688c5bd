"""What does generation across the split cost, against the full model in one process, and without a cache?

    python benchmarks/bench_generate.py [--model FOLDER] [--bottom 2 --top 2] [--quick] [--json FILE]

A node and a trunk in a process each, one thread each, over loopback; the full model with a thread as well. A relay
between them adds half of a round trip each way. Rates are tokens per second after the first token, greedy, float32;
the prompt is random tokens (with prompt lookup: a few, over and over). All are measured by turns, repeat after repeat,
and figures are medians; ratios are medians of each repeat's own. `--json` is written after each repeat, so that a run
may be cut short.
`decode-ratio/local`: split with its cache over full with its own. `decode-ratio/uncached`: split with its cache over
split without, at the same prompt. `overhead-per-token-ms`: what a token takes longer than with the trunk's layers and
cache in the node's process, lower quartiles of single tokens by turns; `/toy`: of a step of a trunk of one layer, as
wide as the model, where nothing hides it. `streams-speedup/N`: tokens per second of N streams at once over those of
one, at the trunk, whose callers are at no loss for the next token. `cache-bytes-error`: what `fl-split plan` says of a
token beside what the trunk keeps, relative.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import torch
from about import about, write
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from fl_split import demo, wire
from fl_split.config import RunConfig
from fl_split.model.ends import load_ends
from fl_split.model.key_values import KeyValues, NewTokens, run_pass
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.plan.plan import make_plan
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers
from fl_split.trunk.server import embedded
from fl_split.wire_decode import encode_open, encode_step

SEED = 0
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}


def serve(folder: Path, bottom: int, top: int, out: Any) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    with embedded(hold_layers(folder, bottom, top), config=TrunkConfig()) as address:
        out.put(address)
        time.sleep(24 * 3600)


def relay(target: str, delay_s: float, out: Any) -> None:
    """In a process of its own: what comes in goes out `delay_s` later, each way."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65_536):
            loop.call_later(delay_s, writer.write, data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = target.rpartition(":")
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async def main() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        out.put(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[str]:
    """Run until the context ends; yields the address that it says."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=target, args=(*arguments, out), daemon=True)
    child.start()
    try:
        yield out.get(timeout=300)
    finally:
        child.kill()
        child.join()


class Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None: ...


def measure(model: Any, ids: torch.Tensor, num_tokens: int, **options: Any) -> tuple[float, float]:
    """Seconds to the first token, tokens per second after it."""
    clock = Clock()
    started = time.perf_counter()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, streamer=clock, **{**OPTIONS, **options})
    first, last = clock.times[1], clock.times[-1]
    return first - started, sum(clock.counts[2:]) / (last - first)


def streams(address: str, hidden_size: int, number: int, num_tokens: int, past: int) -> float:
    """Tokens per second of so many streams at once, at the trunk."""
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(number) as threads:
        method = channel.stream_stream(
            f"/{wire.SERVICE}/Decode", pb.DecodeRequest.SerializeToString, pb.ForwardReply.FromString
        )
        begin = threading.Barrier(number + 1)

        def run(seed: int) -> None:
            requests: queue.SimpleQueue[pb.DecodeRequest | None] = queue.SimpleQueue()
            call = method(iter(requests.get, None))
            rows = torch.randn(past, hidden_size, generator=torch.Generator().manual_seed(seed))
            requests.put(encode_open(1, past + num_tokens))
            requests.put(encode_step(wire.Packed(rows, [past], None), pb.FLOAT32))
            next(call)
            begin.wait()
            for i in range(num_tokens):
                requests.put(encode_step(wire.Packed(rows[i % past, None], [1], None), pb.FLOAT32))
                next(call)
            requests.put(None)

        running = [threads.submit(run, i) for i in range(number)]
        begin.wait()
        started = time.perf_counter()
        for each in running:
            each.result()
        return number * num_tokens / (time.perf_counter() - started)


def token_times(model: Any, ids: torch.Tensor, num_tokens: int) -> list[float]:
    """Milliseconds of each token after the first two."""
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, streamer=clock, **OPTIONS)
    return [1e3 * (b - a) for a, b in itertools.pairwise(clock.times[2:])]


def toy_overhead(hidden_size: int, num_steps: int) -> float:
    """Milliseconds that a step takes longer at a service than in this process, with a trunk of one layer."""
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=hidden_size,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=hidden_size // 64 or 1,
        max_position_embeddings=2048,
    )
    with TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        address = stack.enter_context(process(serve, folder, 1, 1))
        expected = Expected.from_checkpoint(folder, 1, 1)
        connection = stack.enter_context(TrunkConnection(address, expected, wire_dtype="float32"))
        connection.connect()
        rows, times = torch.randn(64, hidden_size), []
        trunks = [LocalTrunk(load_trunk(folder, 1, 1)), connection]
        both = [trunk.open(wire.Packed(rows, [64], None), 1100)[0] for trunk in trunks]
        for i in range(num_steps):
            for stream in both:
                started = time.perf_counter()
                stream.step(wire.Packed(rows[i % 64, None], [1], None))
                times.append(1e3 * (time.perf_counter() - started))
        for stream in both:
            stream.close()
    return quartile(times[1::2]) - quartile(times[::2])


def quartile(values: list[float]) -> float:
    """The lower one: what others on the machine do to a time makes it longer."""
    return statistics.quantiles(values, n=4)[0]


def cache_bytes_error(folder: Path, trunk: Any, bottom: int, top: int) -> float:
    kept = KeyValues(2, 16)
    run_pass(trunk, [NewTokens(kept, i, torch.zeros(3 + i, trunk.config.hidden_size)) for i in range(2)])
    run = {"model.name": str(folder.resolve()), "split.bottom-layers": bottom, "split.top-layers": top}
    planned = make_plan(trunk.config, RunConfig.from_flat({**run, "surrogate.kind": "none"})).token_bytes
    return abs(planned * 2 * 16 / kept.size_bytes - 1)


class Samples:
    """Numbers by name, one for each repeat."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}  # of single tokens

    def note(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def ratio(self, name: str, above: str, below: str) -> None:
        """Of the newest repeat's two."""
        self.note(name, self.values[above][-1] / self.values[below][-1])

    def figures(self) -> dict[str, float]:
        figures = {name: statistics.median(values) for name, values in self.values.items()}
        figures["overhead-per-token-ms"] = quartile(self.times["split"]) - quartile(self.times["local"])
        return figures


def repeat(samples: Samples, full: Any, local: Any, split: dict[int, Any], address: str, quick: bool) -> None:
    """Measure everything once, by turns."""
    num_tokens, uncached_tokens, turns = (8, 2, 1) if quick else (32, 4, 4)
    vocab, most = full.config.vocab_size, full.config.max_position_embeddings
    prompt, long = (torch.randint(3, vocab, (1, min(n, most - 64))) for n in (256, 512))
    repeated = torch.randint(3, vocab, (1, 8)).repeat(1, prompt.shape[1] // 8)
    rate = "tokens-per-s/{}".format
    for name, model in (("full", full), ("local", local), *((f"split/{ms}-ms", m) for ms, m in split.items())):
        samples.note(rate(name), measure(model, prompt, num_tokens)[1])
        lookup = measure(model, repeated, num_tokens, prompt_lookup_num_tokens=5)[1]
        samples.note(rate(f"{name}-lookup"), lookup)
    for ms, model in split.items():
        samples.note(rate(f"uncached/{ms}-ms"), measure(model, prompt, uncached_tokens + 1, use_cache=False)[1])
    for name, model in (("full", full), ("split", split[0])):
        samples.note(f"first-token-s/{name}", measure(model, long, 2)[0])
    for number in (1, 4, 8, 16):
        found = streams(address, full.config.hidden_size, number, num_tokens, 64)
        samples.note(f"stream-tokens-per-s/{number}", found)
        samples.ratio(f"streams-speedup/{number}", f"stream-tokens-per-s/{number}", "stream-tokens-per-s/1")
    for _ in range(turns):
        for name, model in (("local", local), ("split", split[0])):
            samples.times.setdefault(name, []).extend(token_times(model, prompt[:, :64], 12))
    samples.note("overhead-per-token-ms/toy", toy_overhead(full.config.hidden_size, 100 if quick else 500))
    samples.ratio("decode-ratio/local", rate("split/0-ms"), rate("full"))
    samples.ratio("decode-ratio/uncached", rate("split/0-ms"), rate("uncached/0-ms"))
    samples.ratio("lookup-speedup/50-ms", rate("split/50-ms-lookup"), rate("split/50-ms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; by default the demo's")
    parser.add_argument("--bottom", type=int, default=2)
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat with fewer tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder, ends = options.model or demo.model_folder(), (options.bottom, options.top)
    block = about(SEED, "grpcio")
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trunk = load_trunk(folder, *ends)
    local = load_ends(folder, *ends, LocalTrunk(trunk), surrogate="none")
    error = {"cache-bytes-error": cache_bytes_error(folder, trunk, *ends)}
    samples = Samples()
    with ExitStack() as stack:
        address = stack.enter_context(process(serve, folder, *ends))
        split: dict[int, Any] = {}
        for delay_ms in (0, 10, 50):
            way = stack.enter_context(process(relay, address, delay_ms / 2000)) if delay_ms else address
            expected = Expected.from_checkpoint(folder, *ends)
            connection = stack.enter_context(TrunkConnection(way, expected, wire_dtype="float32"))
            split[delay_ms] = load_ends(folder, *ends, connection, surrogate="none")
            measure(split[delay_ms], torch.full((1, 8), 3), 2)
        for number in range(1 if options.quick else options.repeats):
            repeat(samples, full, local, split, address, options.quick)
            write(options.json, {**samples.figures(), **error, "repeats": number + 1, **block})
    print(f"{full.config.model_type}, {full.config.num_hidden_layers} layers, split {ends[0]}+{ends[1]}")
    for name, value in {**samples.figures(), **error}.items():
        low, high = (f(samples.values.get(name, [value])) for f in (min, max))
        print(f"{name:36} {value:10.3f}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    sys.exit(main())
