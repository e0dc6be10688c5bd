"""The sections of bench_trunk.py that wear a trunk out: overload, replicas that are killed."""

import asyncio
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor
from trunk_fuzz import FORWARD, mutate, valid
from trunk_parts import Server, percentile, random_model

from fl_split import wire
from fl_split.config import Lora
from fl_split.errors import TrunkUnavailable
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.access import add_token
from fl_split.trunk.layers import hold_layers

Figures = dict[str, float]


# ------------------------------------------------------------------------------------------------------ overload


def bench_overload(setting: Any) -> Figures:
    """64 institutions at ten times what the trunk can do: memory, answers, statuses, recovery."""
    folder = random_model(setting.work / "overload", 256, 8)
    held = hold_layers(folder, 1, 1)
    tokens = setting.work / "tokens.json"
    bearers = [(("authorization", f"Bearer {add_token(tokens, f'clinic-{i}', None)}"),) for i in range(64)]
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randn(2, 96, 256, generator=generator) for _ in range(8)]
    answers = [held.run(hidden_states, None, None) for hidden_states in requests]
    process = Server(folder, 1, 1, f"security.tokens={tokens}", "limits.queue-tokens=16384")
    try:
        load = _Load(process, bearers, requests, answers)
        return asyncio.run(load.run(4.0 if setting.quick else 120.0))
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
            await asyncio.wait_for(channels[0].channel_ready(), 300)
            await self._until_served(calls[0])
            alone_s = statistics.median([await self._timed(calls[0]) for _ in range(8)])
            idle_mib = self._process.resident_mib()
            capacity, at_capacity_mib = await self._capacity(calls, max(2, int(seconds / 12)))
            self.codes.clear(), self.served.clear(), self.latencies.clear()
            memory, num_served = await self._flood(group, calls, 10 * capacity, seconds)
            offered, shares = sum(self.codes.values()), [self.served[i] for i in range(64)]
            ended = time.monotonic()
            await self._until_served(calls[0])
            recovery_s = time.monotonic() - ended
            after_s = statistics.median([await self._timed(calls[0]) for _ in range(8)])
            again, _ = await self._flood(group, calls, 10 * capacity, seconds / 2)
        for channel in channels:
            await channel.close()
        curve = [round(mib) for mib in (memory + again)[::10]]
        print(f"overload: {dict(self.codes)}; memory every 5 s, MiB: {curve}")
        quarter = max(1, len(memory) // 4)
        return {
            # From the second quarter on: the first is when the allocator takes what ten times capacity needs.
            "overload-memory-growth": max(memory[-quarter:]) / max(memory[quarter : 2 * quarter]) - 1,
            "overload/memory-growth-of-the-first-burst": max(memory) / idle_mib - 1,
            "overload/memory-growth-of-a-second-burst": max(again) / max(memory) - 1,
            "overload/memory-over-that-at-capacity": max(memory) / at_capacity_mib - 1,
            "overload/memory-mib": max(memory),
            "overload/memory-at-capacity-mib": at_capacity_mib,
            "overload/memory-before-mib": idle_mib,
            "overload/offered-over-capacity": offered / seconds / capacity,
            "overload/served-over-capacity": num_served / seconds / capacity,
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

    async def _until_served(self, call: Any, caller: int = 0) -> None:
        while not await self._call(call, caller, caller % 8):
            await asyncio.sleep(0.02)

    async def _capacity(self, calls: list[Any], rounds: int) -> tuple[float, float]:
        """Calls per second that the trunk serves, and its memory then, in MiB, while every caller has one under way.

        All callers: then a full batch waits while another is computed. They make a call each beforehand.
        """
        memory: list[float] = []

        async def caller(i: int, count: int) -> None:
            for _ in range(count):
                await self._until_served(calls[i], i)
                memory.append(self._process.resident_mib())

        async def all_of_them(count: int) -> float:
            started = time.monotonic()
            await asyncio.gather(*(caller(i, count) for i in range(len(calls))))
            return time.monotonic() - started

        await all_of_them(1)
        return len(calls) * rounds / await all_of_them(rounds), max(memory)

    async def _flood(
        self, group: asyncio.TaskGroup, calls: list[Any], rate: float, seconds: float
    ) -> tuple[list[float], int]:
        """Start calls at a rate whatever becomes of them; the server's memory over time, in MiB, and calls served."""
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
        num_served = self.codes["OK"]  # those that are open have more time than that
        await asyncio.gather(*open_calls)
        return memory, num_served


# ---------------------------------------------------------------------------------------------------------- soak

# How far an answer may be from the right one, of the latter's largest value: what a batch rounds differently, and for
# narrow dtypes one step of the reply.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.01, "int8": 0.01}


def bench_soak(setting: Any) -> Figures:
    """Training and mixed traffic over replicas that are killed (-9) at random: answers, calls and steps."""
    folder = random_model(setting.work / "soak", 256, 8)
    expected = Expected.from_checkpoint(folder, 2, 2)
    local = LocalTrunk(hold_layers(folder, 2, 2).model)
    seconds = 10.0 if setting.quick else 180.0
    stop, calm, dtypes = threading.Event(), threading.Event(), (1 if setting.quick else 2) * list(TOLERANCES)
    with ExitStack() as stack:
        replicas = [Server(folder, 2, 2, "limits.queue-tokens=8192") for _ in range(2 if setting.quick else 3)]
        for replica in replicas:
            stack.callback(lambda r=replica: r.process.kill())
        address = ",".join(replica.address for replica in replicas)
        client = stack.enter_context(TrunkConnection(address, expected, wire_dtype="float32", timeout_s=120))
        client.connect()
        churns = [partial(_churn, replica, expected, seed, calm) for seed, replica in enumerate(replicas)]
        callers = [partial(_traffic, address, expected, local, dtype, stop) for dtype in dtypes]
        works: list[Callable[[Counter[str]], None]] = [*callers, partial(_nuisance, replicas, stop), *churns]
        counts = [Counter[str]() for _ in works]
        threads = [threading.Thread(target=work, args=(mine,)) for work, mine in zip(works, counts, strict=True)]
        for thread in threads:
            thread.start()
        try:
            losses = _train(folder, client, lambda step, started: step < 2 or time.monotonic() - started < seconds)
        finally:
            stop.set()
            for thread in threads[: -len(churns)]:  # a replica ends with the thread that has started it again:
                thread.join()  # whoever still waits for an answer needs it
            calm.set()
            for thread in threads[-len(churns) :]:
                thread.join()
        retries = client.num_retries
    undisturbed = _train(folder, local, lambda step, started: step < len(losses))
    # Every step sees the same examples, so that a step left out or done twice shifts the falling curve for good.
    differences = [abs(a - b) for a, b in zip(losses, undisturbed, strict=True)]
    fall = abs(undisturbed[-2] - undisturbed[-1])
    total = sum(counts, Counter[str]())
    return {
        "soak-calls": total["calls"],
        "soak-kills": total["kills"],
        "soak-wrong": total["wrong"],
        "soak-lost": total["lost"] + (differences[-1] > fall / 2),
        "soak/seconds": seconds,
        "soak/hostile-calls": total["hostile"],
        "soak/steps": len(losses),
        "soak/retries-in-training": retries,
        "soak/largest-difference-of-a-loss": max(differences),
        "soak/difference-of-the-last-loss": differences[-1],
        "soak/last-fall-of-the-loss": fall,
    }


def _churn(replica: Server, expected: Expected, seed: int, stop: threading.Event, counts: Counter[str]) -> None:
    """Let a replica serve for a while, kill it, start it again; nothing keeps all of them from being dead at once."""
    rng = random.Random(seed)
    while not stop.wait(rng.uniform(1.0, 8.0)):
        replica.kill()
        counts["kills"] += 1
        stop.wait(rng.uniform(0.0, 2.0))
        replica.start()
        while not stop.is_set():
            with TrunkConnection(replica.address, expected, timeout_s=1) as probe, suppress(TrunkUnavailable):
                probe.connect()
                break


def _traffic(
    address: str,
    expected: Expected,
    local: LocalTrunk,
    dtype: str,
    stop: threading.Event,
    counts: Counter[str],
) -> None:
    """Requests of mixed sizes, padded on either side or not; each answer is compared with the trunk's in here."""
    rng = random.Random()  # what is asked when depends on the kills anyway
    with TrunkConnection(address, expected, wire_dtype=dtype, timeout_s=120) as client:
        while not stop.is_set():
            batch, seq = rng.randint(1, 6), rng.choice([1, 7, 60, 200])
            hidden_states, lengths = torch.randn(batch, seq, 256), torch.randint(1, seq + 1, (batch, 1))
            mask = rng.choice([torch.ones(batch, seq), torch.arange(seq) < lengths, torch.arange(seq) >= seq - lengths])
            counts["calls"] += 1
            try:
                out = client.start(hidden_states, mask.long(), None).result()[mask.bool()]
            except Exception as error:  # whatever it is, a caller has no answer
                counts["lost"] += 1
                print(f"lost: {type(error).__name__}: {error}")
                continue
            hidden_states[mask.bool()] = _through_wire(hidden_states[mask.bool()], dtype)
            right = _through_wire(local.start(hidden_states, mask.long(), None).result()[mask.bool()], dtype)
            if not float((out - right).abs().max()) <= TOLERANCES[dtype] * float(right.abs().max()):
                counts["wrong"] += 1
                print(f"wrong: {dtype}, {batch} x {seq}, off by {float((out - right).abs().max() / right.abs().max())}")
            time.sleep(0.02)


def _through_wire(rows: Tensor, dtype: str) -> Tensor:
    data, outliers = wire.encode_rows(rows, wire.NAMES[dtype])
    return wire.decode_rows(data, wire.NAMES[dtype], outliers, *rows.shape).float()


def _nuisance(replicas: list[Server], stop: threading.Event, counts: Counter[str]) -> None:
    """Malformed messages, and calls that are given up at once."""
    rng = random.Random(0)
    seeds = [valid(rng, dtype, 256) for dtype in wire.NAMES.values()]
    while not stop.wait(0.05):
        counts["hostile"] += 1
        with grpc.insecure_channel(rng.choice(replicas).address) as channel, suppress(grpc.RpcError):
            call = channel.unary_unary(FORWARD).future(mutate(rng, seeds), timeout=rng.uniform(0.001, 0.5))
            if rng.random() < 0.5:
                call.cancel()
            else:
                call.result()


def _train(folder: Path, trunk: Any, go_on: Callable[[int, float], bool]) -> list[float]:
    model = adapters.attach(load_ends(folder, 2, 2, trunk), Lora(), train_bottom=True, seed=0)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.02)
    losses: list[float] = []
    started = time.monotonic()
    while go_on(len(losses), started):
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(0, 512, (2, 24), generator=generator) for _ in range(4)]
        batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
        losses.append(accumulate(model, batches, 4))
        optimizer.step()
        optimizer.zero_grad()
    return losses
