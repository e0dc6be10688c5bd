"""What a model family does around its layers, learnt from one shape-only forward pass; no per-family code.

Who cuts a model needs to know where the layers are, how they return hidden states, and which modules before and after
them make or change hidden states. All three are found out by running the model on the meta device with its layers left
out.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fl_split.config import Task
from fl_split.errors import SplitError

# What a family's own code may fail with, where it is run otherwise than as a whole.
CANNOT_RUN = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError)
_BATCH, _SEQ = 3, 7  # of the pass without numbers
_examined: "dict[tuple[str, ...], Anatomy]" = {}


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
    """What a model family does around its layers, learnt by `examine`."""

    model_class: type[PreTrainedModel]
    layers_path: str  # relative to the base model
    num_layers: int
    as_tuple: bool  # layers return tuples
    edges: tuple[str, ...]  # modules outside the layers that make or change hidden states; relative to the base model
    common: tuple[str, ...]  # weights of the base model that all its layers use, such as a bias of positions
    head: tuple[str, ...]  # modules of the whole model that make one vector of a sequence, or its logits


def auto_class(task: Task) -> Any:
    """The Hugging Face auto class of a task's models."""
    return AutoModelForSequenceClassification if task == "sequence-classification" else AutoModelForCausalLM


def examine(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> Anatomy:
    """Learn where a family keeps its layers and edges, from the config alone: no weights, no memory.

    Args:
        config: Of the full model.
        auto: The Hugging Face auto class that names the model class.

    Raises:
        SplitError: The model cannot be split; says why.
    """
    key = (auto.__name__, type(config).__name__, config.to_json_string())
    if key not in _examined:
        _examined[key] = _examine(config, auto)
    return _examined[key]


def _examine(config: PretrainedConfig, auto: Any) -> Anatomy:
    kind = config.model_type
    if config.is_encoder_decoder:
        raise SplitError(f"{kind} has an encoder and a decoder: only models with one stack of layers can be split")
    if config.get_text_config() is not config:
        raise SplitError(f"{kind} is a multimodal model: only text models can be split; use its text model alone")
    if getattr(config, "num_kv_shared_layers", 0):
        raise SplitError(f"{kind} shares keys and values between layers, so no party could hold a part of them")
    failure: Exception | None = None
    for fake, as_tuple in ((False, False), (False, True), (True, False), (True, True)):
        model = skeleton(config, auto)
        base = cast(PreTrainedModel, model.base_model)
        path, layers = _find_layers(base)
        try:
            with _shapes_only(base, fake):
                edges, pools = _find_edges(base, path, as_tuple)
        except CANNOT_RUN as error:
            failure = error  # layers of this family return the other kind, or its code looks at values
        else:
            apart = tuple(f"{name}." for name in (path, *edges))
            common = tuple(name for name, _ in base.named_parameters() if not name.startswith(apart))
            return Anatomy(type(model), path, len(layers), as_tuple, edges, common, _find_head(model, pools))
    raise SplitError(
        f"{kind} cannot be split: its code does not work with layers left out ({type(failure).__name__})"
    ) from failure


def ancestors(base: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Walk from `base` down to the owner of the layers: prefix, module, name of the next."""
    prefix, module = "", base
    for name in path.split("."):
        yield prefix, module, name
        prefix, module = f"{prefix}{name}.", module.get_submodule(name)


@contextmanager
def all_left_out(layers: nn.ModuleList, as_tuple: bool) -> Iterator[None]:
    """Put a hole in the place of every layer, for a while."""
    real = list(layers)
    try:
        for i, layer in enumerate(real):
            layers[i] = Hole(layer, as_tuple)
        yield
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


def skeleton(config: PretrainedConfig, auto: Any) -> PreTrainedModel:
    """Build the whole model without weights."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as error:
        raise SplitError(
            f"{config.model_type} cannot be built as {auto.__name__} in this version of transformers "
            f"({type(error).__name__}): check its config.json, or use another task"
        ) from error
    return model


@contextmanager
def _shapes_only(base: PreTrainedModel, fake: bool) -> Iterator[None]:
    """Let a model on the meta device run as far as it can without values.

    Code that looks at values (is anything padded?) fails on meta tensors; on fake ones transformers takes the way
    that it takes under compilation, and does not look. They are slow, so they come second.
    """
    object.__setattr__(base.config, "pad_token_id", None)  # else some look for padding; past configs that want a number
    base.config.use_cache = not fake  # on meta, without a cache, the mask code looks at position values
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            base.to_empty(device="cpu")
        yield


def _find_head(model: PreTrainedModel, pools: Sequence[str]) -> tuple[str, ...]:
    base = model.base_model
    inside = "" if base is model else f"{model.base_model_prefix}."
    outside = [] if base is model else [name for name, child in model.named_children() if child is not base]
    found = [*(inside + pool for pool in pools), *outside]
    return tuple(name for name in found if any(True for _ in model.get_submodule(name).parameters()))


def _find_layers(base: nn.Module) -> tuple[str, nn.ModuleList]:
    config: Any = base.config
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return path, module
    raise SplitError(
        f"{config.model_type} cannot be split: it has no list of {config.num_hidden_layers} separate layers "
        "(layers that share weights cannot be held by different parties)"
    )


def _find_edges(base: PreTrainedModel, path: str, as_tuple: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Run `base` with every layer a hole.

    Returns:
        Modules whose output is, or is added to, the hidden states, and all that run after the layers; of the latter
        those whose output is no longer a vector per token.
    """
    layers = base.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{path} is not a list of layers")
    watch = _Watch()
    handles = [
        child.register_forward_hook(partial(watch.saw, prefix + name))
        for prefix, owner, inner in ancestors(base, path)
        for name, child in owner.named_children()
        if name != inner
    ]
    try:
        with all_left_out(layers, as_tuple):
            base._init_weights(base)  # some look into their layers here, when they are loaded
            handles.append(layers[-1].register_forward_hook(watch.passed_layers))
            out = base(input_ids=torch.zeros(_BATCH, _SEQ, dtype=torch.long, device=base.device))[0]
            if tuple(out.shape[:2]) != (_BATCH, _SEQ):
                raise ValueError("hidden states came back in another shape")
    finally:
        for handle in handles:
            handle.remove()
    return tuple(dict.fromkeys(watch.edges)), tuple(dict.fromkeys(watch.pools))


class _Watch:
    """Notes, while a model runs, which modules around its layers make or change hidden states."""

    def __init__(self) -> None:
        self.edges: list[str] = []
        self.pools: list[str] = []
        self._below = False  # whether the layers have been passed

    def saw(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        shaped = isinstance(out, Tensor) and out.is_floating_point() and out.dim() == 3
        if self._below or (shaped and tuple(out.shape[:2]) in ((_BATCH, _SEQ), (1, _SEQ))):
            self.edges.append(name)
        if self._below and isinstance(out, Tensor) and tuple(out.shape[:2]) != (_BATCH, _SEQ):
            self.pools.append(name)

    def passed_layers(self, *_: Any) -> None:
        self._below = True
