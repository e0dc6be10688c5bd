"""The trunk's own layers, one in memory at a time: gradients of the whole model, from weights that come and go."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS
from torch import Tensor, nn

from fl_split.config import Kind, Lora
from fl_split.errors import SplitError
from fl_split.model import adapters, streamed
from fl_split.model.ends import load_ends
from fl_split.model.loss import Batch, accumulate
from fl_split.model.streamed import StreamedLayer
from fl_split.model.trunk import LocalTrunk, load_trunk


def ends_of(folder: Path, kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    trunk = LocalTrunk(load_trunk(folder, 2, 2, dtype=dtype))
    ends = load_ends(folder, 2, 2, trunk, surrogate=kind, dtype=dtype)
    return adapters.attach(ends, Lora(), train_bottom=True, seed=0).train()


def bottom_gradient(model: Any, *batches: Batch, in_flight: int = 1) -> Tensor:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    accumulate(model, batches, in_flight)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([g.flatten() for name, g in named.items() if adapters.part_of(model, name) == "bottom"])


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_weights_of_one_layer_at_a_time_are_in_memory_and_none_afterwards(
    demo_model: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, live, peaks = streamed._read, [0], [0]

    def counted(*args: Any) -> dict[str, Tensor]:
        weights = read(*args)
        for weight in weights.values():
            live[0] += weight.numel()
            weakref.finalize(weight, lambda size: live.__setitem__(0, live[0] - size), weight.numel())
        peaks.append(live[0])
        return weights

    monkeypatch.setattr(streamed, "_read", counted)
    model = ends_of(demo_model, "streamed")
    layers = [module for module in model.modules() if isinstance(module, StreamedLayer)]
    (size,) = {sum(p.numel() for p in layer.shell.parameters()) for layer in layers}
    assert bottom_gradient(model, batch).any()
    assert len(peaks) == 1 + 2 * len(layers) == 9  # read once on the way, once on the way back
    assert set(peaks[1:]) == {size}
    assert live == [0]
    with torch.no_grad():
        model(**batch)
    assert len(peaks) == 9  # without a gradient to make they step aside
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in ends_of(demo_model, "identity").named_parameters()
    }


def test_gradients_in_bfloat16_are_close_to_those_in_float32(demo_model: Path, batch: Batch) -> None:
    exact = bottom_gradient(ends_of(demo_model, "streamed"), batch)
    rounded = bottom_gradient(ends_of(demo_model, "streamed", torch.bfloat16), batch)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99
    assert torch.cosine_similarity(exact, bottom_gradient(ends_of(demo_model, "identity"), batch), dim=0) < 0.95


def test_several_micro_batches_in_flight_give_the_same_gradient(demo_model: Path, batch: Batch) -> None:
    one, other = (
        bottom_gradient(ends_of(demo_model, "streamed"), *[batch] * 3, in_flight=in_flight) for in_flight in (1, 3)
    )
    assert torch.equal(one, other)


def test_a_checkpoint_that_keeps_experts_in_another_form_is_refused(tmp_path: Path) -> None:
    family = next(f for f in DECODERS if f.name == "mixtral")
    family.save(tmp_path)
    with pytest.raises(SplitError, match=r"cannot read layer 2 of this mixtral.*in another form; use 'blocks'"):
        load_ends(tmp_path, 2, 2, LocalTrunk(load_trunk(tmp_path, 2, 2)), surrogate="streamed")


def test_layers_that_need_a_second_gradient_are_refused(checkpoint: Callable[[str], Path]) -> None:
    layer = StreamedLayer(nn.Identity(), False, lambda device: {})
    x = torch.ones(1, 1, 4, requires_grad=True)
    assert torch.equal(layer(x), x)
    with pytest.raises(SplitError, match=r"another tensor with a gradient beside the hidden states; use 'blocks'"):
        layer(x, residual=[x])
