"""The trunk service: the middle layers of one model behind gRPC, forward only and stateless.

Data path: Trunk.Forward -> **who, read, decode** -> batcher -> **encode** -> reply. Nothing of a call outlives it: no
log line, metric or error holds a value of a tensor.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from fl_split import wire
from fl_split.errors import TrunkError
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.access import TokenBook, identify, server_credentials
from fl_split.trunk.admission import Gate
from fl_split.trunk.batching import Batcher, where
from fl_split.trunk.calls import Call, Refusal
from fl_split.trunk.config import Batching, TrunkConfig
from fl_split.trunk.decode import Decoder
from fl_split.trunk.fair_queue import Job
from fl_split.trunk.health import OpenServices
from fl_split.trunk.layers import HeldLayers, num_cpus
from fl_split.trunk.messages import (
    Decode,
    decode_forward,
    decode_pull,
    decode_share,
    encode_forward,
    encode_pull,
    in_thread_if,
    run_pulls,
)
from fl_split.trunk.metrics import TrunkMetrics
from fl_split.trunk.padding import run_packed
from fl_split.trunk.published import Published

logger = logging.getLogger(__name__)

_Answer = Callable[[Call], Coroutine[Any, Any, bytes | None]]

_OFFSET_BYTES = 16  # of a request for a piece of the surrogate: a number
_MAX_WAIT_S = 600.0  # of calls that come without a deadline
_UNREAD_BYTES = 16_384  # of a call that nobody reads yet; gRPC's default of 64 KiB made it 200 MiB in all
_CONNECTION_S = 3600  # then it is closed, when its calls are done, and the caller makes a new one
_ALONE = Batching(enabled=False)
_Code = grpc.StatusCode


class TrunkServer:
    """One bound server: `start`, `warm_up`, `run_until`. Lives in one event loop."""

    def __init__(self, held: HeldLayers, config: TrunkConfig) -> None:
        """Prepare; nothing is bound yet.

        Raises:
            ConfigError: Certificates or the tokens file cannot be used.
        """
        self._held, self._config = held, config
        self.metrics = TrunkMetrics()
        self.port = 0
        self._description = held.describe(config.limits)
        self._description.exact_gradient = config.server.exact_gradient
        self._description.gradient_shares = config.server.gradient_shares
        if config.server.exact_gradient or config.server.gradient_shares:  # a message holds two tensors
            self._description.max_message_bytes += config.limits.max_tokens * 4 * held.hidden_size
        self._published = Published(config.model.surrogate, self._description)
        self._limits = wire.CallLimits(
            held.hidden_size, self._description.max_tokens, self._description.max_sequence_length
        )
        self._book = TokenBook(Path(config.security.tokens)) if config.security.tokens else None
        self._gate = Gate(config.limits)
        limits = config.limits
        self._batcher = Batcher(self._compute, held.allowed(config.batching), limits.queue_tokens, limits.queue_s)
        self._batcher.on_batch = self._count_batch
        self._puller = Batcher(  # one backward pass at a time bounds their memory
            partial(run_pulls, held.model), _ALONE, limits.queue_tokens, limits.queue_s
        )
        self._decoder = Decoder(held, held.allowed(config.batching), limits, self._gate, self.metrics)
        if self._decoder.offered:
            self._description.decode.CopyFrom(self._decoder.describe())
        self.metrics.streams.set_function(lambda: self._decoder.pool.num_streams)
        self.metrics.cache_bytes.set_function(lambda: self._decoder.pool.used_bytes)
        self.metrics.queued_tokens.set_function(lambda: self._batcher.queued_tokens + self._puller.queued_tokens)
        self._health = OpenServices()
        self._server = self._build()
        self._serving: list[asyncio.Task[None]] = []
        self._padded_tokens = 0

    def _build(self) -> grpc.aio.Server:
        limits = self._config.limits
        max_bytes = self._description.max_message_bytes
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.max_send_message_length", max_bytes),
                ("grpc.max_metadata_size", 16_384),
                ("grpc.max_concurrent_streams", 2 * limits.calls_per_caller + 64),  # room for calls that are ending
                ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
                ("grpc.server.max_pending_requests", 4 * limits.calls),  # not yet seen by this process: beyond it
                ("grpc.server.max_pending_requests_hard_limit", 8 * limits.calls),  # some are cancelled, here all
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", int(1000 * limits.idle_s)),
                ("grpc.max_connection_age_ms", _CONNECTION_S * 1000),  # what hangs on a connection ends with it
                ("grpc.max_connection_age_grace_ms", int(1000 * _MAX_WAIT_S)),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not become a large one
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_time_ms", 60_000),  # finds callers who are gone without a word
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", 0),
            ],
        )
        trunk: dict[str, _Answer] = {"Describe": self._describe, "Forward": self._forward}
        trunk |= {"Surrogate": self._surrogate, "Decode": self._decode}
        server.add_generic_rpc_handlers((self._handlers(wire.SERVICE, trunk),))
        if self._config.server.exact_gradient:
            logger.warning(
                "exact gradients are on (server.exact-gradient): nodes that use them send dL/dh2, the gradient of "
                "their private loss, to this trunk"
            )
            server.add_generic_rpc_handlers((self._handlers(wire.EXACT_SERVICE, {"Pull": self._pull}),))
        if self._config.server.gradient_shares:
            torch.set_float32_matmul_precision("highest")  # no TF32: the two shares' answers nearly cancel
            torch.backends.cudnn.allow_tf32 = False
            logger.warning(
                "gradient shares are on (server.gradient-shares): nodes that use them send one of two shares of "
                "dL/dh2, the gradient of their private loss, to this trunk; it says nothing only while this operator "
                "and that of the other trunk do not collude"
            )
            server.add_generic_rpc_handlers((self._handlers(wire.SHARES_SERVICE, {"Share": self._share}),))
        server.add_generic_rpc_handlers(tuple(self._health.handlers()))
        return server

    def _handlers(self, service: str, answers: Mapping[str, _Answer]) -> grpc.GenericRpcHandler:
        """Put the methods of a service under their names in `trunk.proto`.

        Towards grpc they are streams both ways, so that a call is seen before its message is received and until its
        reply is taken: whoever is refused is refused unread, and messages are parsed here. On the wire it is the same.
        The generated ``add_TrunkServicer_to_server`` cannot do that: it has grpc receive and parse a message first.
        """
        methods = {name: grpc.stream_stream_rpc_method_handler(self._wrap(name, f)) for name, f in answers.items()}
        return grpc.method_handlers_generic_handler(service, methods)

    async def start(self) -> None:
        """Bind and listen; not ready yet.

        Raises:
            OSError: The address cannot be bound.
        """
        host, port = self._config.server.host, self._config.server.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = server_credentials(self._config.security)
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: is the port taken, the host this machine's?") from error
        await self._server.start()
        self._serving = [asyncio.create_task(batcher.run()) for batcher in (self._batcher, self._puller, self._decoder)]

    async def warm_up(self) -> None:
        """Compute once in each form, then be ready: first callers do not pay for what happens once.

        The forms are one length, padding, and positions, which bring a mask.
        """
        length = min(32, self._limits.max_sequence_length)
        for lengths, positions in (([length], None), ([length, max(1, length // 2)], None), ([length], length)):
            rows = torch.zeros(sum(lengths), self._limits.hidden_size)
            places = None if positions is None else torch.arange(positions).flip(0)
            await self._batcher.warm_up(wire.Packed(rows, lengths, places))
        self._set_ready(True)

    async def run_until(self, stop: Awaitable[Any]) -> None:
        """Serve until `stop` is done, then drain.

        Raises:
            TrunkError: The trunk can serve no more, whatever the reason.
        """
        stopping = asyncio.ensure_future(stop)
        await asyncio.wait({stopping, *self._serving}, return_when=asyncio.FIRST_COMPLETED)
        ended = [task.exception() for task in self._serving if task.done()]
        if not ended:
            logger.info("draining for up to %g s", self._config.server.drain_s)
            await self.drain()
            return
        stopping.cancel()
        await self.drain(0)  # its callers ask another replica
        raise TrunkError(f"the trunk can serve no more ({where(ended[0]) if ended[0] else 'it ended'}): start it again")

    async def drain(self, grace_s: float | None = None) -> None:
        """Take no more calls, finish those that are open within `grace_s` (`server.drain-s`), stop."""
        self._set_ready(False)
        self._health.end()
        self._decoder.end()
        await self._server.stop(self._config.server.drain_s if grace_s is None else grace_s)
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._batcher.close()
        self._puller.close()
        self._decoder.close()

    def _set_ready(self, ready: bool) -> None:
        self._health.set_ready(ready)
        self.metrics.ready.set(ready)

    # ---------------------------------------------------------------------------------------------------- calls

    def _wrap(self, method: str, answer: _Answer) -> Any:
        """Lead every call through the same: who it is, how it ends, its line in the log and in the metrics."""

        async def handle(_: Any, context: grpc.aio.ServicerContext) -> None:
            call = Call(method, context)
            with self.metrics.open_calls.track_inprogress():
                try:
                    call.institution, call.caller = identify(context, self._book)
                    async with self._gate.call(call.caller):
                        if (reply := await answer(call)) is not None:
                            with self._gate.replying(call.caller, len(reply)):
                                await context.write(reply)  # until the caller has room for it
                            call.sent_bytes = len(reply)
                    call.finish(_Code.OK, self.metrics)
                except asyncio.CancelledError:
                    call.finish(_Code.CANCELLED, self.metrics)
                    raise
                except Exception as error:  # the outermost frame: callers learn nothing of the inside
                    refusal = Refusal.of(error, call.id)
                    call.finish(refusal.code, self.metrics)
                    refusal.answer(context)

        return handle

    async def _describe(self, call: Call) -> bytes:
        return self._description.SerializeToString()

    async def _surrogate(self, call: Call) -> bytes:
        async with self._gate.reading(call.caller):
            data = await call.read(self._config.limits.receive_timeout_s, _OFFSET_BYTES)
        request = pb.SurrogateRequest.FromString(data)
        return pb.SurrogateReply(data=self._published.piece(request.offset)).SerializeToString()

    async def _forward(self, call: Call) -> bytes:
        dtype, rows = await self._run(call, self._batcher, decode_forward)
        return await in_thread_if(rows.nbytes, encode_forward, rows, dtype, self._description.trunk_id)

    async def _pull(self, call: Call) -> bytes:
        dtype, rows = await self._run(call, self._puller, decode_pull)
        return await in_thread_if(rows.nbytes, encode_pull, rows, dtype, self._description.trunk_id)

    async def _decode(self, call: Call) -> None:
        await self._decoder.serve(call, self._limits)

    async def _share(self, call: Call) -> bytes:
        dtype, rows = await self._run(call, self._puller, decode_share)
        return await in_thread_if(rows.nbytes, encode_pull, rows, dtype, self._description.trunk_id)

    async def _run(self, call: Call, batcher: Batcher, decode: Decode) -> tuple[pb.DType, Tensor]:
        async with self._gate.reading(call.caller):
            batcher.check_room(call.caller)
            data = await call.read(self._config.limits.receive_timeout_s)
            dtype, packed = await in_thread_if(len(data), decode, data, self._limits)
            call.num_tokens, call.num_sequences = len(packed.rows), len(packed.lengths)
        timeout_s = min(call.context.time_remaining() or _MAX_WAIT_S, _MAX_WAIT_S)
        del data
        done = await batcher.submit(call.caller, packed, timeout_s)
        call.queue_s, call.compute_s, call.batch_tokens = done.queue_s, done.compute_s, done.batch_tokens
        self.metrics.queue_s.observe(done.queue_s)
        return dtype, done.rows

    def _compute(self, requests: Sequence[wire.Packed]) -> list[Tensor]:
        outputs, self._padded_tokens = run_packed(self._held.run, requests, causal=self._held.causal)
        return outputs

    def _count_batch(self, jobs: list[Job], seconds: float) -> None:
        num_tokens = sum(job.num_tokens for job in jobs)
        self.metrics.compute_s.observe(seconds)
        self.metrics.batch_tokens.observe(num_tokens)
        self.metrics.batch_calls.observe(len(jobs))
        self.metrics.batch_fill.observe(num_tokens / self._padded_tokens)


@contextmanager
def embedded(held: HeldLayers, port: int = 0, config: TrunkConfig | None = None) -> Iterator[str]:
    """Serve from a thread of this process while the context lasts; yields the address.

    Args:
        held: What to serve.
        port: 0 takes a free one.
        config: By default plaintext on loopback. Metrics are counted, but not served.

    Takes at most half of the CPUs, for the whole process: the nodes of a simulation need the others.
    """
    torch.set_num_threads(min(torch.get_num_threads(), max(1, num_cpus() // 2)))
    config = config or TrunkConfig()
    config = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    bound: Future[int] = Future()
    stop = threading.Event()

    async def serve() -> None:
        server = TrunkServer(held, config)
        await server.start()
        await server.warm_up()
        bound.set_result(server.port)
        await server.run_until(asyncio.to_thread(stop.wait))

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            if bound.done():
                raise
            bound.set_exception(error)

    thread = threading.Thread(target=run, name="trunk-server", daemon=True)
    thread.start()
    try:
        yield f"{config.server.host}:{bound.result()}"
    finally:
        stop.set()
        thread.join()
