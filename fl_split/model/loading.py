"""Where a model is cut, and how a party loads its part without ever reading the rest.

The ends and the trunk are ordinary models of the full config in which each layer that a party does not hold is a hole
that passes the hidden states on. Module names, layer indices, masks, rotary tables, checkpoint keys and adapter keys
stay those of the full model, so Hugging Face's own forward and loss, PEFT and `Trainer` work on the ends unchanged.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from fl_split.errors import SplitError
from fl_split.model.family import Anatomy

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # weights in one file, or which of several has them


@dataclass(frozen=True)
class Boundaries:
    """Where a model of `num_layers` layers is cut: bottom ``[0, first)``, trunk ``[first, end)``, top the rest."""

    layers_path: str  # of the list of layers, below the base model
    num_layers: int
    first: int
    end: int

    @classmethod
    def of(cls, anatomy: Anatomy, bottom_layers: int, top_layers: int) -> "Boundaries":
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


def boundaries_of(model: nn.Module) -> Boundaries:
    """Where the ends or a trunk were cut."""
    return cast(Boundaries, model.boundaries)


def layer_of(key: str, layers_name: str) -> int | None:
    """Which layer a weight belongs to, by its name; None for one outside the layers."""
    match = re.search(rf"(?:^|\.){re.escape(layers_name)}\.(\d+)\.", key)
    return int(match[1]) if match else None


def file_of_weights(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint holds which weight; empty if it is not in several.

    Raises:
        SplitError: The index that says so is damaged.
    """
    index = folder / INDEX
    if (folder / WHOLE).is_file() or not index.is_file():  # transformers goes by this order
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise SplitError(
            f"{index} does not say which file holds which weight ({type(error).__name__}): fetch it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that are here: others in its folder, of an adapter or in another format, are none of it."""
    names = set(file_of_weights(folder).values()) or {WHOLE}
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def list_of_layers(base: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    """The layers of a model, to be replaced one by one."""
    layers = base.get_submodule(anatomy.layers_path)
    if not isinstance(layers, nn.ModuleList):
        raise SplitError(f"{anatomy.layers_path} is not a list of layers")
    return layers


def ignore_in_checkpoint(model: PreTrainedModel, pattern: str) -> None:
    """Do not warn that weights matching `pattern` are not used: they belong to another party."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}


def load_around_holes(
    model_class: type[PreTrainedModel],
    folder: Path,
    config: PretrainedConfig,
    dig: Callable[[PreTrainedModel], None],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Any, set[str]]:
    """Load a model that digs its holes as it is built, so that their weights are never read.

    Args:
        model_class: Of the full model.
        folder: Its checkpoint.
        config: Its configuration.
        dig: Puts the holes into a model that was just built.
        dtype: Of the weights.
        options: For transformers' `from_pretrained`.

    Returns:
        The model, and the names of the weights that the checkpoint lacks or has in another shape.

    Raises:
        SplitError: The folder holds no weights that can be loaded.
    """

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        dig(self)

    check_quantized(config)
    # Same name and module as the original: transformers looks up weight conversions by them.
    dug = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    try:
        tensors = _partial_checkpoint(folder)
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
    except SafetensorError as error:
        raise SplitError(f"cannot load {folder}: a safetensors file in it is not complete: fetch it again") from error
    except OSError as error:
        closed = [file.name for file in sorted(folder.glob("*.safetensors")) if not os.access(file, os.R_OK)]
        if closed:
            text = f"this account may not read {', '.join(closed)}: give it the right to (chmod, chown)"
        else:
            text = f"it needs weights in safetensors files ({type(error).__name__})"
        raise SplitError(f"cannot load {folder}: {text}") from error
    model.name_or_path = str(folder)
    return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def check_quantized(config: PretrainedConfig) -> None:
    """Whether the package is there that reads a quantized checkpoint.

    Raises:
        SplitError: It is not.
    """
    how = getattr(config, "quantization_config", None)
    if how is None:
        return
    try:
        AutoHfQuantizer.from_config(how, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError) as error:
        raise SplitError(
            f"this {config.model_type} checkpoint is quantized, and cannot be read here ({type(error).__name__}: "
            f"{error}): install what is missing, or take the checkpoint that is not quantized"
        ) from error


def _partial_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Open the weights at hand, not read yet, if some files of a checkpoint are missing, which another party needs."""
    named, here = set(file_of_weights(folder).values()), weight_files(folder)
    if len(here) >= len(named):
        return None  # transformers reads what it needs
    files: list[Any] = [safe_open(file, "pt") for file in here]
    return {key: file.get_slice(key) for file in files for key in file.keys()}
