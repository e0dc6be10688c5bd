"""A trunk over loopback for the tests around it: its channel, calls to it, and what it has counted."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from fl_split import wire
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk import server
from fl_split.trunk.access import add_token
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers

HIDDEN = 32


class Gated(HeldLayers):
    """The same layers, but while `gate` is closed no forward pass ends; `lengths` are those of the passes so far."""

    @classmethod
    def of(cls, held: HeldLayers) -> "Gated":
        gated = cls(held.model, held.identity, held.causal)
        object.__setattr__(gated, "gate", threading.Event())
        object.__setattr__(gated, "lengths", [])
        gated.gate.set()
        return gated

    gate: threading.Event
    lengths: list[int]

    def run(self, hidden_states: Tensor, *args: Any) -> Tensor:
        self.lengths.append(hidden_states.shape[1])
        assert self.gate.wait(30)
        return super().run(hidden_states, *args)

    def close(self) -> int:
        """Close the gate; returns how many passes there have been."""
        self.gate.clear()
        return len(self.lengths)


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for at most half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def serving(held: HeldLayers, **sections: dict[str, Any]) -> Iterator[grpc.Channel]:
    config = TrunkConfig.model_validate(sections)
    options = [("grpc.http2.bdp_probe", 0)]  # else grpc may take a reply that nobody asks for
    with server.embedded(held, config=config) as address, grpc.insecure_channel(address, options) as channel:
        yield channel


@contextmanager
def running(held: HeldLayers, **sections: dict[str, Any]) -> Iterator[tuple[server.TrunkServer, grpc.Channel]]:
    """As `serving`, with the server itself."""
    made: list[server.TrunkServer] = []
    build = server.TrunkServer._build

    def spy(self: server.TrunkServer) -> Any:
        made.append(self)
        return build(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.TrunkServer, "_build", spy)
        with serving(held, **sections) as channel:
            yield made[0], channel


def counted(trunk: server.TrunkServer, method: str, code: str, institution: str = "anonymous") -> float:
    labels = {"method": method, "code": code, "institution": institution}
    return trunk.metrics.registry.get_sample_value("fl_split_trunk_calls_total", labels) or 0.0


def forward(channel: grpc.Channel) -> Any:
    return channel.unary_unary(f"/{wire.SERVICE}/Forward", None, pb.ForwardReply.FromString)


def request(num_tokens: int = 5, **changes: Any) -> bytes:
    data, _ = wire.encode_rows(torch.ones(num_tokens, HIDDEN), pb.FLOAT32)
    fields = {"dtype": pb.FLOAT32, "lengths": [num_tokens], "hidden_states": data, **changes}
    return pb.ForwardRequest(**fields).SerializeToString()


def refused(channel: grpc.Channel, message: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        forward(channel)(message, timeout=5, **options)
    return error.value


def bearers_of(file: Path, *institutions: str) -> list[Any]:
    """New tokens in a tokens file: what calls of these institutions carry."""
    return [(("authorization", f"Bearer {add_token(file, name, None)}"),) for name in institutions]
