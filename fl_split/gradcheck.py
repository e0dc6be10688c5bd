"""`fl-split gradcheck`: how far each surrogate's gradient is from the exact one, on one's own model and data.

Needs the whole checkpoint on the machine, and sends nothing anywhere: the trunk runs in this process. Run it on a
*trained* model: at default initialisation a trunk is nearly the identity, and every surrogate looks perfect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from fl_split import adapters, train
from fl_split.config import Lora
from fl_split.data import Batch
from fl_split.split import LocalTrunk, Trunk, load_client, load_trunk
from fl_split.surrogate import Kind


@dataclass(frozen=True)
class Candidate:
    """A surrogate to be looked at."""

    kind: Kind
    layers: int = 1  # kept, for `blocks`
    matched: Path | None = None  # the fitted file, for `matched`

    @property
    def name(self) -> str:
        """Such as ``blocks-2``."""
        return f"{self.kind}-{self.layers}" if self.kind in ("blocks", "distilled", "matched") else self.kind


@dataclass(frozen=True)
class Agreement:
    """A surrogate's bottom gradient beside the exact one."""

    candidate: Candidate
    cosine: float
    norm_ratio: float  # of the surrogate's gradient to the exact one
    extra_params: int  # weights that the node holds for it
    wire_tensors: int  # activation-sized tensors on the wire per token: 2 for a forward, 5 with the exact gradient


def build(
    folder: Path, bottom_layers: int, top_layers: int, trunk: Trunk, candidate: Candidate, lora: Lora
) -> PeftModel:
    """A client with adapters (seed 0) around `trunk`, with the candidate as its surrogate."""
    client = load_client(
        folder,
        bottom_layers,
        top_layers,
        trunk,
        surrogate=candidate.kind,
        surrogate_layers=candidate.layers,
        matched=candidate.matched,
    )
    return adapters.attach(client, lora, train_bottom=candidate.kind != "none", seed=0)


def bottom_gradient(model: PeftModel, batches: Sequence[Batch]) -> Tensor:
    """Gradient of the mean loss over the batches with respect to the bottom adapter, flat; clears all gradients."""
    model.eval()
    train.accumulate(model, batches)
    parts = [
        parameter.grad.flatten()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and adapters.part_of(model, name) == "bottom"
    ]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def surrogate_params(model: PeftModel) -> int:
    """Weights that a client holds beyond its ends: those of its surrogate."""
    return sum(p.numel() for name, p in model.named_parameters() if adapters.part_of(model, name) == "trunk")


def gradcheck(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate],
    *,
    lora: Lora | None = None,
    adapter: dict[str, Tensor] | None = None,
) -> list[Agreement]:
    """Compare bottom gradients with the exact one.

    Args:
        folder: The whole checkpoint.
        bottom_layers: Layers before the trunk.
        top_layers: Layers after the trunk.
        batches: Private examples; used here and sent nowhere.
        candidates: What to compare.
        lora: The adapters' setting.
        adapter: Adapter weights to check at, such as those of a finished run; by default the start of training.
    """
    trunk = LocalTrunk(load_trunk(folder, bottom_layers, top_layers))
    lora = lora or Lora()

    def gradient(candidate: Candidate) -> tuple[Tensor, int]:
        model = build(folder, bottom_layers, top_layers, trunk, candidate, lora)
        adapters.load_adapter_state(model, adapter or {})
        return bottom_gradient(model, batches), surrogate_params(model)

    exact, _ = gradient(Candidate("exact"))
    rows = []
    for candidate in candidates:
        got, extra = gradient(candidate)
        cosine = torch.cosine_similarity(got, exact, dim=0).item()
        wire = 5 if candidate.kind == "exact" else 2
        rows.append(Agreement(candidate, cosine, (got.norm() / exact.norm()).item(), extra, wire))
    return rows
