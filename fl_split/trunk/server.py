"""The trunk service: the middle layers of one model behind gRPC, forward only and stateless.

Data path: Trunk.Forward -> **decode, pad, run the layers, encode** -> reply. Nothing of a call outlives it: no
log line, metric or error holds a value of a tensor.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from transformers import PreTrainedModel

from fl_split import wire
from fl_split.checkpoint import config_digest, weights_digest
from fl_split.errors import WireError
from fl_split.proto import trunk_pb2 as pb
from fl_split.split import boundaries_of, load_trunk, run_trunk

logger = logging.getLogger(__name__)

SERVICE = "fl_split.Trunk"
MAX_TOKENS = 65_536  # of one call; bounds the memory that one caller can ask for


@dataclass(frozen=True)
class HeldLayers:
    """A loaded trunk and what it says of itself."""

    model: PreTrainedModel
    description: pb.DescribeReply

    @property
    def limits(self) -> wire.Limits:
        """What one call may hold."""
        about = self.description
        return wire.Limits(about.hidden_size, about.max_tokens, about.max_sequence_length)


def hold_layers(folder: Path, bottom_layers: int, top_layers: int, dtype: torch.dtype = torch.float32) -> HeldLayers:
    """Load the layers between the ends of the model in `folder`, ready to be served.

    Raises:
        SplitError: See `split.load_trunk`.
    """
    model = load_trunk(folder, bottom_layers, top_layers, dtype=dtype)
    config, cut = model.config, boundaries_of(model)
    description = pb.DescribeReply(
        config_digest=config_digest(config),
        weights_digest=weights_digest(folder, cut.layers_name, cut.trunk),
        model_type=config.model_type,
        first_layer=cut.first,
        end_layer=cut.end,
        hidden_size=config.hidden_size,
        dtypes=list(wire.DTYPES),
        max_tokens=MAX_TOKENS,
        max_sequence_length=config.max_position_embeddings,
    )
    return HeldLayers(model, description)


class TrunkService:
    """The RPC methods. One worker thread computes; the event loop only moves bytes."""

    def __init__(self, held: HeldLayers) -> None:
        self._held = held
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="trunk")

    async def describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeReply:
        """Say what this trunk holds and accepts."""
        return self._held.description

    async def forward(self, request: pb.ForwardRequest, context: grpc.aio.ServicerContext) -> pb.ForwardReply:
        """Run the layers over one request."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._forward, request)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:  # the outermost frame: callers learn nothing of the inside
            logger.error("forward failed: %s", type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "the trunk failed on this call; its operator's log says more")

    def _forward(self, request: pb.ForwardRequest) -> pb.ForwardReply:
        packed = wire.decode_request(request, self._held.limits)
        hidden_states, mask, positions = wire.pad(packed)
        out = run_trunk(self._held.model, hidden_states.float(), mask, positions)
        rows, _ = wire.pack(out, mask)
        return wire.encode_reply(rows, request.dtype)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The methods under their names in `trunk.proto`."""
        methods = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
            ),
            "Forward": grpc.unary_unary_rpc_method_handler(
                self.forward, pb.ForwardRequest.FromString, pb.ForwardReply.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


async def start(held: HeldLayers, address: str) -> tuple[grpc.aio.Server, int]:
    """Start serving; returns the server and its port.

    Args:
        held: What to serve.
        address: ``host:port``; port 0 takes a free one.

    Raises:
        OSError: The address cannot be bound.
    """
    # One token is at most 4 bytes a dimension; the rest of a message is small beside it.
    max_bytes = held.description.max_tokens * (held.description.hidden_size * 4 + 16)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", max_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers((TrunkService(held).handlers(),))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is the port taken?") from error
    await server.start()
    return server, port


@contextmanager
def embedded(held: HeldLayers, port: int = 0) -> Iterator[str]:
    """Serve on loopback from a thread of this process while the context lasts; yields the address."""
    address: Future[str] = Future()
    stop = threading.Event()

    async def serve() -> None:
        server, bound = await start(held, f"127.0.0.1:{port}")
        address.set_result(f"127.0.0.1:{bound}")
        await asyncio.to_thread(stop.wait)
        await server.stop(grace=5)

    def run() -> None:
        try:
            asyncio.run(serve())
        except OSError as error:
            address.set_exception(error)

    thread = threading.Thread(target=run, name="trunk-server", daemon=True)
    thread.start()
    try:
        yield address.result()
    finally:
        stop.set()
        thread.join()
