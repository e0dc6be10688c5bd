"""What a GPU must do as a CPU does. `scripts/check_gpu.py` runs these; they skip where there is none.

FL_SPLIT_GPU names another device, so that the tests themselves can be looked at on a CPU.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fl_split.config import Kind, Lora, NodeConfig, RunConfig
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import accumulate
from fl_split.model.slots import Trunk
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.build import connect_shares
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.tools.fit.folder import Fit
from fl_split.tools.fit.surrogate import fit
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers
from fl_split.trunk.server import embedded

DEVICE = os.environ.get("FL_SPLIT_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here"),
]
CONFIG = {"server": {"exact-gradient": True, "gradient-shares": True}, "metrics": {"enabled": False}}


@pytest.fixture
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture
def held(folder: Path) -> HeldLayers:
    return hold_layers(folder, 1, 2, device_map=DEVICE)


def batch(num: int = 4, length: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (num, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def gradients(folder: Path, trunk: Trunk, kind: Kind, device: str = DEVICE) -> list[Tensor]:
    """Gradients of the bottom's adapter, which has begun to learn."""
    ends = load_ends(folder, 1, 2, trunk, surrogate=kind)
    model = adapters.attach(ends, Lora(), train_bottom=True, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator) / 30
        for name, value in adapters.adapter_state(model).items()
    }
    adapters.load_adapter_state(model, state)
    torch.nn.Module.to(model, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_bf16_supported", lambda: False)  # float32, to be compared
        accumulate(model, [batch()])
    return [p.grad.cpu() for p in adapters.bottom_parameters(model) if p.grad is not None]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (got, expected))
    assert other.norm() > 0
    assert (one - other).norm() / other.norm() < tolerance


def test_the_split_model_is_the_whole_one_bit_for_bit(folder: Path, held: HeldLayers) -> None:
    full = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    client = load_ends(folder, 1, 2, LocalTrunk(held.model), surrogate="none").to(DEVICE)
    ids = batch()["input_ids"].to(DEVICE)
    with torch.no_grad():
        assert torch.equal(client(ids).logits, full(ids).logits)


def test_a_client_there_has_the_gradients_of_one_on_a_cpu(folder: Path, held: HeldLayers) -> None:
    here = gradients(folder, LocalTrunk(load_trunk(folder, 1, 2)), "exact", "cpu")
    close(gradients(folder, LocalTrunk(held.model), "exact"), here, 1e-4)


def test_the_service_answers_what_the_layers_say_with_others_in_the_batch_too(folder: Path, held: HeldLayers) -> None:
    hidden_states = torch.randn(8, 16, held.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = held.run(hidden_states, None, None)
    with embedded(held, config=TrunkConfig.model_validate(CONFIG)) as address:
        with TrunkConnection(address, Expected.from_checkpoint(folder, 1, 2), wire_dtype="float32") as client:
            calls = [client.start(hidden_states[i : i + 1], None, None) for i in range(8)]
            got = torch.cat([call.result() for call in calls])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_exact_and_streamed_gradients_are_autograds(folder: Path, held: HeldLayers) -> None:
    local = gradients(folder, LocalTrunk(held.model), "exact")
    close(gradients(folder, LocalTrunk(held.model), "streamed"), local, 1e-5)
    with embedded(held, config=TrunkConfig.model_validate(CONFIG)) as address:
        with TrunkConnection(address, Expected.from_checkpoint(folder, 1, 2), wire_dtype="float32") as client:
            close(gradients(folder, client, "exact"), local, 1e-4)


def test_two_shares_add_up_to_the_exact_gradient(folder: Path, held: HeldLayers) -> None:
    local = gradients(folder, LocalTrunk(held.model), "exact")
    run = RunConfig.from_flat(
        {"surrogate.kind": "shares", "surrogate.mask-std": 3.0, "trunk.wire-dtype": "float32", "split.bottom-layers": 1}
        | {"trunk.address": "127.0.0.1:1", "trunk.share-address": "127.0.0.1:2"}
    )
    with ExitStack() as stack:
        config = TrunkConfig.model_validate(CONFIG)
        one, other = (stack.enter_context(embedded(held, config=config)) for _ in range(2))
        trunk = connect_shares(run, NodeConfig(), folder, (one, other), stack)
        close(gradients(folder, trunk, "shares"), local, 1e-2)


def test_mixed_precision_gives_nearly_the_same_loss_and_adapters_stay_in_float32(
    folder: Path, held: HeldLayers
) -> None:
    model = adapters.attach(
        load_ends(folder, 1, 2, LocalTrunk(held.model), surrogate="exact"), Lora(), train_bottom=True, seed=0
    )
    torch.nn.Module.to(model, DEVICE)
    mixed = accumulate(model, [batch()])
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_bf16_supported", lambda: False)
        plain = accumulate(model, [batch()])
    assert float(mixed) == pytest.approx(float(plain), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_surrogate_is_fitted_there_as_on_a_cpu(folder: Path, tmp_path: Path, dtype: str) -> None:
    text = torch.randint(99, (48, 16), generator=torch.Generator().manual_seed(0))
    setting = {"layers": 2, "steps": 12, "batch_size": 4, "length": 16, "lessons": 12}
    there = fit(folder, 1, 1, text, Fit(**setting, device=DEVICE, dtype=dtype), tmp_path / "there")  # type: ignore[arg-type]
    here = fit(folder, 1, 1, text, Fit(**setting), tmp_path / "here")  # type: ignore[arg-type]
    assert there["gradient-cosine"] == pytest.approx(here["gradient-cosine"], abs=0.03)
