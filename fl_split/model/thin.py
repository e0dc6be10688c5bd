"""Thin layers: the trunk's own, with every linear a product of two matrices; and the file that holds fitted ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fl_split.errors import SurrogateError


def thin_layer(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a layer of the trunk's class thin: linears as products of two matrices, all weights from `tensors`.

    Args:
        layer: A layer of the full model, on the meta device; mutated.
        tensors: A thin layer's `state_dict`; a linear that was left whole has its own weight in it.

    Raises:
        SurrogateError: The tensors are not those of such a layer.
    """
    for name in linears(layer):
        if f"{name}.weight" in tensors:
            continue
        try:
            a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
        except KeyError as error:
            raise SurrogateError(
                f"the fitted surrogate lacks weights for {name}: fit it again for this model"
            ) from error
        replace(layer, name, LowRank(a, b, tensors.get(f"{name}.bias")))
    try:
        layer.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise SurrogateError("the fitted surrogate's weights do not fit the model's layers: fit it again") from error
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        raise SurrogateError(
            "layers of this model hold buffers that a fitted surrogate lacks: use surrogate.kind='blocks'"
        )
    return layer


def read_card(file: Path) -> dict[str, Any]:
    """What a fitted surrogate says of itself: model digests, layers, budget, cosine reached.

    Raises:
        SurrogateError: It is not a file that ``fl-split surrogate fit`` wrote.
    """
    try:
        with safe_open(file, "pt") as tensors:
            card: dict[str, Any] = json.loads((tensors.metadata() or {})["card"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise SurrogateError(
            f"{file} is not a fitted surrogate ({type(error).__name__}): make one with 'fl-split surrogate fit'"
        ) from error
    return card


def read_thin_layers(file: Path) -> dict[int, dict[str, Tensor]]:
    """The weights of a fitted surrogate, by layer of the full model."""
    layers: dict[int, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():
            layer, _, name = key.partition(".")
            layers.setdefault(int(layer), {})[name] = tensors.get_tensor(key)
    return layers


def check_card(
    card: Mapping[str, Any], *, config_digest: str, weights_digest: str | None, first: int, end: int
) -> None:
    """Refuse a surrogate that was fitted to another trunk.

    Raises:
        SurrogateError: Another model, other weights or other layers; names both.
    """
    if (card["first-layer"], card["end-layer"]) != (first, end):
        raise SurrogateError(
            f"the surrogate was fitted to layers {card['first-layer']} to {card['end-layer'] - 1}, this run's trunk "
            f"holds {first} to {end - 1}: fit one for this split"
        )
    if card["config-digest"] != config_digest or weights_digest not in (None, card["weights-digest"]):
        raise SurrogateError(
            f"the surrogate was fitted to another model (config {card['config-digest'][:12]}, weights "
            f"{card['weights-digest'][:12]}) than this run's (config {config_digest[:12]}, weights "
            f"{(weights_digest or 'unknown')[:12]}): fit one for this model"
        )


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a layer by their names in it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of a layer's submodule."""
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, module)


class LowRank(nn.Module):
    """``x -> B A x + bias``, in place of a linear: ``[..., in]`` -> ``[..., out]``."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B, self.bias)
