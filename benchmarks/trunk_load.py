"""The sections of bench_trunk.py that wear a trunk out: overload, malformed messages, replicas that are killed."""

import asyncio
import itertools
import random
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError
from torch import Tensor
from trunk_parts import Server, percentile, random_model

from fl_split import adapters, train, wire
from fl_split.config import Lora
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.split import LocalTrunk, load_client
from fl_split.trunk import server
from fl_split.trunk.access import add_token
from fl_split.trunk.client import Expected, TrunkClient

Figures = dict[str, float]
FORWARD = f"/{wire.SERVICE}/Forward"


# ------------------------------------------------------------------------------------------------------ overload


def bench_overload(setting: Any) -> Figures:
    """64 institutions at ten times what the trunk can do: memory, answers, statuses, recovery."""
    folder = random_model(setting.work / "overload", 256, 8)
    held = server.hold_layers(folder, 1, 1)
    tokens = setting.work / "tokens.json"
    bearers = [(("authorization", f"Bearer {add_token(tokens, f'clinic-{i}', None)}"),) for i in range(64)]
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randn(2, 96, 256, generator=generator) for _ in range(8)]
    answers = [held.run(hidden_states, None, None) for hidden_states in requests]
    process = Server(folder, 1, 1, f"security.tokens={tokens}", "limits.queue-tokens=16384")
    try:
        load = _Load(process, bearers, requests, answers)
        return asyncio.run(load.run(10.0 if setting.quick else 120.0))
    finally:
        process.stop()


class _Load:
    """Open-loop callers that do not obey, and what became of their calls."""

    def __init__(self, process: Server, bearers: list[Any], requests: list[Tensor], answers: list[Tensor]) -> None:
        self._process, self._bearers, self._answers = process, bearers, answers
        packed = [wire.pack_batch(hidden_states, None, None) for hidden_states in requests]
        self._messages = [wire.encode_request(p, pb.FLOAT32).SerializeToString() for p in packed]
        self.codes: Counter[str] = Counter()
        self.served: Counter[int] = Counter()
        self.wrong = 0
        self.latencies: list[float] = []

    async def _call(self, call: Any, caller: int, which: int, timeout_s: float = 10.0) -> bool:
        started = time.monotonic()
        try:
            reply = await call(self._messages[which], timeout=timeout_s, metadata=self._bearers[caller])
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            return False
        self.codes["OK"] += 1
        self.served[caller] += 1
        self.latencies.append(time.monotonic() - started)
        expected = self._answers[which].flatten(0, 1)
        rows = wire.decode_rows(reply.hidden_states, reply.dtype, [], *expected.shape)
        self.wrong += not torch.allclose(rows, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        return True

    async def run(self, seconds: float) -> Figures:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with asyncio.TaskGroup() as group:
            channels = [grpc.aio.insecure_channel(self._process.address, options=options) for _ in self._bearers]
            calls = [channel.unary_unary(FORWARD, None, pb.ForwardReply.FromString) for channel in channels]
            await asyncio.wait_for(channels[0].channel_ready(), 60)
            await self._until_served(calls[0])
            alone_s = statistics.median([await self._timed(calls[0]) for _ in range(8)])
            capacity = await self._capacity(calls, 3.0)
            self.codes.clear(), self.served.clear(), self.latencies.clear()
            memory = await self._flood(group, calls, 10 * capacity, seconds)
            flood = dict(self.codes)
            ended = time.monotonic()
            await self._until_served(calls[0])
            recovery_s = time.monotonic() - ended
            after_s = statistics.median([await self._timed(calls[0]) for _ in range(8)])
        for channel in channels:
            await channel.close()
        print(f"overload: {dict(self.codes)}; the last half of the memory: {[round(m) for m in memory[-60::6]]} MiB")
        half = len(memory) // 2
        shares = [self.served[i] for i in range(64)]
        return {
            "overload-memory-growth": max(memory[half:]) / max(memory[: max(1, half)]) - 1,
            "overload/memory-mib": max(memory),
            "overload/offered-over-capacity": sum(self.codes.values()) / seconds / capacity,
            "overload/served-over-capacity": flood.get("OK", 0) / seconds / capacity,
            "overload/wrong-answers": self.wrong,
            "overload/calls": sum(self.codes.values()),
            "overload/improper-statuses": sum(
                n for code, n in self.codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
            ),
            "overload/p99-of-served-s": percentile(self.latencies, 0.99),
            "overload/least-served-over-mean": min(shares) / statistics.mean(shares),
            "overload/recovery-s": recovery_s,
            "overload/latency-after-over-before": after_s / alone_s,
        }

    async def _timed(self, call: Any) -> float:
        started = time.monotonic()
        await self._call(call, 0, 0)
        return time.monotonic() - started

    async def _until_served(self, call: Any) -> None:
        while not await self._call(call, 0, 0):
            await asyncio.sleep(0.02)

    async def _capacity(self, calls: list[Any], seconds: float) -> float:
        """Calls per second that eight closed-loop callers get."""
        end = time.monotonic() + seconds

        async def caller(i: int) -> int:
            count = 0
            while time.monotonic() < end:
                count += await self._call(calls[i], i, i % 8)
            return count

        return sum(await asyncio.gather(*(caller(i) for i in range(8)))) / seconds

    async def _flood(self, group: asyncio.TaskGroup, calls: list[Any], rate: float, seconds: float) -> list[float]:
        """Start calls at a rate whatever becomes of them; returns the server's memory over time, in MiB."""
        started, memory, sent = time.monotonic(), [self._process.resident_mib()], 0
        open_calls: set[asyncio.Task[bool]] = set()
        while (elapsed := time.monotonic() - started) < seconds:
            while sent < elapsed * rate and len(open_calls) < 4096:
                task = group.create_task(self._call(calls[sent % 64], sent % 64, sent % 8))
                open_calls.add(task)
                task.add_done_callback(open_calls.discard)
                sent += 1
            if elapsed > len(memory) * 0.5:
                memory.append(self._process.resident_mib())
            await asyncio.sleep(0.005)
        await asyncio.gather(*open_calls)
        return memory


# ---------------------------------------------------------------------------------------------------------- fuzz


def bench_fuzz(setting: Any) -> Figures:
    """Malformed messages into the request decoder, and some of them over the wire into a server that must live on."""
    num_messages = 10_000 if setting.quick else 120_000
    rng = random.Random(0)
    limits = wire.Limits(32, 256, 64)
    seeds = [_valid(rng, dtype) for dtype in wire.NAMES.values() for _ in range(20)]
    refused = crashes = 0
    slowest = 0.0
    for _ in range(1000):  # what is allocated once
        _decoded(_mutate(rng, seeds), limits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(num_messages):
        message = _mutate(rng, seeds)
        started = time.perf_counter()
        outcome = _decoded(message, limits)
        slowest = max(slowest, time.perf_counter() - started)
        refused += outcome == "refused"
        crashes += outcome == "crash"
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    over_wire, improper = _fuzz_server(setting.work, rng, seeds, 300 if setting.quick else 5000)
    return {
        "fuzz-messages": num_messages,
        "fuzz-crashes": crashes,
        "fuzz/refused-share": refused / num_messages,
        "fuzz/slowest-s": slowest,
        "fuzz/memory-growth-mib": growth / 1024,
        "fuzz/messages-over-the-wire": over_wire,
        "fuzz/improper-statuses": improper,
    }


def _valid(rng: random.Random, dtype: pb.DType) -> bytes:
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    rows = torch.randn(sum(lengths), 32)
    if rng.random() < 0.3:
        rows[:, 3] *= 100
    positions = torch.randint(0, 64, (len(rows),)) if rng.random() < 0.3 else None
    return wire.encode_request(wire.Packed(rows, lengths, positions), dtype).SerializeToString()


def _mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Flip, cut, repeat, splice, or set a field to something absurd."""
    message = bytearray(rng.choice(seeds))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 8)):
                message[rng.randrange(len(message))] = rng.randrange(256)
        case 1:
            del message[rng.randrange(len(message)) :]
        case 2:
            other = rng.choice(seeds)
            message = message[: rng.randrange(len(message))] + other[rng.randrange(len(other)) :]
        case 3:
            message = bytearray(rng.randbytes(rng.randrange(400)))
        case 4:
            at = rng.randrange(len(message))
            message[at:at] = message[at : at + rng.randrange(64)] * rng.randint(1, 20)
        case _:
            return _absurd(rng, bytes(message))
    return bytes(message)


def _absurd(rng: random.Random, message: bytes) -> bytes:
    request = pb.ForwardRequest.FromString(message)
    values = [0, 1, 63, 64, 65, 255, 257, 2**31 - 1, 2**31, 2**32 - 1]
    match rng.randrange(5):
        case 0:
            request.dtype = rng.choice([0, 1, 2, 3, 4, -1, 2**31 - 1])  # type: ignore[assignment]
        case 1:
            request.lengths.append(rng.choice(values))
        case 2:
            request.positions.extend(rng.choices(values, k=rng.randint(1, 300)))
        case 3:
            request.outliers.extend(rng.choices(values, k=rng.randint(1, 5)))
        case _:
            request.hidden_states = rng.choice([b"\xff", b"\x7f", b"\x80"]) * rng.choice(
                [0, 1, len(request.hidden_states)]
            )
    return request.SerializeToString()


def _decoded(message: bytes, limits: wire.Limits) -> str:
    try:
        server._decode(message, limits)
    except (WireError, DecodeError):
        return "refused"
    except Exception as error:
        print(f"crash: {type(error).__name__}: {error}")
        return "crash"
    return "taken"


def _fuzz_server(work: Path, rng: random.Random, seeds: list[bytes], count: int) -> tuple[int, int]:
    """Send malformed messages to a real server; returns how many, and how many did not get a status of their own."""
    held = server.hold_layers(random_model(work / "fuzz", 64, 4), 1, 1)
    improper = 0
    with server.embedded(held) as address, grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(FORWARD)
        for _ in range(count):
            try:
                call(_mutate(rng, seeds), timeout=10)
            except grpc.RpcError as error:
                improper += error.code() is not grpc.StatusCode.INVALID_ARGUMENT
        rows, _ = wire.encode_rows(torch.ones(3, 64), pb.FLOAT32)
        request = pb.ForwardRequest(dtype=pb.FLOAT32, lengths=[3], hidden_states=rows)
        call(request.SerializeToString(), timeout=10)  # it lives
    return count, improper


# ---------------------------------------------------------------------------------------------------------- soak


def bench_soak(setting: Any) -> Figures:
    """Training and mixed traffic over two replicas that are killed (-9) in turns: answers and steps."""
    folder = random_model(setting.work / "soak", 256, 8)
    expected = Expected.from_checkpoint(folder, 2, 2)
    local = LocalTrunk(server.hold_layers(folder, 2, 2).model)
    seconds = 25.0 if setting.quick else 180.0
    with ExitStack() as stack:
        replicas = [Server(folder, 2, 2, "limits.queue-tokens=8192") for _ in range(2)]
        for replica in replicas:
            stack.callback(lambda r=replica: r.process.kill())
        address = ",".join(replica.address for replica in replicas)
        client = stack.enter_context(TrunkClient(address, expected, wire_dtype="float32", timeout_s=120))
        client.connect()
        stop = threading.Event()
        counts: Counter[str] = Counter()
        threads = [
            threading.Thread(target=_churn, args=(replicas, expected, stop, counts)),
            *(threading.Thread(target=_traffic, args=(address, expected, local, i, stop, counts)) for i in range(3)),
        ]
        for thread in threads:
            thread.start()
        try:
            losses = _train(folder, client, lambda step, started: time.monotonic() - started < seconds)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        retries = client.num_retries
    undisturbed = _train(folder, local, lambda step, started: step < len(losses))
    difference = max(abs(a - b) for a, b in zip(losses, undisturbed, strict=True))
    return {
        "soak/kills": counts["kills"],
        "soak/calls": counts["calls"],
        "soak/wrong-answers": counts["wrong"],
        "soak/failed-calls": counts["failed"],
        "soak/steps": len(losses),
        "soak/steps-lost": len(undisturbed) - len(losses),
        "soak/retries-in-training": retries,
        "soak/largest-difference-of-a-loss": difference,
    }


def _churn(replicas: list[Server], expected: Expected, stop: threading.Event, counts: Counter[str]) -> None:
    """Kill one replica, start it again, wait until it serves; then the other."""
    for replica in itertools.cycle(replicas):
        if stop.wait(1.0):
            return
        replica.kill()
        counts["kills"] += 1
        replica.start()
        while not stop.is_set():
            with TrunkClient(replica.address, expected, timeout_s=1) as probe, suppress(Exception):
                probe.connect()
                break


def _traffic(
    address: str, expected: Expected, local: LocalTrunk, seed: int, stop: threading.Event, counts: Counter[str]
) -> None:
    """Requests of mixed sizes, each answer compared with the trunk in this process."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    with TrunkClient(address, expected, wire_dtype="float32", timeout_s=120) as client:
        while not stop.is_set():
            hidden_states = torch.randn(rng.randint(1, 6), rng.randint(1, 60), 256, generator=generator)
            counts["calls"] += 1
            try:
                out = client.start(hidden_states, None, None).result()
            except Exception as error:
                counts["failed"] += 1
                print(f"failed: {type(error).__name__}: {error}")
                continue
            right = local.start(hidden_states, None, None).result()
            counts["wrong"] += not torch.allclose(out, right, rtol=0, atol=1e-4 * float(right.abs().max()))
            time.sleep(0.02)


def _train(folder: Path, trunk: Any, go_on: Callable[[int, float], bool]) -> list[float]:
    model = adapters.attach(load_client(folder, 2, 2, trunk), Lora(), train_bottom=True, seed=0)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    started = time.monotonic()
    while go_on(len(losses), started):
        ids = [torch.randint(0, 512, (2, 24), generator=generator) for _ in range(4)]
        batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
        losses.append(train.accumulate(model, batches, 4))
        optimizer.step()
        optimizer.zero_grad()
    return losses
