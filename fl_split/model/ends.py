"""The two ends of a model as one Hugging Face model; its middle is whatever runs the trunk.

Data path: **bottom -> the trunk's slots -> top**, on a node.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fl_split.config import Kind
from fl_split.errors import SplitError
from fl_split.malloc import give_back_freed
from fl_split.model.family import Anatomy, Hole, ancestors, auto_class, examine
from fl_split.model.generation import Streams
from fl_split.model.loading import Boundaries, boundaries_of, ignore_in_checkpoint, list_of_layers, load_around_holes
from fl_split.model.slots import Trunk, TrunkCalls, TrunkSlot
from fl_split.model.streamed import read_places, stream_layer
from fl_split.model.surrogate import kept_layers
from fl_split.model.thin import read_thin_layers, thin_layer

_LARGE_BYTES = 2**20  # of a batch's hidden states: with less, there is nothing to give back


def load_ends(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    trunk: Trunk,
    *,
    surrogate: Kind = "blocks",
    surrogate_layers: int = 2,
    matched: Path | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Sequence[str] = (),
    seed: int = 0,
) -> PreTrainedModel:
    """Load the two ends of a model; its middle is `trunk`.

    Reads only the weights of the ends and of the surrogate's layers. All of them are frozen; a classifier's head is to
    be trained, and is made anew where the checkpoint has none.

    Args:
        folder: The full model's checkpoint (safetensors).
        bottom_layers: Layers on the node before the trunk.
        top_layers: Layers on the node after the trunk.
        trunk: What runs the middle; gets the hidden states of every forward pass.
        surrogate: Which stand-in gives the bottom its gradient.
        surrogate_layers: How many trunk layers the stand-in keeps, for ``blocks`` and ``distilled``.
        matched: The fitted surrogate, for ``matched``.
        dtype: Of the base weights.
        labels: Names of the classes, for a sequence classifier; without them it is a causal language model.
        seed: Of a classifier's head: the same on every node, so that all start from the same.

    Returns:
        A model in eval mode, of the full model's class, with `boundaries`, `head_modules` and its `trunk_calls` as
        attributes. Dropout of the base model is off for good, as it is on the trunk.

    Raises:
        SplitError: The model cannot be split, or not here, or the checkpoint lacks weights.
        ConfigError: The surrogate does not fit the trunk.
        SurrogateError: The fitted surrogate does not fit the model.
    """
    config = AutoConfig.from_pretrained(folder)
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    stop_dropout(config)
    anatomy = examine(config, auto_class("sequence-classification" if labels else "causal-lm"))
    head = anatomy.head if labels else ()
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    kept = kept_layers(surrogate, surrogate_layers, cut.first, cut.end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, left_out = _load_without([i for i in cut.trunk if i not in kept], folder, config, anatomy, head, dtype)
    layers, calls = list_of_layers(model.base_model, anatomy), TrunkCalls(trunk, surrogate, Streams(config.model_type))
    streamed = surrogate == "streamed"
    places = read_places(folder, cut.layers_name, left_out, config.model_type) if streamed else {}
    thin = read_thin_layers(matched) if matched is not None else {}
    for i in cut.trunk:
        layer = thin_layer(left_out[i].to(dtype), thin[i]).to(dtype) if i in thin else layers[i]
        if streamed:
            layer = stream_layer(left_out[i], model, anatomy.as_tuple, places[i], dtype)
        layers[i] = TrunkSlot(layer, anatomy.as_tuple, calls, i, cut)
    _listen(model.base_model, anatomy, calls)
    calls.streams.watch(model)
    model.config.use_cache = False
    model.boundaries, model.trunk_calls, model.head_modules = cut, calls, head
    model.eval().requires_grad_(False)
    return cast(PreTrainedModel, model)


def stop_dropout(config: PretrainedConfig) -> None:
    """Set the base model's dropout to 0: its weights are frozen, and the trunk has none."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def check_weights(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    surrogate: Kind,
    surrogate_layers: int,
    labels: Sequence[str] = (),
) -> bool:
    """See whether `load_ends` would find what it loads, by names and shapes; no weight is read. Arguments as there.

    Returns:
        Whether it was looked at: a quantized checkpoint is not.

    Raises:
        SplitError: The checkpoint lacks weights, or they have other names or shapes than its configuration says.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        return False
    anatomy = examine(config, auto_class("sequence-classification" if labels else "causal-lm"))
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    kept = kept_layers(surrogate, surrogate_layers, cut.first, cut.end)
    holes, head = [i for i in cut.trunk if i not in kept], anatomy.head if labels else ()
    _, left_out = _load_without(holes, folder, config, anatomy, head, torch.float32, device_map="meta")
    if surrogate == "streamed":
        read_places(folder, cut.layers_name, left_out, config.model_type)
    return True


def sketch_ends(
    config: PretrainedConfig, bottom_layers: int, top_layers: int, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """Build the two ends without weights, on the meta device: for names and shapes; arguments as in `load_ends`.

    Raises:
        SplitError: The model cannot be split, or not here.
    """
    if labels:
        config.num_labels = len(labels)
    anatomy = examine(config, auto_class("sequence-classification" if labels else "causal-lm"))
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    with torch.device("meta"):
        model: Any = anatomy.model_class(config)
    layers = list_of_layers(model.base_model, anatomy)
    for i in cut.trunk:
        layers[i] = Hole(layers[i], anatomy.as_tuple)
    model.boundaries, model.head_modules = cut, anatomy.head if labels else ()
    return cast(PreTrainedModel, model)


def checkpoint_activations(ends: nn.Module) -> None:
    """Let the layers that a node holds keep no activations in training, and compute them again in backward.

    Set on each layer by itself, never on the list of layers as a whole: a hole in it would call the trunk again.

    Raises:
        SplitError: The family's layers do not support it.
    """
    base = cast(PreTrainedModel, ends).base_model
    layers = base.get_submodule(boundaries_of(ends).layers_path)
    for layer in layers.children():
        held = layer.kept if isinstance(layer, TrunkSlot) else layer
        if held is None or isinstance(held, Hole):
            continue
        if not isinstance(held, GradientCheckpointingLayer):
            raise SplitError(
                f"transformers cannot compute the activations of {cast(PreTrainedModel, ends).config.model_type}'s "
                "layers again: set train.activation-checkpointing=false"
            )
        held.gradient_checkpointing = True
        setattr(held, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010  # typing


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are a classifier's head; none for a language model."""
    return cast(tuple[str, ...], getattr(model, "head_modules", ()))


def _load_without(
    holes: Sequence[int],
    folder: Path,
    config: PretrainedConfig,
    anatomy: Anatomy,
    head: Sequence[str],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Any, dict[int, nn.Module]]:
    """Load a model without some layers; `options` are for transformers.

    Returns:
        The model, and the layers that were left out, without weights.

    Raises:
        SplitError: The checkpoint lacks weights of another layer, or of what is outside of them and not the head.
    """
    left_out: dict[int, nn.Module] = {}
    name = anatomy.layers_path.rpartition(".")[2]

    def dig(model: PreTrainedModel) -> None:
        layers = list_of_layers(model.base_model, anatomy)
        for i in holes:
            left_out[i] = layers[i]
            layers[i] = Hole(layers[i], anatomy.as_tuple)
        # Of a classifier's checkpoint another head may be left over; what is missing is looked at below.
        ignore_in_checkpoint(model, "" if head else rf"(^|\.){name}\.({'|'.join(map(str, holes))})\.")

    model, missing = load_around_holes(anatomy.model_class, folder, config, dig, dtype, **options)
    missing = {name for name in missing if not name.startswith(tuple(f"{module}." for module in head))}
    if missing:
        raise SplitError(
            f"the checkpoint in {folder} lacks weights that a node needs, or has them in another shape than its "
            f"configuration says, such as {sorted(missing)[0]}: fetch it again"
        )
    return model, left_out


def _listen(base: nn.Module, anatomy: Anatomy, calls: TrunkCalls) -> None:
    """Let `calls` know the mask and positions of each forward pass of the module that runs the layers.

    And once the layers have run, give back what they freed: logits, the largest tensors of a step, are next.
    """
    stack = [module for _, module, _ in ancestors(base, anatomy.layers_path) if isinstance(module, PreTrainedModel)][-1]
    signature = inspect.signature(type(stack).forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise SplitError("attention_mask must be [batch, seq] with 1 for real tokens: other masks cannot be sent")
        calls.remember(mask, given.get("position_ids"))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        hidden_states: Tensor = out[0]
        if hidden_states.requires_grad and hidden_states.device.type == "cpu" and hidden_states.nbytes >= _LARGE_BYTES:
            give_back_freed()

    stack.register_forward_pre_hook(hook, with_kwargs=True)
    stack.register_forward_hook(after)
