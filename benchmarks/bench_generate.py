"""What does generation across the split cost, against the full model in one process, and without a cache?

    python benchmarks/bench_generate.py [--model FOLDER] [--bottom 2 --top 2] [--quick] [--json FILE]

A node and a trunk in a process each, one thread each, over loopback; the full model with a thread as well. A relay
between them adds half of a round trip each way. Rates are tokens per second after the first token, greedy, float32,
medians of repeats that are interleaved; the prompt is random tokens (with prompt lookup: a few, over and over).
`decode-ratio/local`: split with its cache over full with its own. `decode-ratio/uncached`: split with its cache over
split without, at the same prompt. `overhead-per-token-ms`: what a token takes longer than with the trunk's layers and
cache in the node's process. `streams-speedup/N`: tokens per second of N streams at once over those of one, at the
trunk, whose callers are at no loss for the next token. `cache-bytes-error`: what the trunk reserves for a token beside
what its tensors take, relative.
"""

import argparse
import asyncio
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
from typing import Any

import grpc
import torch
from about import about, write
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from fl_split import demo, wire
from fl_split.model.ends import load_ends
from fl_split.model.key_values import KeyValues, Part, bytes_per_token, run_pass
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers
from fl_split.trunk.server import embedded
from fl_split.wire_decode import encode_open, encode_step

SEED = 0


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
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=clock,
        **{"use_cache": True, **options},
    )
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


def cache_bytes_error(trunk: Any) -> float:
    kept = KeyValues(2, 16)
    run_pass(trunk, [Part(kept, i, torch.zeros(3 + i, trunk.config.hidden_size)) for i in range(2)])
    return abs(bytes_per_token(trunk) * 2 * 16 / kept.size_bytes - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; by default the demo's")
    parser.add_argument("--bottom", type=int, default=2)
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder, ends = options.model or demo.model_folder(), (options.bottom, options.top)
    block = about(SEED, "grpcio")
    repeats, num_tokens, uncached_tokens = (1, 8, 2) if options.quick else (3, 32, 4)
    full: Any = AutoModelForCausalLM.from_pretrained(folder)
    trunk = load_trunk(folder, *ends)
    vocab, most = full.config.vocab_size, full.config.max_position_embeddings
    prompt, long = (torch.randint(3, vocab, (1, min(n, most - 64))) for n in (256, 512))
    repeated = torch.randint(3, vocab, (1, 8)).repeat(1, prompt.shape[1] // 8)
    local = load_ends(folder, *ends, LocalTrunk(trunk), surrogate="none")
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    with ExitStack() as stack:
        address = stack.enter_context(process(serve, folder, *ends))
        split: dict[int, Any] = {}
        for delay_ms in (0, 10, 50):
            way = stack.enter_context(process(relay, address, delay_ms / 2000)) if delay_ms else address
            expected = Expected.from_checkpoint(folder, *ends)
            connection = stack.enter_context(TrunkConnection(way, expected, wire_dtype="float32"))
            split[delay_ms] = load_ends(folder, *ends, connection, surrogate="none")
            measure(split[delay_ms], prompt[:, :8], 2)
        for _ in range(repeats):
            for name, model in (("full", full), ("local", local), *((f"split/{ms}-ms", m) for ms, m in split.items())):
                note(f"tokens-per-s/{name}", measure(model, prompt, num_tokens)[1])
                lookup = measure(model, repeated, num_tokens, prompt_lookup_num_tokens=5)[1]
                note(f"tokens-per-s/{name}-lookup", lookup)
            for ms, model in split.items():
                note(f"tokens-per-s/uncached/{ms}-ms", measure(model, prompt, uncached_tokens + 1, use_cache=False)[1])
            note("first-token-s/full", measure(full, long, 2)[0])
            note("first-token-s/split", measure(split[0], long, 2)[0])
            for number in (1, 4, 8, 16):
                note(f"stream-tokens-per-s/{number}", streams(address, full.config.hidden_size, number, num_tokens, 64))
    figures = {name: statistics.median(values) for name, values in samples.items()}
    spread = {name: (min(values), max(values)) for name, values in samples.items()}
    rate = {name.removeprefix("tokens-per-s/"): value for name, value in figures.items()}
    figures |= {
        "decode-ratio/local": rate["split/0-ms"] / rate["full"],
        "decode-ratio/uncached": rate["split/0-ms"] / rate["uncached/0-ms"],
        "overhead-per-token-ms": 1e3 * (1 / rate["split/0-ms"] - 1 / rate["local"]),
        "lookup-speedup/50-ms": rate["split/50-ms-lookup"] / rate["split/50-ms"],
        "cache-bytes-error": cache_bytes_error(trunk),
    }
    for number in (4, 8, 16):
        one = figures["stream-tokens-per-s/1"]
        figures[f"streams-speedup/{number}"] = figures[f"stream-tokens-per-s/{number}"] / one
    print(f"{full.config.model_type}, {full.config.num_hidden_layers} layers, split {ends[0]}+{ends[1]}")
    print(f"prompt of {prompt.shape[1]} tokens, first token for {long.shape[1]}, {repeats} repeats")
    for name, value in figures.items():
        low, high = spread.get(name, (value, value))
        print(f"{name:36} {value:10.3f}  ({low:.3f} to {high:.3f})")
    write(options.json, {**figures, **block})


if __name__ == "__main__":
    sys.exit(main())
