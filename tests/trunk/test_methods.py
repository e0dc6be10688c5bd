"""Methods have the names of `trunk.proto`, whatever the Python functions behind them are called."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers


def test_every_method_of_the_proto_is_served(checkpoint: Callable[[str], Path]) -> None:
    config = TrunkConfig.model_validate({"server": {"exact-gradient": True, "gradient-shares": True}})
    names = [
        f"/{service.full_name}/{method.name}"
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert len(names) == 6
    held = hold_layers(checkpoint("llama"), 2, 2)
    with server.embedded(held, config=config) as address, grpc.insecure_channel(address) as channel:
        for name in names:
            try:
                channel.unary_unary(name)(b"\xff", timeout=10)
            except grpc.RpcError as error:
                assert error.code() is not grpc.StatusCode.UNIMPLEMENTED, name
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary(f"{names[0]}s")(b"", timeout=10)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
