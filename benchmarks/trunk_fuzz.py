"""The section of bench_trunk.py that sends malformed messages, to the decoders and to a server that must live on."""

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError
from trunk_parts import Server, random_model, resident_mib

from fl_split import wire
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.messages import Decode, decode_forward, decode_pull

FORWARD, PULL = f"/{wire.SERVICE}/Forward", f"/{wire.EXACT_SERVICE}/Pull"
HIDDEN = 64
LIMITS = wire.CallLimits(HIDDEN, 256, 64)


@dataclass(frozen=True)
class Kind:
    """A method, and how its messages are read and made."""

    path: str
    decode: Decode
    seeds: list[bytes]


def bench_fuzz(setting: Any) -> dict[str, float]:
    """Malformed messages of both methods that take tensors; some are not, so that the layers run as well."""
    torch.manual_seed(0)
    rng = random.Random(0)
    narrow = (pb.BFLOAT16, pb.FLOAT32)
    kinds = [
        Kind(FORWARD, decode_forward, [valid(rng, dtype, HIDDEN) for dtype in wire.NAMES.values() for _ in range(20)]),
        Kind(PULL, decode_pull, [_valid_pull(rng, dtype) for dtype in narrow for _ in range(20)]),
    ]
    for kind in kinds:
        if {_decoded(kind, seed) for seed in kind.seeds} != {"taken"}:
            raise RuntimeError(f"{kind.path}: messages that are to be mutated are refused as they are")
    num_messages = 3_000 if setting.quick else 120_000
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for i in range(1000):  # what is allocated once
        _decoded(kinds[i % 2], mutate(rng, kinds[i % 2].seeds))
    before = resident_mib()
    for i in range(num_messages):
        kind = kinds[i % 2]
        message = mutate(rng, kind.seeds)
        started = time.perf_counter()
        outcomes[_decoded(kind, message)] += 1
        slowest = max(slowest, time.perf_counter() - started)
    return {
        "fuzz-messages": num_messages,
        "fuzz-crashes": outcomes["crash"],
        "fuzz/refused-share": outcomes["refused"] / num_messages,
        "fuzz/slowest-s": slowest,
        "fuzz/memory-growth-mib": resident_mib() - before,
        **_fuzz_server(setting.work, rng, kinds, 300 if setting.quick else 6000),
    }


def _decoded(kind: Kind, message: bytes) -> str:
    try:
        kind.decode(message, LIMITS)
    except (WireError, DecodeError):
        return "refused"
    except Exception as error:
        print(f"crash: {type(error).__name__}: {error}")
        return "crash"
    return "taken"


def _fuzz_server(work: Path, rng: random.Random, kinds: list[Kind], count: int) -> dict[str, float]:
    """Send them to a server in a process of its own: statuses, its memory, and whether it lives."""
    limits = (f"limits.max-tokens={LIMITS.max_tokens}", f"limits.max-sequence-length={LIMITS.max_sequence_length}")
    process = Server(random_model(work / "fuzz", HIDDEN, 4), 1, 1, *limits, "server.exact-gradient=true")
    codes: Counter[grpc.StatusCode] = Counter()
    try:
        with grpc.insecure_channel(process.address) as channel:
            grpc.channel_ready_future(channel).result(120)
            calls = [channel.unary_unary(kind.path) for kind in kinds]
            while not _served(calls[0], kinds[0].seeds[0]):
                time.sleep(0.1)
            before = 0.0
            for i in range(count):
                if i == count // 4:  # by then the allocator has what it needs
                    before = process.resident_mib()
                try:
                    calls[i % 2](mutate(rng, kinds[i % 2].seeds), timeout=10)
                    codes[grpc.StatusCode.OK] += 1
                except grpc.RpcError as error:
                    codes[error.code()] += 1
            growth = process.resident_mib() - before
            lives = all(_served(call, kind.seeds[0]) for call, kind in zip(calls, kinds, strict=True))
    finally:
        process.stop()
    print(f"fuzz over the wire: { {code.name: number for code, number in codes.items()} }")
    proper = codes[grpc.StatusCode.OK] + codes[grpc.StatusCode.INVALID_ARGUMENT]
    return {
        "fuzz/messages-over-the-wire": count,
        "fuzz/computed-share-over-the-wire": codes[grpc.StatusCode.OK] / count,
        "fuzz/improper-statuses": count - proper + (not lives),
        "fuzz/server-memory-growth-mib": growth,
    }


def _served(call: Any, message: bytes) -> bool:
    try:
        return bool(call(message, timeout=10))
    except grpc.RpcError:
        return False


def valid(rng: random.Random, dtype: pb.DType, hidden_size: int) -> bytes:
    """A ForwardRequest that a trunk of this width takes."""
    return wire.encode_request(_packed(rng, hidden_size), dtype).SerializeToString()


def _valid_pull(rng: random.Random, dtype: pb.DType) -> bytes:
    packed = _packed(rng, HIDDEN)
    return wire.encode_pull(packed, torch.randn_like(packed.rows), dtype).SerializeToString()


def _packed(rng: random.Random, hidden_size: int) -> wire.Packed:
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    rows = torch.randn(sum(lengths), hidden_size)
    if rng.random() < 0.3:
        rows[:, 3] *= 100
    positions = torch.randint(0, 64, (len(rows),)) if rng.random() < 0.3 else None
    return wire.Packed(rows, lengths, positions)


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Flip, cut, repeat, splice, set a field to something absurd, or leave it as it is."""
    message = bytearray(rng.choice(seeds))
    match rng.randrange(8):
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
        case 5 | 6:
            return _absurd(rng, bytes(message))
    return bytes(message)


def _absurd(rng: random.Random, message: bytes) -> bytes:
    """A field of a ForwardRequest, or of the one in a PullRequest, set to what no honest caller sends."""
    whole: Any = pb.ForwardRequest.FromString(message) if message[0] == 8 else pb.PullRequest.FromString(message)
    request = whole if isinstance(whole, pb.ForwardRequest) else whole.forward
    values = [0, 1, 63, 64, 65, 255, 257, 2**31 - 1, 2**31, 2**32 - 1]
    match rng.randrange(6):
        case 0:
            request.dtype = rng.choice([0, 1, 2, 3, 4, -1, 2**31 - 1])
        case 1:
            request.lengths.append(rng.choice(values))
        case 2:
            request.positions.extend(rng.choices(values, k=rng.randint(1, 300)))
        case 3:
            request.outliers.extend(rng.choices(values, k=rng.randint(1, 5)))
        case 4:
            size = rng.choice([0, 1, len(request.hidden_states)])
            request.hidden_states = rng.choice([b"\xff", b"\x7f", b"\x80"]) * size
        case _:
            request.hidden_states = rng.randbytes(len(request.hidden_states))  # of any size, where finite
    return bytes(whole.SerializeToString())
