"""What a model family does around its layers, learnt from one shape-only forward pass; no per-family code.

`split` needs to know where the layers are, how they return hidden states, and which modules before and after them make
or change hidden states. All three are found out by running the model on the meta device with its layers left out.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fl_split.errors import SplitError


class Hole(nn.Module):
    """A layer that another party holds: passes the hidden states on."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        for name, value in vars(layer).items():  # what a model reads off its layers, such as `attention_type`
            if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float)):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, seq, hidden]`` -> the same, in the way that the family's layers return it."""
        return (hidden_states, None) if self.as_tuple else hidden_states


@dataclass(frozen=True)
class Anatomy:
    """What a model family does around its layers, learnt by `examine`; paths are relative to the base model."""

    model_class: type[PreTrainedModel]
    layers_path: str
    num_layers: int
    as_tuple: bool  # layers return tuples
    edges: tuple[str, ...]  # modules outside the layers that make or change hidden states


def examine(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> Anatomy:
    """Learn where a family keeps its layers and edges, from the config alone: no weights, no memory.

    Args:
        config: Of the full model.
        auto: The Hugging Face auto class that names the model class.

    Raises:
        SplitError: The model cannot be split; says why.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise SplitError(f"{kind} has an encoder and a decoder: only models with one stack of layers can be split")
    if config.get_text_config() is not config:
        raise SplitError(f"{kind} is a multimodal model: only text models can be split; use its text model alone")
    if getattr(config, "num_kv_shared_layers", 0):
        raise SplitError(f"{kind} shares keys and values between layers, so no party could hold a part of them")
    try:
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise SplitError(f"{kind} has no {auto.__name__} in this version of transformers") from error
    base = model.base_model
    base.config.use_cache = True  # without a cache, the mask code looks at position values, which meta tensors lack
    path, layers = _find_layers(base)
    failure: Exception | None = None
    for as_tuple in (False, True):
        try:
            edges = _find_edges(base, path, as_tuple)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            failure = error  # layers of this family return the other kind
        else:
            return Anatomy(type(model), path, len(layers), as_tuple, edges)
    raise SplitError(f"{kind} cannot be split: its forward pass does not work with layers left out") from failure


def _find_layers(base: nn.Module) -> tuple[str, nn.ModuleList]:
    config: Any = base.config
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return path, module
    raise SplitError(
        f"{config.model_type} cannot be split: it has no list of {config.num_hidden_layers} separate layers "
        "(layers that share weights cannot be held by different parties)"
    )


def owners(base: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules from `base` down to the owner of the layers: prefix, module, name of the next."""
    prefix, module = "", base
    for name in path.split("."):
        yield prefix, module, name
        prefix, module = f"{prefix}{name}.", module.get_submodule(name)


def _find_edges(base: nn.Module, path: str, as_tuple: bool) -> tuple[str, ...]:
    """Run `base` with every layer a hole; list the modules whose output is, or is added to, the hidden states."""
    batch, seq = 3, 7
    layers = base.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{path} is not a list of layers")
    real = list(layers)
    edges: list[str] = []
    below = False  # whether the layers have been passed

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            shaped = isinstance(out, Tensor) and out.is_floating_point() and out.dim() == 3
            if below or (shaped and tuple(out.shape[:2]) in ((batch, seq), (1, seq))):
                edges.append(name)

        return hook

    def passed(*_: Any) -> None:
        nonlocal below
        below = True

    handles = [
        child.register_forward_hook(watch(prefix + name))
        for prefix, owner, inner in owners(base, path)
        for name, child in owner.named_children()
        if name != inner
    ]
    try:
        for i, layer in enumerate(real):
            layers[i] = Hole(layer, as_tuple)
        handles.append(layers[-1].register_forward_hook(passed))
        with torch.no_grad():
            ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
            out = base(input_ids=ids)[0]
        if tuple(out.shape[:2]) != (batch, seq):
            raise ValueError("hidden states came back in another shape")
    finally:
        for handle in handles:
            handle.remove()
        for i, layer in enumerate(real):
            layers[i] = layer
    return tuple(dict.fromkeys(edges))
