"""LoRA adapters of a client: attach them, tell private from shared, export them.

A client's module names are those of the full model, so its PEFT adapter *is* an adapter of the full model.
What leaves the node: `shared_state` decides it, by name, and nothing else reads adapter weights for a reply.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fl_split.config import Lora, Share
from fl_split.errors import ConfigError, NodeStateError
from fl_split.split import boundaries_of

Part = Literal["bottom", "trunk", "top"]


def attach(client: PreTrainedModel, lora: Lora, *, train_bottom: bool, seed: int) -> PeftModel:
    """Put LoRA on the layers that a client holds and can train.

    Args:
        client: From `split.load_client`; mutated.
        lora: Rank, alpha, dropout and target modules.
        train_bottom: False leaves the bottom without an adapter, for ``surrogate.kind = "none"``, which gives it no
            gradient: never an adapter that cannot learn.
        seed: Of the initial A; B starts at zero. The same on every node, so that all start from the same adapter.

    Raises:
        ConfigError: `lora.target-modules` names nothing in these layers.
    """
    cut = boundaries_of(client)
    layers = [*(cut.bottom if train_bottom else ()), *cut.top]
    linear = _linear_modules(client, layers)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=_target_modules(linear, client.config.model_type, lora.target_modules),
        fan_in_fan_out=Conv1D in linear.values(),
        layers_to_transform=layers,
        layers_pattern=cut.layers_name,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(client, config))


def _linear_modules(client: PreTrainedModel, layers: list[int]) -> dict[str, type[nn.Module]]:
    """Last name and class of each linear module inside the layers."""
    stack = client.base_model.get_submodule(boundaries_of(client).layers_path)
    return {
        path.rsplit(".", 1)[-1]: type(module)
        for i in layers
        for path, module in stack.get_submodule(str(i)).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _target_modules(linear: Iterable[str], model_type: str, wanted: str) -> list[str]:
    """Names of modules; never a pattern, which would match other layers of the full model."""
    if wanted == "all-linear":
        return sorted(linear)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in linear]
    if unknown or not names:
        raise ConfigError(
            f"lora.target-modules={wanted!r}: no linear module {', '.join(unknown) or '(empty)'} in the layers of this "
            f"{model_type}; expected 'all-linear' or some of {', '.join(sorted(linear))}"
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
    set_peft_model_state_dict(model, dict(state))


def part_of(model: PeftModel, name: str) -> Part:
    """Which part of the model a weight belongs to; on a client, the trunk's are those of its surrogate."""
    cut = boundaries_of(model.get_base_model())
    match = re.search(rf"\.{cut.layers_name}\.(\d+)\.", name)
    if match is None:
        return "top"  # outside the layers: the head
    layer = int(match[1])
    return "bottom" if layer in cut.bottom else "trunk" if layer in cut.trunk else "top"


def shared_state(model: PeftModel, share: Share) -> dict[str, Tensor]:
    """The adapter weights that this node gives away; all others are private.

    Args:
        model: The node's model.
        share: ``none``, ``bottom``, ``top`` or ``both``.
    """
    parts = {"none": (), "both": ("bottom", "top")}.get(share, (share,))
    return {name: value for name, value in adapter_state(model).items() if part_of(model, name) in parts}


def parameter_groups(model: PeftModel, bottom_lr: float, top_lr: float) -> list[dict[str, object]]:
    """What an optimizer trains, one group for each end that has an adapter."""
    rates = {"bottom": bottom_lr, "top": top_lr}
    groups = []
    for part, lr in rates.items():
        params = [p for name, p in model.named_parameters() if p.requires_grad and part_of(model, name) == part]
        if params:
            groups.append({"params": params, "lr": lr, "name": part})
    return groups


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
    return Lora(rank=config.r, alpha=float(config.lora_alpha), target_modules=targets), state


def export(model: PeftModel, folder: Path, base_model: str, revision: str, card: str) -> None:
    """Write a standard PEFT adapter of the full model: ``PeftModel.from_pretrained(full_model, folder)`` loads it.

    Each file is replaced atomically, so that a reader never sees half of one.

    Args:
        model: The node's model.
        folder: Where to.
        base_model: What to name as the adapter's base.
        revision: Of the base on the hub, or "".
        card: Text of the model card.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_model, revision or None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        (Path(scratch) / "README.md").write_text(card)
        for file in Path(scratch).iterdir():
            os.replace(file, folder / file.name)
