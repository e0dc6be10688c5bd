"""A Hugging Face model -> the client's model and the trunk's model.

Both are ordinary models of the full config in which each layer that a party does not hold is a hole that passes
the hidden states on. Module names, layer indices, masks, rotary tables, checkpoint keys and adapter keys stay
those of the full model, so Hugging Face's own forward and loss, PEFT and `Trainer` work on a client unchanged.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from fl_split.errors import SplitError
from fl_split.malloc import give_back_freed
from fl_split.model.family import Anatomy, Hole, examine, owners
from fl_split.model.slots import RemoteTrunk, Trunk, TrunkSlot
from fl_split.model.surrogate import Kind, kept_layers, read_thin_layers, thin_layer

_LARGE_BYTES = 2**20  # of a batch's hidden states: with less, there is nothing to give back


@dataclass(frozen=True)
class Boundaries:
    """Where a model of `num_layers` layers is cut: bottom ``[0, first)``, trunk ``[first, end)``, top the rest."""

    layers_path: str  # of the list of layers, below the base model
    num_layers: int
    first: int
    end: int

    @classmethod
    def of(cls, anatomy: "Anatomy", bottom_layers: int, top_layers: int) -> "Boundaries":
        """Cut a model so that the node holds its first and last layers.

        Raises:
            SplitError: Nothing is left for one of the three parts.
        """
        for key, value in (("split.bottom-layers", bottom_layers), ("split.top-layers", top_layers)):
            if value < 1:
                raise SplitError(f"{key}={value}: a node holds at least one layer at each end")
        num_layers = anatomy.num_layers
        if bottom_layers + top_layers >= num_layers:
            raise SplitError(
                f"split.bottom-layers={bottom_layers} and split.top-layers={top_layers} leave no trunk: the model has "
                f"{num_layers} layers, so together they must be at most {num_layers - 1}"
            )
        return cls(anatomy.layers_path, num_layers, bottom_layers, num_layers - top_layers)

    @property
    def layers_name(self) -> str:
        """What precedes a layer's index in the names of its weights, such as ``layers`` or ``h``."""
        return self.layers_path.rsplit(".", 1)[-1]

    @property
    def bottom(self) -> range:
        """Layers of the bottom."""
        return range(self.first)

    @property
    def trunk(self) -> range:
        """Layers of the trunk."""
        return range(self.first, self.end)

    @property
    def top(self) -> range:
        """Layers of the top."""
        return range(self.end, self.num_layers)


# --------------------------------------------------------------------------------------------------------- holes


class Absent(nn.Module):
    """On the trunk, an embedding or a norm that clients hold: passes hidden states on; to anything else adds 0."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states among the arguments, or a 0-d zero, which keeps dtype and device when added."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                return value
        return torch.zeros(())


# ------------------------------------------------------------------------------------------------------- loading


def load_client(
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
        A model in eval mode, of the full model's class, with `boundaries`, `head_modules` and its `remote_trunk` as
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
    anatomy = examine(config, AutoModelForSequenceClassification if labels else AutoModelForCausalLM)
    head = anatomy.head if labels else ()
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    kept = kept_layers(surrogate, surrogate_layers, cut.first, cut.end)
    holes = [i for i in cut.trunk if i not in kept]
    thin = read_thin_layers(matched) if matched is not None else {}
    shells: dict[int, nn.Module] = {}  # of the layers to be thin: built on meta, never loaded

    def dig(model: PreTrainedModel) -> None:
        layers = _layers(model.base_model, anatomy)
        for i in holes:
            shells[i] = layers[i]
            layers[i] = Hole(layers[i], anatomy.as_tuple)
        # Of a classifier's checkpoint another head may be left over; what is missing is looked at below.
        _ignore_in_checkpoint(model, "" if head else rf"(^|\.){cut.layers_name}\.({'|'.join(map(str, holes))})\.")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = _load(anatomy.model_class, folder, config, dig, dtype)
    missing = {name for name in missing if not name.startswith(tuple(f"{module}." for module in head))}
    if missing:
        raise SplitError(f"the checkpoint in {folder} lacks weights that a node needs, such as {sorted(missing)[0]}")
    remote = RemoteTrunk(trunk, surrogate)
    layers = _layers(model.base_model, anatomy)
    for i in cut.trunk:
        layer = thin_layer(shells[i].to(dtype), thin[i]).to(dtype) if i in thin else layers[i]
        layers[i] = TrunkSlot(layer, anatomy.as_tuple, remote, i == cut.first, i == cut.end - 1)
    _listen(model.base_model, anatomy, remote)
    model.config.use_cache = False
    model.boundaries, model.remote_trunk, model.head_modules = cut, remote, head
    model.eval().requires_grad_(False)
    return cast(PreTrainedModel, model)


def stop_dropout(config: PretrainedConfig) -> None:
    """Set the base model's dropout to 0: its weights are frozen, and the trunk has none."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def sketch_client(
    config: PretrainedConfig, bottom_layers: int, top_layers: int, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """A client without weights, on the meta device: for names and shapes; other arguments as in `load_client`.

    Raises:
        SplitError: The model cannot be split, or not here.
    """
    if labels:
        config.num_labels = len(labels)
    anatomy = examine(config, AutoModelForSequenceClassification if labels else AutoModelForCausalLM)
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    with torch.device("meta"):
        model: Any = anatomy.model_class(config)
    layers = _layers(model.base_model, anatomy)
    for i in cut.trunk:
        layers[i] = Hole(layers[i], anatomy.as_tuple)
    model.boundaries, model.head_modules = cut, anatomy.head if labels else ()
    return cast(PreTrainedModel, model)


def boundaries_of(model: nn.Module) -> Boundaries:
    """Where a client or a trunk was cut."""
    return cast(Boundaries, model.boundaries)


def checkpoint_activations(client: nn.Module) -> None:
    """Let the layers that a client holds keep no activations in training, and compute them again in backward.

    Set on each layer by itself, never on the list of layers as a whole: a hole in it would call the trunk again.

    Raises:
        SplitError: The family's layers do not support it.
    """
    base = cast(PreTrainedModel, client).base_model
    layers = base.get_submodule(boundaries_of(client).layers_path)
    for layer in layers.children():
        held = layer.kept if isinstance(layer, TrunkSlot) else layer
        if held is None or isinstance(held, Hole):
            continue
        if not isinstance(held, GradientCheckpointingLayer):
            raise SplitError(
                f"transformers cannot compute the activations of {cast(PreTrainedModel, client).config.model_type}'s "
                "layers again: set train.activation-checkpointing=false"
            )
        held.gradient_checkpointing = True
        setattr(held, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010  # typing


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are a classifier's head; none for a language model."""
    return cast(tuple[str, ...], getattr(model, "head_modules", ()))


def load_trunk(
    folder: Path, bottom_layers: int, top_layers: int, *, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """Load the middle of a model, to be called with ``inputs_embeds`` = the bottom's output.

    Reads only the weights of its own layers. `options` go to transformers' `from_pretrained`.

    Returns:
        A base model (no head) in eval mode, with `boundaries` as an attribute.

    Raises:
        SplitError: The model cannot be split, or not here, the checkpoint lacks weights, or something outside the
            layers would still change the hidden states.
    """
    config = AutoConfig.from_pretrained(folder)
    anatomy = examine(config, AutoModel)
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)

    def dig(base: Any) -> None:
        layers = _layers(base, anatomy)
        for i in (*cut.bottom, *cut.top):
            layers[i] = Hole(layers[i], anatomy.as_tuple)
        for path in anatomy.edges:
            owner, _, name = path.rpartition(".")
            setattr(base.get_submodule(owner), name, Absent())
        if hasattr(base, "embedding_multiplier"):  # Granite scales inputs_embeds itself
            base.embedding_multiplier = 1.0
        base.all_tied_weights_keys = {}
        _ignore_in_checkpoint(base, "")

    base, missing = _load(anatomy.model_class, folder, config, dig, dtype, **options)
    if missing:
        raise SplitError(f"the checkpoint in {folder} lacks weights of the trunk, such as {sorted(missing)[0]}")
    base.config.use_cache = False
    base.boundaries = cut
    base.eval().requires_grad_(False)
    _check_edges_neutral(base, anatomy)
    return cast(PreTrainedModel, base)


def _layers(base: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    layers = base.get_submodule(anatomy.layers_path)
    if not isinstance(layers, nn.ModuleList):
        raise SplitError(f"{anatomy.layers_path} is not a list of layers")
    return layers


def _ignore_in_checkpoint(model: PreTrainedModel, pattern: str) -> None:
    """Weights matching `pattern` belong to another party: do not warn that they are not used."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}


def _load(
    model_class: type[PreTrainedModel],
    folder: Path,
    config: PretrainedConfig,
    dig: Callable[[PreTrainedModel], None],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Any, set[str]]:
    """`from_pretrained` of a class that digs its holes as it is built, so that their weights are never read."""

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        dig(self)

    # Same name and module as the original: transformers looks up weight conversions by them.
    dug = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    tensors = _partial_checkpoint(folder)
    try:
        model, info = dug.from_pretrained(  # type: ignore[attr-defined]
            None if tensors else folder,
            state_dict=tensors,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other labels; whatever else does not fit is missing, too
            **options,
        )
    except OSError as error:
        raise SplitError(
            f"cannot load {folder}: it needs weights in safetensors files ({type(error).__name__})"
        ) from error
    model.name_or_path = str(folder)
    return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def _partial_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The weights at hand, not read yet, where some files of a checkpoint are not here: another party needs those."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    named = set(json.loads(index.read_text())["weight_map"].values())
    here = [folder / name for name in sorted(named) if (folder / name).is_file()]
    if len(here) == len(named):
        return None  # transformers reads what it needs
    files: list[Any] = [safe_open(file, "pt") for file in here]
    return {key: file.get_slice(key) for file in files for key in file.keys()}


def _listen(base: nn.Module, anatomy: Anatomy, remote: RemoteTrunk) -> None:
    """Let `remote` know the mask and positions of each forward pass of the module that runs the layers.

    And once the layers have run, give back what they freed: logits, the largest tensors of a step, are next.
    """
    stack = [module for _, module, _ in owners(base, anatomy.layers_path) if isinstance(module, PreTrainedModel)][-1]
    signature = inspect.signature(type(stack).forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        # by type: the argument is `past_key_values` up to transformers 5.23, `cache` from 5.24 on
        if any(isinstance(value, Cache) and value.get_seq_length() > 0 for value in given.values()):
            raise SplitError("generation with a cache does not work across the split: pass use_cache=False")
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise SplitError("attention_mask must be [batch, seq] with 1 for real tokens: other masks cannot be sent")
        remote.remember(mask, given.get("position_ids"))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        hidden_states: Tensor = out[0]
        if hidden_states.requires_grad and hidden_states.device.type == "cpu" and hidden_states.nbytes >= _LARGE_BYTES:
            give_back_freed()

    stack.register_forward_pre_hook(hook, with_kwargs=True)
    stack.register_forward_hook(after)


def _check_edges_neutral(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """With every layer a hole, a trunk must give back its inputs_embeds bit for bit."""
    layers = _layers(base, anatomy)
    real = list(layers)
    probe = torch.randn(2, 3, base.config.hidden_size, dtype=base.dtype, device=base.device)
    try:
        for i, layer in enumerate(real):
            layers[i] = Hole(layer, anatomy.as_tuple)
        with torch.no_grad():
            out = base(inputs_embeds=probe)[0]
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer
    if not torch.equal(probe, out):
        raise SplitError(
            f"{base.config.model_type} cannot be split: something outside its layers changes the hidden states"
        )


class LocalTrunk:
    """A trunk in this process, for tests, benchmarks and whoever holds the whole checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Run the trunk now; see `remote.Trunk.start`."""
        done: Future[Tensor] = Future()
        done.set_result(run_trunk(self.model, hidden_states, attention_mask, position_ids))
        return done

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """Recompute and pull a gradient back; see `remote.ExactTrunk.vjp`."""
        return pull_back(self.model, hidden_states, attention_mask, position_ids, gradient)


def run_trunk(
    model: PreTrainedModel, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Run a trunk's layers, forward only; shapes as in `remote.Trunk.start`; dtype and device of `hidden_states`."""
    kwargs: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    with torch.inference_mode():
        embeds = hidden_states.to(device=model.device, dtype=model.dtype)
        out: Tensor = model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)[0]
    return out.to(device=hidden_states.device, dtype=hidden_states.dtype, copy=True)


def pull_back(
    model: PreTrainedModel,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    gradient: Tensor,
) -> Tensor:
    """A trunk's exact vector-Jacobian product: run it again with a graph, keep nothing; shapes as in `run_trunk`."""
    kwargs: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    with torch.enable_grad():
        embeds = hidden_states.detach().to(device=model.device, dtype=model.dtype).requires_grad_()
        out: Tensor = model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)[0]
        (pulled,) = torch.autograd.grad(out, embeds, gradient.to(device=out.device, dtype=out.dtype))
    return pulled.to(device=hidden_states.device, dtype=hidden_states.dtype)
