"""Generation streams: room at open, then steps, which run together with the steps of others.

Data path: Trunk.Decode -> **action -> fair queue -> passes over new tokens, with what is kept** -> reply.

A step of many tokens runs in pieces, with steps of others between them: nobody's next token waits for somebody's long
prompt. Keys and values are dropped when their stream ends, however it ends. Nothing of a call is logged but counts.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import grpc
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fl_split import wire, wire_decode
from fl_split.errors import WireError
from fl_split.model.key_values import KeyValues, NewTokens, run_pass
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.admission import Gate
from fl_split.trunk.batching import Batcher
from fl_split.trunk.cache_pool import CacheFull, CachePool, Lease
from fl_split.trunk.calls import Call, StreamEnded
from fl_split.trunk.config import Batching, Limits
from fl_split.trunk.fair_queue import Job
from fl_split.trunk.layers import HeldLayers
from fl_split.trunk.messages import Fields, check_sizes, encode_forward, in_thread_if
from fl_split.trunk.metrics import TrunkMetrics
from fl_split.trunk.padding import passes

_PIECE_TOKENS = 256  # of a long step, computed between steps of others
_PASS_COLUMNS = 65_536  # sequences x tokens of the longest: bounds what a pass gathers
_FIELDS: Fields = {2: {2: None}}  # step.hidden_states
_WAIT_SHARE = 0.1  # of a pass: streams that were just answered send their next step at about the same time
_STEP_S = 600.0  # from a step to its result
_Code = grpc.StatusCode


@dataclass(frozen=True)
class _Piece(wire.Packed):
    """A part of a step: ``lengths`` new tokens of `sequences` of a stream, which have kept `past` tokens each."""

    kept: KeyValues
    sequences: list[int]
    past: list[int]

    @classmethod
    def of(cls, packed: wire.Packed, kept: KeyValues) -> "_Piece":
        """Of a step that has an entry for each sequence of its stream, to be run next."""
        active = [i for i, length in enumerate(packed.lengths) if length]
        lengths, past = [packed.lengths[i] for i in active], [kept.lengths[i] for i in active]
        return cls(packed.rows, lengths, packed.positions, kept, active, past)


def run_pieces(model: PreTrainedModel, pieces: Sequence[wire.Packed]) -> list[Tensor]:
    """Run pieces of different streams, together where they have about as many tokens; each one's output rows.

    May be called again with the same pieces after a failure.
    """
    steps = cast(Sequence[_Piece], pieces)
    outputs = [torch.empty_like(step.rows) for step in steps]
    indices = []  # of each sequence's first row
    for step in steps:
        starts = torch.tensor([0, *step.lengths]).cumsum(0).tolist()
        indices.append(dict(zip(starts, step.sequences, strict=False)))
        for sequence, past in zip(step.sequences, step.past, strict=True):
            step.kept.lengths[sequence] = past
    for spans in passes(steps):
        parts = []
        for span in spans:
            step = steps[span.request]
            positions = None if step.positions is None else step.positions[span.rows]
            parts.append(NewTokens(step.kept, indices[span.request][span.rows.start], step.rows[span.rows], positions))
        for group in _groups(parts):
            for i, rows in zip(group, run_pass(model, [parts[i] for i in group]), strict=True):
                outputs[spans[i].request][spans[i].rows] = rows
    return outputs


def _groups(parts: Sequence[NewTokens]) -> Iterator[list[int]]:
    """Group indices of parts to be run at once: longest first, so many that what is gathered for them is bounded."""
    group: list[int] = []
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].end):
        if group and (len(group) + 1) * parts[group[0]].end > _PASS_COLUMNS:
            yield group
            group = []
        group.append(i)
    yield group


class Decoder:
    """All generation streams of a server. Lives in one event loop."""

    def __init__(self, held: HeldLayers, batching: Batching, limits: Limits, gate: Gate, metrics: TrunkMetrics) -> None:
        """Prepare; `run` serves from then on.

        Args:
            held: The layers, whose identity says whether generation is offered.
            batching: Of the steps.
            limits: Budget and patience.
            gate: Counts replies that are not taken.
            metrics: What steps count in.
        """
        self._held, self._idle_s, self._gate, self._metrics = held, limits.stream_idle_s, gate, metrics
        self._receive_s = limits.receive_timeout_s
        self._token_bytes = held.identity.decode.bytes_per_token
        self.pool = CachePool(limits.cache_mb * 1_000_000 if self._token_bytes else 0)
        # One step a stream at a time, whose message is here: a queue that refuses would save nothing.
        self._batcher = Batcher(
            lambda pieces: run_pieces(held.model, pieces), batching, sys.maxsize, wait_share=_WAIT_SHARE
        )
        self._batcher.on_batch = self._count_batch
        # A piece's rotary tables may depend on its length where batching is off: then no pieces.
        self._piece_tokens = _PIECE_TOKENS if batching.enabled else sys.maxsize

    @property
    def offered(self) -> bool:
        """Whether there is any room for streams."""
        return self.pool.size_bytes > 0

    def describe(self) -> pb.DecodeBounds:
        """The bounds, for Describe."""
        return pb.DecodeBounds(bytes_per_token=self._token_bytes, cache_bytes=self.pool.size_bytes, idle_s=self._idle_s)

    async def run(self) -> None:
        """Serve steps until cancelled."""
        await self._batcher.run()

    def end(self) -> None:
        """End every stream when its current step is answered: its caller goes on at another replica."""
        self.pool.end_all()

    def close(self) -> None:
        """Give the worker thread back."""
        self._batcher.close()

    async def serve(self, call: Call, limits: wire.CallLimits) -> None:
        """One stream, from its first message to its end.

        Raises:
            CacheFull: No room.
            StreamEnded: It cannot go on here.
            WireError: A message that does not fit, or generation is not offered.
        """
        if not self.offered:
            raise StreamEnded(_Code.UNIMPLEMENTED, "this trunk does not offer generation with a cache")
        first = await call.read(self._receive_s)
        check_sizes(first, limits, _FIELDS)
        opened = wire_decode.decode_open(first, limits)
        size_bytes = opened.sequences * opened.max_tokens * self._token_bytes
        if size_bytes > self.pool.size_bytes:
            raise WireError(
                f"{opened.sequences} sequences of {opened.max_tokens} tokens take {size_bytes} bytes: the whole cache "
                f"has {self.pool.size_bytes}"
            )
        with self.pool.lease(call.caller, size_bytes) as lease:
            call.num_sequences = opened.sequences
            kept = KeyValues(opened.sequences, opened.max_tokens)
            try:
                while (data := await self._next(call, lease)) is not None:
                    check_sizes(data, limits, _FIELDS)
                    await self._act(call, kept, data, limits)
            finally:
                self._batcher.forget(id(kept))
        await call.check_not_refused()

    async def _act(self, call: Call, kept: KeyValues, data: bytes, limits: wire.CallLimits) -> None:
        decode = partial(wire_decode.decode_action, data, limits, kept.lengths, kept.capacity)
        match await in_thread_if(len(data), decode):
            case wire_decode.Truncate(lengths):
                kept.truncate(lengths)
            case wire_decode.Reorder(sources):
                await asyncio.to_thread(kept.reorder, sources)
            case wire_decode.Step(packed, dtype):
                await self._answer(call, kept, packed, dtype)

    async def _next(self, call: Call, lease: Lease) -> bytes | None:
        """Wait for the next message; None at the caller's end of the stream."""
        reading = asyncio.ensure_future(call.receive())
        try:
            both: set[asyncio.Future[Any]] = {reading, lease.ended}
            await asyncio.wait(both, timeout=self._idle_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not reading.done():
                reading.cancel()
        if lease.ended.done() and lease.ended.result():
            raise CacheFull
        if lease.ended.done():
            raise StreamEnded(_Code.UNAVAILABLE, "this trunk is about to end: go on at another replica")
        if not reading.done():
            raise StreamEnded(
                _Code.ABORTED, f"no message for limits.stream-idle-s={self._idle_s:g}: open another stream"
            )
        return reading.result()

    async def _answer(self, call: Call, kept: KeyValues, packed: wire.Packed, dtype: pb.DType) -> None:
        pieces = []
        for part in wire_decode.cut(packed, self._piece_tokens):
            done = await self._batcher.submit(call.caller, _Piece.of(part, kept), _STEP_S, id(kept))
            pieces.append((done.rows, part.lengths))
            call.queue_s, call.compute_s = call.queue_s + done.queue_s, call.compute_s + done.compute_s
        rows = wire_decode.join(pieces)
        call.num_tokens += len(rows)
        reply = await in_thread_if(rows.nbytes, encode_forward, rows, dtype, self._held.identity.trunk_id)
        try:
            with self._gate.replying(call.caller, len(reply)):
                async with asyncio.timeout(self._idle_s):
                    await call.context.write(reply)
        except TimeoutError:
            raise StreamEnded(
                _Code.ABORTED, f"a reply was not taken within limits.stream-idle-s={self._idle_s:g}"
            ) from None
        call.sent_bytes += len(reply)

    def _count_batch(self, jobs: list[Job], seconds: float) -> None:
        self._metrics.decode_s.observe(seconds)
        self._metrics.decode_steps.observe(len(jobs))
