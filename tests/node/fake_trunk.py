"""A trunk whose answers a test makes up."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers

Answer = Callable[[pb.ForwardRequest, grpc.ServicerContext], pb.ForwardReply]


@contextmanager
def fake_trunk(held: HeldLayers, answer: Answer, port: int = 0, **about: Any) -> Iterator[tuple[str, list[str]]]:
    """A trunk whose Forward is `answer`; yields its address and the methods called."""
    calls: list[str] = []
    description = held.describe(TrunkConfig().limits)
    description.MergeFrom(pb.DescribeReply(**about))

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]

            def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
                calls.append(method)
                if method == "Describe":
                    return description.SerializeToString()
                return answer(pb.ForwardRequest.FromString(message), context).SerializeToString()

            return grpc.unary_unary_rpc_method_handler(handle)

    fake = grpc.server(ThreadPoolExecutor(8), (Handler(),), options=[("grpc.so_reuseport", 0)])
    bound = fake.add_insecure_port(f"127.0.0.1:{port}")
    fake.start()
    try:
        yield f"127.0.0.1:{bound}", calls
    finally:
        fake.stop(0).wait()


def echo(held: HeldLayers) -> Answer:
    def answer(request: pb.ForwardRequest, context: grpc.ServicerContext) -> pb.ForwardReply:
        return pb.ForwardReply(
            dtype=request.dtype, hidden_states=request.hidden_states, trunk_id=held.identity.trunk_id
        )

    return answer
