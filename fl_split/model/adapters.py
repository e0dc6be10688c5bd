"""LoRA adapters of the ends, and a classifier's head: attach them, tell private from shared, export them.

Module names of the ends are those of the full model, so their PEFT adapter *is* an adapter of the full model.
What leaves the node: `shared_state` decides it, by name, and nothing else reads adapter weights for a reply.
"""

import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fl_split.config import Aggregation, Lora, Share
from fl_split.errors import ConfigError, NodeStateError
from fl_split.model.ends import head_of
from fl_split.model.loading import boundaries_of, layer_of

Part = Literal["bottom", "trunk", "top"]
PARTS: tuple[Part, ...] = ("bottom", "top")  # that have adapters
Variant = Literal["lora", "rslora", "dora"]


def attach(ends: PreTrainedModel, lora: Lora, *, train_bottom: bool, seed: int) -> PeftModel:
    """Put LoRA on the layers that a node holds and can train; a classifier's head is trained whole, in float32.

    Args:
        ends: From `load_ends`; mutated.
        lora: Variant, rank, alpha, dropout and target modules.
        train_bottom: False leaves the bottom without an adapter, for ``surrogate.kind = "none"``, which gives it no
            gradient: never an adapter that cannot learn.
        seed: Of the initial A; B starts at zero. The same on every node, so that all start from the same adapter.

    Raises:
        ConfigError: `lora.target-modules` names nothing in these layers.
    """
    cut = boundaries_of(ends)
    layers = [*(cut.bottom if train_bottom else ()), *cut.top]
    linear = _linear_modules(ends, layers)
    head = head_of(ends)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        target_modules=_target_modules(linear, ends.config.model_type, lora.target_modules),
        fan_in_fan_out=Conv1D in linear.values(),
        layers_to_transform=layers,
        layers_pattern=cut.layers_name,
        modules_to_save=list(head) or None,
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks for it
            model = cast(PeftModel, get_peft_model(ends, config, low_cpu_mem_usage=ends.device.type == "meta"))
    for module in _heads(model):  # PEFT makes LoRA float32 on a base in bfloat16, but not these
        module.modules_to_save.float()
        module.register_forward_pre_hook(_to_float32)
    if ends.device.type != "meta":
        load_adapter_state(model, fresh_state(adapter_shapes(model), seed))
    return model


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def adapter_shapes(model: PeftModel) -> dict[str, torch.Size]:
    """Names and shapes of the adapter's weights, in a fixed order; on the meta device as well."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].shape for name in sorted(state)}


def fresh_state(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """A new adapter's A and B, from names and shapes alone: the server can have it without the model's weights.

    A is uniform with bound 1 / sqrt(in), PEFT's own choice; B is zero. Nodes of another rank share the first rows.
    """
    state = {}
    for name, shape in shapes.items():
        if ".lora_A." in name:
            rows = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            state[name] = torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=rows)
        elif ".lora_B." in name:
            state[name] = torch.zeros(shape)
    return state


def _linear_modules(ends: PreTrainedModel, layers: list[int]) -> dict[str, type[nn.Module]]:
    """Find the linear modules inside the layers: the last part of their names, and their class."""
    stack = ends.base_model.get_submodule(boundaries_of(ends).layers_path)
    found = {
        path.rsplit(".", 1)[-1]: type(module)
        for i in layers
        for path, module in stack.get_submodule(str(i)).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return {name: kind for name, kind in found.items() if not _means_experts(ends, name)}


def _means_experts(ends: PreTrainedModel, name: str) -> bool:
    """Tell whether PEFT would take the name for the experts of *all* layers, as it was in old models, the trunk's too.

    It does so in some mixtures of experts whose first layers, or shared experts, have linears of the experts' names.
    """
    trial = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, ends, None)
    except ValueError:  # one name of several that were fused
        return True
    return bool(trial.target_parameters)


def _target_modules(linear: Iterable[str], model_type: str, wanted: str) -> list[str]:
    """Name the modules to adapt; never by a pattern, which would match other layers of the full model."""
    if wanted == "all-linear":
        return sorted(linear)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in linear]
    if unknown or not names:
        raise ConfigError(
            f"lora.target-modules={wanted!r}: {', '.join(unknown) or '(empty)'} is no linear module to be adapted "
            f"in the layers of this {model_type}; expected 'all-linear' or some of {', '.join(sorted(linear))}"
        )
    return names


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Every adapter weight by PEFT's name for it, in a fixed order, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().clone() for name in sorted(state)}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put weights into an adapter; names that are missing keep their values.

    Raises:
        NodeStateError: A name or a shape that this adapter does not have.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            raise NodeStateError(
                f"adapter weights for {name} {tuple(value.shape)} do not fit this run's adapter "
                f"({tuple(own[name].shape) if name in own else 'no such weight'}): use the run's own lora.* and split.*"
            )
    set_peft_model_state_dict(model, {**own, **state})  # PEFT does without LoRA weights, but not without a head


def part_of(model: PeftModel, name: str) -> Part:
    """Which part of the model a weight belongs to; of the ends, the trunk's are those of the surrogate."""
    cut = boundaries_of(model.get_base_model())
    layer = layer_of(name, cut.layers_name)
    if layer is None:
        return "top"  # outside the layers: the head
    return "bottom" if layer in cut.bottom else "trunk" if layer in cut.trunk else "top"


def is_shared(model: PeftModel, name: str, how: Aggregation) -> bool:
    """Whether an adapter weight leaves the node, by its name.

    Args:
        model: The node's model.
        name: As in `adapter_state`.
        how: `aggregation.share`, `.tensors` and `.share-head`.
    """
    parts = {"none": (), "both": ("bottom", "top")}.get(how.share, (how.share,))
    if part_of(model, name) not in parts:
        return False
    if layer_of(name, boundaries_of(model.get_base_model()).layers_name) is None:  # a classifier's head
        return how.share_head
    return {"both": True, "a-only": ".lora_A." in name, "b-only": ".lora_B." in name}[how.tensors]


def shared_state(model: PeftModel, how: Aggregation, adapter: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of an adapter, by default the model's, that this node gives away; all others are private."""
    own = adapter_state(model) if adapter is None else adapter
    return {name: value for name, value in own.items() if is_shared(model, name, how)}


def freeze_a(model: PeftModel, share: Share) -> None:
    """Keep the A of the shared parts as it began, the same on every node (FFA-LoRA, arXiv 2403.12313).

    The mean of B is then the mean of the products B A, exactly.
    """
    parts = {"both": ("bottom", "top")}.get(share, (share,))
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and part_of(model, name) in parts:
            parameter.requires_grad_(False)


def scaling_of(model: PeftModel) -> float:
    """What B A is multiplied by: alpha / rank, however `mix` weighs it."""
    config = cast(LoraConfig, model.peft_config["default"])
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def add_residual(model: PeftModel, residual: Mapping[str, Tensor]) -> None:
    """Make what other nodes' updates left over part of the model: a second adapter that stays as it is.

    Args:
        model: The node's model; mutated.
        residual: ``<module>.residual_A.weight`` ``[rank, in]`` and ``residual_B`` ``[out, rank]``, ranks as they come.
    """
    if not residual:
        return
    rank = max(value.shape[0 if ".residual_A." in name else 1] for name, value in residual.items())
    own = cast(LoraConfig, model.peft_config["default"])
    plain = replace(
        own, r=rank, lora_alpha=rank, lora_dropout=0.0, use_rslora=False, use_dora=False, modules_to_save=None
    )
    PeftModel.add_adapter(model, "residual", plain)  # not a classifier's own method, which adds a second head
    state = {}
    for name, value in residual.items():
        wide = (0, 0, 0, rank - len(value)) if ".residual_A." in name else (0, rank - value.shape[1])
        state[name.replace(".residual_", ".lora_")] = torch.nn.functional.pad(value, wide)
    set_peft_model_state_dict(model, state, adapter_name="residual")
    cast(LoraModel, model.base_model).set_adapter(["default", "residual"])
    for name, parameter in model.named_parameters():
        if ".residual." in name:
            parameter.requires_grad_(False)


def mix(model: PeftModel, weights: Mapping[Part, float]) -> None:
    """Weigh the residual against the node's own adapter: ``(1 - w) own + w residual``, with a w for each part.

    Args:
        model: With a residual; mutated.
        weights: Of the residual; a part that is not named keeps its own adapter as it is.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = weights.get(part_of(model, f"{name}."), 0.0)
            module.set_scale("default", 1.0 - weight)
            module.set_scale("residual", weight)


def drop_residual(model: PeftModel) -> None:
    """Leave the node's own adapter alone in the model, as it is; mutates the model."""
    if "residual" not in model.peft_config:
        return
    mix(model, {})
    cast(LoraModel, model.base_model).delete_adapter("residual")
    cast(LoraModel, model.base_model).set_adapter("default")


def parameter_groups(model: PeftModel, bottom_lr: float, top_lr: float) -> list[dict[str, object]]:
    """What an optimizer trains, one group for each end that has an adapter."""
    rates = {"bottom": bottom_lr, "top": top_lr}
    groups = []
    for part, lr in rates.items():
        params = [p for name, p in model.named_parameters() if p.requires_grad and part_of(model, name) == part]
        if params:
            groups.append({"params": params, "lr": lr, "name": part})
    return groups


def bottom_parameters(model: PeftModel) -> list[nn.Parameter]:
    """The trained weights of the bottom's adapter."""
    return [p for name, p in model.named_parameters() if p.requires_grad and part_of(model, name) == "bottom"]


def read_export(folder: Path) -> tuple[Lora, dict[str, Tensor]]:
    """An exported adapter's setting and weights.

    Raises:
        NodeStateError: It is no adapter folder.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise NodeStateError(
            f"{folder} holds no adapter ({type(error).__name__}): expected a run's adapter folder"
        ) from error
    targets = ",".join(sorted(config.target_modules))
    variant: Variant = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    lora = Lora(variant=variant, rank=config.r, alpha=float(config.lora_alpha), target_modules=targets)
    return lora, state


def export(model: PeftModel, folder: Path, base_model: str, revision: str = "", card: str = "") -> None:
    """Write a standard PEFT adapter of the full model: ``PeftModel.from_pretrained(full_model, folder)`` loads it.

    Each file is replaced atomically, so that a reader never sees half of one.

    Args:
        model: The node's model.
        folder: Where to.
        base_model: What to name as the adapter's base.
        revision: Of the base on the hub, or "".
        card: Text of the model card.
    """
    name = "default"
    if "residual" in model.peft_config:  # one adapter with both, side by side: exactly their sum
        name = "whole"
        cast(LoraModel, model.base_model).add_weighted_adapter(
            ["default", "residual"], [1.0, 1.0], name, combination_type="cat"
        )
        model.peft_config[name].use_rslora = False  # type: ignore[attr-defined]  # "cat" has scaled A already
        for head in _heads(model):
            head.update(name)  # type: ignore[no-untyped-call]
            head.modules_to_save[name].load_state_dict(head.modules_to_save["default"].state_dict())
    config = model.peft_config[name]
    config.base_model_name_or_path, config.revision = base_model, revision or None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False, selected_adapters=[name])
        (Path(scratch) / "README.md").write_text(card)
        for file in (*Path(scratch).glob("*.*"), *Path(scratch, name).glob("*.*")):
            os.replace(file, folder / file.name)
    if name != "default":
        for head in _heads(model):  # PEFT would make both LoRA adapters active here, and a head has one only
            head.delete_adapter(name, ["default"])
        model.delete_adapter(name)


def _heads(model: PeftModel) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
