"""What bench_trunk.py and trunk_load.py stand on: random models, server processes, a relay, statistics."""

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent

_PR_SET_PDEATHSIG = 1  # of prctl.h; Linux only
_SERVE = f"""
import ctypes, signal
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL)
from fl_split.cli import app
app()
"""


def random_model(folder: Path, hidden_size: int, num_layers: int) -> Path:
    """A Llama of this shape whose layers matter: weights far larger than the default initialisation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, by turns, after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float]:
    """Median over the turns of `name` / `to`, and the quartiles' distance."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(ratios), spread(ratios)


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles; 0 for fewer than four values."""
    if len(values) < 4:
        return 0.0
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_mib(pid: int | str = "self") -> float:
    """Memory that a process has now; Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


class Server:
    """`fl-split trunk serve` in a process of its own, which ends with the thread that started it, killed or not."""

    def __init__(self, folder: Path, bottom: int, top: int, *settings: str, port: int = 0) -> None:
        self._settings = (
            f"model.name={folder}",
            f"model.bottom-layers={bottom}",
            f"model.top-layers={top}",
            "model.threads=1",
            "metrics.enabled=false",
            "log.level=warning",
            *settings,
        )
        self.port = port or free_port()
        self.start()

    def start(self) -> None:
        flags = [f"--set={setting}" for setting in (*self._settings, f"server.port={self.port}")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, "trunk", "serve", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def resident_mib(self) -> float:
        return resident_mib(self.process.pid)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@dataclass
class Line:
    """A relay's port, and what has passed through it, both ways together."""

    port: int = 0
    num_bytes: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def relay_line(port: int, delay_s: float = 0.0) -> Iterator[Line]:
    """A TCP relay to a port on loopback that counts every byte, and holds it back for `delay_s` each way."""
    ready, stop = threading.Event(), threading.Event()
    line = Line()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                writer.write(data)
                if not data:
                    writer.close()
                    return

        writing = asyncio.create_task(write())
        while data := await reader.read(1 << 20):
            line.num_bytes += len(data)
            waiting.put_nowait((time.monotonic() + delay_s, data))
        waiting.put_nowait((time.monotonic() + delay_s, b""))
        await writing

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        with suppress(asyncio.CancelledError):  # the end of the relay ends its connections
            await asyncio.gather(relay(reader, there[1]), relay(there[0], writer), return_exceptions=True)

    async def main() -> None:
        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        line.port = listener.sockets[0].getsockname()[1]
        ready.set()
        await asyncio.to_thread(stop.wait)
        listener.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield line
    finally:
        stop.set()
        thread.join()
