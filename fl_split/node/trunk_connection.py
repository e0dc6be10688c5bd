"""A node's connection to its trunk.

Data path: bottom -> **pack, cut, encode, call, decode** -> surrogate joins. Calls run on threads of their own, so
that the node computes while the trunk does.
"""

import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from fl_split import wire
from fl_split.errors import TrunkRefused, WireError
from fl_split.malloc import share_heap
from fl_split.model.thin import read_card
from fl_split.node.calls import Calls
from fl_split.node.decode_stream import DecodeStream
from fl_split.node.expected import Expected
from fl_split.node.ledger import Ledger
from fl_split.node.replicas import Credentials, Replica
from fl_split.node.surrogate_file import fetch_published
from fl_split.proto import trunk_pb2 as pb


class TrunkConnection(Calls):
    """A `slots.Trunk` that is a service elsewhere. Use it as a context manager."""

    def __init__(
        self,
        address: str,
        expected: Expected,
        *,
        wire_dtype: str = "bfloat16",
        timeout_s: float = 120,
        in_flight: int = 4,
        credentials: Credentials = Credentials(),  # noqa: B008  # frozen
        meet: Callable[[str], None] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Prepare channels and threads; nothing is sent before `connect` or the first call.

        Args:
            address: ``host:port``, several with commas between.
            expected: Checked before the first call to each replica, and again after a lost connection. All replicas
                must be one trunk, of the same weights and precision.
            wire_dtype: ``bfloat16``, ``float32`` or ``int8``.
            timeout_s: Seconds that one call may take, all retries included; several replicas share them, so that
                one that hangs does not use them up.
            in_flight: Calls at the same time, at most.
            credentials: TLS and token, and what a trunk has to show before it gets anything else.
            meet: For gradient shares: looks at an address whenever it is checked, and raises if it must get none.
            ledger: Every message is noted there before it is sent, and what a trunk has shown.

        Raises:
            ConfigError: An address or credentials that cannot be used.
        """
        share_heap()  # before threads have heaps of their own: micro-batches run in threads, one at a time
        super().__init__(address, expected, wire_dtype, timeout_s, credentials, meet, ledger)
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="trunk-call")

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Send one batch; see `slots.Trunk.start`. Leaves the node: `wire.pack_batch`, nothing else.

        The future raises `TrunkUnavailable`, `TrunkMismatch`, `TrunkRefused` or `WireError`.
        """
        if not self._replicas.descriptions:
            self.connect()
        packed = wire.pack_batch(hidden_states, attention_mask, position_ids)
        calls = [self._threads.submit(self._call, part) for part in wire.cut(packed, self.tokens_per_call())]

        device, dtype, batch = hidden_states.device, hidden_states.dtype, hidden_states.shape[0]

        def unpack(parts: list[Tensor]) -> Tensor:
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            return wire.unpack(rows.to(device=device, dtype=dtype), attention_mask, batch)

        return _gather(calls, unpack)

    @property
    def offers_streams(self) -> bool:
        """Whether every replica that was checked keeps keys and values for generation."""
        found = self._replicas.descriptions
        return bool(found) and all(about.HasField("decode") for about in found)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of one sequence, at most, at every replica that was checked."""
        return min((about.max_sequence_length for about in self._replicas.descriptions), default=sys.maxsize)

    def open(self, packed: wire.Packed, room: int) -> tuple[DecodeStream, Tensor]:
        """Begin a generation stream with its first step; see `generation.StreamingTrunk.open`.

        Raises:
            TrunkRefused: The trunk does not offer it.
            TrunkUnavailable: As `connect`, or no room within the time limit.
        """

        def begin(replica: Replica, left_s: float, metadata: Any) -> tuple[DecodeStream, Tensor]:
            about = cast(pb.DescribeReply, replica.description)
            if not about.HasField("decode"):
                raise TrunkRefused(
                    f"the trunk at {replica.address} does not offer generation with a cache (limits.cache-mb=0, "
                    "model.tensor-parallel, or layers that keep more than keys and values): pass use_cache=False, or "
                    "ask its operator"
                )
            tokens = min(room, about.max_sequence_length)
            if len(packed.lengths) * tokens * about.decode.bytes_per_token > about.decode.cache_bytes:
                raise TrunkRefused(
                    f"{len(packed.lengths)} answers of {tokens} tokens, prompts included, do not fit into the cache of "
                    f"the trunk at {replica.address} (limits.cache-mb={about.decode.cache_bytes / 1e6:g}, "
                    f"{about.decode.bytes_per_token} bytes a token): ask for fewer at a time, or for shorter ones"
                )
            stream = DecodeStream(self, replica, metadata)
            return stream, stream.begin(packed, tokens, left_s)

        return self._retry(begin)

    def _call(self, packed: wire.Packed) -> Tensor:
        started = time.monotonic()
        request = wire.encode_request(packed, self.wire_dtype)

        def forward(replica: Replica, left_s: float, metadata: Any) -> pb.ForwardReply:
            reply: pb.ForwardReply = replica.forward(request, timeout=left_s, metadata=metadata)
            self.check_origin(reply)
            return reply

        reply = self._retry(forward)
        try:
            rows = wire.decode_reply(reply, request, self.hidden_size)
        except WireError as error:
            raise WireError(f"the trunk at {self.address} sent a bad reply: {error}") from error
        self.count(request.ByteSize(), reply.ByteSize(), time.monotonic() - started)
        return rows

    def fetch_surrogate(self, cache: Path) -> Path:
        """Fetch the fitted surrogate that the trunk publishes, once, into `cache`.

        Raises:
            SurrogateError: It publishes none, or one of another trunk.
            TrunkUnavailable: As `connect`.
        """

        def fetched(replica: Replica, left_s: float, metadata: Any) -> Path:
            def piece(offset: int) -> bytes:
                reply = replica.surrogate(pb.SurrogateRequest(offset=offset), timeout=left_s, metadata=metadata)
                data: bytes = reply.data
                return data

            return fetch_published(cast(pb.DescribeReply, replica.description), piece, cache)

        file = self._retry(fetched)
        self._expected.check_surrogate(read_card(file))
        return file

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """The trunk's exact vector-Jacobian product, see `slots.ExactTrunk.vjp`: **dL/dh2 leaves the node**.

        Raises:
            TrunkRefused: The trunk does not offer exact gradients.
            TrunkUnavailable: As `connect`.
        """
        if not self._replicas.descriptions:
            self.connect()
        packed = wire.pack_batch(hidden_states, attention_mask, position_ids)
        rows = torch.cat([packed.rows, wire.pack(gradient, attention_mask)[0].to(packed.rows)], 1)
        both = wire.Packed(rows, packed.lengths, packed.positions)  # cut together
        size = max(1, self.tokens_per_call() // 2)
        calls = [self._threads.submit(self._pull, self._exact(part), "pull") for part in wire.cut(both, size)]
        pulled = torch.cat([call.result() for call in calls]).to(device=gradient.device, dtype=gradient.dtype)
        return wire.unpack(pulled, attention_mask, hidden_states.shape[0])

    def _exact(self, both: wire.Packed) -> pb.PullRequest:
        dtype = self.wire_dtype if self.wire_dtype != pb.INT8 else pb.BFLOAT16
        rows, gradient = both.rows.chunk(2, 1)
        return wire.encode_pull(wire.Packed(rows, both.lengths, both.positions), gradient, dtype)

    @property
    def tokens_per_share(self) -> int:
        """Tokens whose hidden states and share of a gradient one call may hold."""
        return max(1, self.tokens_per_call(pb.FLOAT32) // 2)

    def share(self, request: pb.PullRequest) -> "Future[Tensor]":
        """Send one share of a gradient to this trunk, or the mask's seed; the future as of `start`.

        A call that was lost is made again with this same request, by a replica of this connection.
        """
        return self._threads.submit(self._pull, request, "share")

    def _pull(self, request: pb.PullRequest, method: str) -> Tensor:
        def pull(replica: Replica, left_s: float, metadata: Any) -> pb.PullReply:
            reply: pb.PullReply = getattr(replica, method)(request, timeout=left_s, metadata=metadata)
            self.check_origin(reply)
            return reply

        reply = self._retry(pull)
        self.count(request.ByteSize(), reply.ByteSize(), 0.0)
        return wire.decode_pull_reply(reply, request, self.hidden_size)

    def close(self) -> None:
        """Give the connections and the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._replicas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _gather(calls: "list[Future[Tensor]]", unpack: Callable[[list[Tensor]], Tensor]) -> "Future[Tensor]":
    """Make a future of what `unpack` makes of all calls' results; it fails as the first of them that failed."""
    whole: Future[Tensor] = Future()
    left = itertools.count(len(calls) - 1, -1)

    def done(_: "Future[Tensor]") -> None:
        if next(left) == 0:
            try:
                whole.set_result(unpack([call.result() for call in calls]))
            except BaseException as error:
                whole.set_exception(error)

    for call in calls:
        call.add_done_callback(done)
    return whole
