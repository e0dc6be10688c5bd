"""The service over loopback: equal to the trunk in this process, whoever shares a batch, and health."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fl_split.split import LocalTrunk
from fl_split.trunk import server
from fl_split.trunk.client import Expected, TrunkClient


@pytest.fixture(scope="session")
def held(checkpoint: Callable[[str], Path]) -> server.HeldLayers:
    return server.hold_layers(checkpoint("llama"), 2, 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_remote_equals_local(checkpoint: Callable[[str], Path], family: str) -> None:
    torch.manual_seed(0)
    held = server.hold_layers(checkpoint(family), 2, 2)
    hidden_states = torch.randn(3, 10, 32)
    mask = (torch.arange(10)[None] < torch.tensor([10, 4, 7])[:, None]).long()
    expected = Expected.from_checkpoint(checkpoint(family), 2, 2)
    with server.embedded(held) as address, TrunkClient(address, expected, wire_dtype="float32") as client:
        for attention_mask in (None, mask):
            remote = client.start(hidden_states, attention_mask, None).result()
            local = LocalTrunk(held.model).start(hidden_states, attention_mask, None).result()
            real = mask.bool() if attention_mask is not None else torch.ones(3, 10, dtype=torch.bool)
            torch.testing.assert_close(remote[real], local[real], rtol=1e-5, atol=1e-5)
