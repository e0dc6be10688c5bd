"""The trunk service: the middle layers of one model behind gRPC, forward only and stateless.

Data path: Trunk.Forward -> **who, read, decode** -> batcher -> **encode** -> reply. Nothing of a call outlives it: no
log line, metric or error holds a value of a tensor.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fl_split import wire
from fl_split.proto import trunk_pb2 as pb
from fl_split.split import pull_back
from fl_split.trunk.access import Gate, TokenBook, identify, server_credentials
from fl_split.trunk.batching import Batcher, Job
from fl_split.trunk.calls import Call, Refusal
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.held import HeldLayers, hold_layers, num_cpus
from fl_split.trunk.layout import run_packed
from fl_split.trunk.metrics import TrunkMetrics
from fl_split.trunk.published import Published

__all__ = ["HeldLayers", "TrunkServer", "embedded", "hold_layers"]

logger = logging.getLogger(__name__)

_INLINE_BYTES = 65_536  # decoding less than this takes less time than handing it to a thread
_MAX_WAIT_S = 600.0  # of calls that come without a deadline
_Code = grpc.StatusCode


class TrunkServer:
    """One bound server: `start`, `warm_up`, and in the end `drain`. Lives in one event loop."""

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
        self._published = Published(config.model.surrogate, self._description)
        self._pulling = asyncio.Semaphore(1)  # one backward pass at a time bounds their memory
        self._limits = wire.Limits(
            held.hidden_size, self._description.max_tokens, self._description.max_sequence_length
        )
        self._book = TokenBook(Path(config.security.tokens)) if config.security.tokens else None
        self._gate = Gate(config.limits)
        limits = config.limits
        self._batcher = Batcher(self._compute, held.allowed(config.batching), limits.queue_tokens, limits.queue_s)
        self._batcher.on_batch = self._count_batch
        self._health = health.aio.HealthServicer()
        self._server = self._build()
        self._serving: asyncio.Task[None] | None = None
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
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not become a large one
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_time_ms", 60_000),  # finds callers who are gone without a word
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", 0),
            ],
        )
        server.add_generic_rpc_handlers((self._handlers(),))
        if self._config.server.exact_gradient:
            server.add_generic_rpc_handlers((self._exact_gradient(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _handlers(self) -> grpc.GenericRpcHandler:
        """The methods under their names in `trunk.proto`.

        Towards grpc they take a stream, so that a call is seen before its message is received: whoever is refused is
        refused unread, and messages are parsed here. On the wire the two kinds of call are the same.
        """
        methods = {
            "Describe": grpc.stream_unary_rpc_method_handler(self._wrap("Describe", self._describe)),
            "Forward": grpc.stream_unary_rpc_method_handler(self._wrap("Forward", self._forward)),
            "Surrogate": grpc.stream_unary_rpc_method_handler(self._wrap("Surrogate", self._surrogate)),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)

    def _exact_gradient(self) -> grpc.GenericRpcHandler:
        """The opt-in service of `trunk.proto`."""
        logger.warning(
            "exact gradients are on (server.exact-gradient): nodes that use them send dL/dh2, the gradient of their "
            "private loss, to this trunk"
        )
        methods = {"Pull": grpc.stream_unary_rpc_method_handler(self._wrap("Pull", self._pull))}
        return grpc.method_handlers_generic_handler(wire.EXACT_SERVICE, methods)

    async def start(self) -> None:
        """Bind and listen; not ready yet.

        Raises:
            OSError: The address cannot be bound.
        """
        await self._set_ready(False)
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
        self._serving = asyncio.create_task(self._batcher.run())

    async def warm_up(self) -> None:
        """Compute once, with and without padding, then be ready: first callers do not pay for what happens once."""
        length = min(32, self._limits.max_sequence_length)
        for lengths in ([length], [length, max(1, length // 2)]):
            rows = torch.zeros(sum(lengths), self._limits.hidden_size)
            await self._batcher.warm_up(wire.Packed(rows, lengths, None))
        await self._set_ready(True)

    async def drain(self) -> None:
        """Take no more calls, finish those that are open within `server.drain-s`, stop."""
        await self._set_ready(False)
        await self._server.stop(self._config.server.drain_s)
        if self._serving is not None:
            self._serving.cancel()
            with suppress(asyncio.CancelledError):
                await self._serving
        self._batcher.close()

    async def _set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in (health.OVERALL_HEALTH, wire.SERVICE):
            await self._health.set(name, status)
        self.metrics.ready.set(ready)

    # ---------------------------------------------------------------------------------------------------- calls

    def _wrap(self, method: str, answer: Callable[["Call"], Coroutine[Any, Any, bytes]]) -> Any:
        """What every call goes through: who it is, how it ends, its line in the log and in the metrics."""

        async def handle(messages: Any, context: grpc.aio.ServicerContext) -> bytes:
            call = Call(method, messages, context)
            with self.metrics.open_calls.track_inprogress():
                try:
                    call.institution, call.caller = identify(context, self._book)
                    async with self._gate.call(call.caller):
                        reply = await answer(call)
                    call.finish(_Code.OK, self.metrics, len(reply))
                    return reply
                except asyncio.CancelledError:
                    call.finish(_Code.CANCELLED, self.metrics)
                    raise
                except Exception as error:  # the outermost frame: callers learn nothing of the inside
                    refusal = Refusal.of(error, call.id)
                    call.finish(refusal.code, self.metrics)
                    # Not `abort`: its exception holds this frame, and with it the call's memory, until a collection.
                    context.set_code(refusal.code)
                    context.set_details(refusal.text)
                    context.set_trailing_metadata(refusal.trailers)
                    return b""

        return handle

    async def _describe(self, call: "Call") -> bytes:
        return self._description.SerializeToString()

    async def _forward(self, call: "Call") -> bytes:
        async with self._gate.reading(call.caller):
            self._batcher.check_room(call.caller)
            data = await call.read(self._config.limits.receive_timeout_s)
            dtype, packed = await _in_thread_if(len(data) > _INLINE_BYTES, _decode, data, self._limits)
            call.num_tokens, call.num_sequences = len(packed.rows), len(packed.lengths)
        timeout_s = min(call.context.time_remaining() or _MAX_WAIT_S, _MAX_WAIT_S)
        del data
        self.metrics.queued_tokens.set(self._batcher.queued_tokens)
        done = await self._batcher.submit(call.caller, packed, timeout_s)
        call.queue_s, call.compute_s, call.batch_tokens = done.queue_s, done.compute_s, done.batch_tokens
        self.metrics.queue_s.observe(done.queue_s)
        large = done.rows.nbytes > _INLINE_BYTES
        reply: bytes = await _in_thread_if(large, _encode, done.rows, dtype, self._description.trunk_id)
        return reply

    async def _surrogate(self, call: "Call") -> bytes:
        request = pb.SurrogateRequest.FromString(await call.read(self._config.limits.receive_timeout_s))
        return pb.SurrogateReply(data=self._published.piece(request.offset)).SerializeToString()

    async def _pull(self, call: "Call") -> bytes:
        async with self._gate.reading(call.caller):
            data = await call.read(self._config.limits.receive_timeout_s)
        async with self._pulling:
            reply: bytes = await asyncio.to_thread(_pull, data, self._limits, self._held)
        return reply

    def _compute(self, requests: Sequence[wire.Packed]) -> list[Tensor]:
        outputs, self._padded_tokens = run_packed(self._held.run, requests, causal=self._held.causal)
        return outputs

    def _count_batch(self, jobs: list[Job], seconds: float) -> None:
        num_tokens = sum(job.num_tokens for job in jobs)
        self.metrics.compute_s.observe(seconds)
        self.metrics.batch_tokens.observe(num_tokens)
        self.metrics.batch_calls.observe(len(jobs))
        self.metrics.batch_fill.observe(num_tokens / self._padded_tokens)
        self.metrics.queued_tokens.set(self._batcher.queued_tokens)


def _decode(data: bytes, limits: wire.Limits) -> tuple[pb.DType, wire.Packed]:
    request = pb.ForwardRequest.FromString(data)
    return request.dtype, wire.decode_request(request, limits)


def _pull(data: bytes, limits: wire.Limits, held: HeldLayers) -> bytes:
    request = pb.PullRequest.FromString(data)
    packed, gradient = wire.decode_pull(request, limits)

    def padded(rows: Tensor) -> Tensor:
        return pad_sequence(rows.split(packed.lengths), batch_first=True)

    mask = padded(torch.ones(sum(packed.lengths), dtype=torch.long))
    positions = None if packed.positions is None else padded(packed.positions)
    pulled = pull_back(held.model, padded(packed.rows.float()), mask, positions, padded(gradient.float()))
    rows = wire.pack(pulled, mask)[0]
    return wire.encode_pull_reply(rows, request.forward.dtype, held.identity.trunk_id).SerializeToString()


def _encode(rows: Tensor, dtype: pb.DType, trunk_id: bytes) -> bytes:
    return wire.encode_reply(rows, dtype, trunk_id).SerializeToString()


async def _in_thread_if(large: bool, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(function, *args) if large else function(*args)


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
        await asyncio.to_thread(stop.wait)
        await server.drain()

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
