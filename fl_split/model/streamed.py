"""The trunk's own layers as the surrogate, read from the checkpoint one at a time: an exact gradient nobody else sees.

Data path: bottom -> the trunk's slots: **each of its layers is read, run, dropped** -> join -> top; in backward again,
from the last layer to the first. Of a layer only its input is kept in between. Nothing of it leaves the node.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fl_split.errors import SplitError
from fl_split.model.checkpoint import Place, layer_places, missing_files
from fl_split.model.family import Hole

Read = Callable[[torch.device], dict[str, Tensor]]  # a layer's weights by name, brought to a device


class _Streamed(torch.autograd.Function):
    """Forward keeps a layer's input and no graph; backward runs the layer again, with one."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden_states)
        return run(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            hidden_states = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.run(hidden_states)
        (gradient,) = torch.autograd.grad(out, hidden_states, grad_outputs[0])
        return gradient, None


class StreamedLayer(Hole):
    """A frozen layer whose weights are in memory only while it runs.

    To everybody but its slot it is a hole: no parameters to be moved, counted, saved or adapted.
    """

    def __init__(self, layer: nn.Module, as_tuple: bool, read: Read) -> None:
        """Wrap a layer.

        Args:
            layer: Without weights, on the meta device.
            as_tuple: Whether the family's layers return tuples.
            read: Brings its weights.
        """
        super().__init__(layer, as_tuple)
        self._held = (layer.eval(), read)  # in a tuple, or the layer would be registered as a part of this one

    @property
    def shell(self) -> nn.Module:
        """The layer without its weights."""
        return self._held[0]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, seq, hidden]`` -> the same, in the way that the family's layers return it.

        Raises:
            SplitError: The family's layers take more than hidden states that a gradient would have to flow to.
        """
        if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves((args, kwargs))):
            raise SplitError(
                "surrogate.kind='streamed' cannot be used with this model: its layers take another tensor with a "
                "gradient beside the hidden states; use 'blocks'"
            )

        def run(x: Tensor) -> Tensor:
            layer, read = self._held
            out = functional_call(layer, read(x.device), (x, *args), kwargs)
            return cast(Tensor, out[0] if self.as_tuple else out)

        out: Tensor = _Streamed.apply(hidden_states, run)  # type: ignore[no-untyped-call]
        return super().forward(out)


def stream_layer(
    shell: nn.Module, model: PreTrainedModel, as_tuple: bool, places: dict[str, Place], dtype: torch.dtype
) -> StreamedLayer:
    """Make a layer of a model a streamed one.

    Args:
        shell: The layer on the meta device; mutated.
        model: What it is of.
        as_tuple: Whether the family's layers return tuples.
        places: Where each of its weights lies, from `read_places`.
        dtype: To compute in.
    """
    for module in shell.modules():  # small tables that are in no checkpoint are made anew
        tables = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        module._buffers.update(
            {name: torch.zeros_like(table, device="cpu") for name, table in tables.items() if table is not None}
        )
        if tables:
            model._init_weights(module)
    own = shell.state_dict().keys()
    kept = {name: table for name, table in shell.named_buffers() if name not in own}
    return StreamedLayer(shell, as_tuple, partial(_read, {name: places[name] for name in own}, kept, dtype))


def _read(
    places: dict[str, Place], kept: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    weights = {name: buffer.to(device) for name, buffer in kept.items()}
    for file in {file for file, _ in places.values()}:
        with safe_open(file, "pt") as tensors:  # closed again: pages of an open map would count as memory
            for name, (at, key) in places.items():
                if at == file:
                    tensor: Tensor = tensors.get_tensor(key)
                    weights[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return weights


def read_places(
    folder: Path, layers_name: str, shells: dict[int, nn.Module], model_type: str
) -> dict[int, dict[str, Place]]:
    """Where the weights of layers lie in a checkpoint: by layer, then by name in it.

    Args:
        folder: The checkpoint.
        layers_name: What precedes a layer's index in the names of weights.
        shells: The layers, by their index in the full model.
        model_type: For messages.

    Raises:
        SplitError: Files are not there, or hold the weights in another form than the layers do.
    """
    layers = range(min(shells), max(shells) + 1)
    if missing := missing_files(folder, layers_name, layers):
        raise SplitError(
            f"surrogate.kind='streamed' reads the trunk's layers from the node's own copy of the model, and {folder} "
            f"lacks {len(missing)} files of them, such as {missing[0]}: fetch the whole checkpoint, or use another "
            "surrogate.kind"
        )
    found: dict[int, dict[str, Place]] = {i: {} for i in shells}
    for (i, name), place in layer_places(folder, layers_name, layers).items():
        found[i][name] = place
    for i, shell in shells.items():
        for name, weight in shell.state_dict().items():
            if name not in found[i] or _shape(found[i][name]) != list(weight.shape):
                raise SplitError(
                    f"surrogate.kind='streamed' cannot read layer {i} of this {model_type}: the checkpoint in {folder} "
                    f"lacks {name}, or keeps it in another form; use 'blocks', or have the trunk's part fetched again"
                )
    return found


def _shape(place: Place) -> list[int]:
    with safe_open(place[0], "pt") as tensors:
        shape: list[int] = tensors.get_slice(place[1]).get_shape()
    return shape
