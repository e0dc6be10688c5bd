"""The middle of a model, called with the bottom's output; in this process, or behind the service.

Data path: hidden states -> **the trunk's layers, forward only** -> hidden states.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from fl_split.errors import SplitError
from fl_split.model.family import Anatomy, Hole, all_left_out, examine
from fl_split.model.key_values import KeyValues, NewTokens, run_pass
from fl_split.model.loading import Boundaries, ignore_in_checkpoint, list_of_layers, load_around_holes
from fl_split.model.thin import thin_layer
from fl_split.wire import Packed


def load_trunk(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    *,
    dtype: torch.dtype = torch.float32,
    thin: Mapping[int, Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load the middle of a model, to be called with ``inputs_embeds`` = the bottom's output.

    Reads only the weights of its own layers. `options` go to transformers' `from_pretrained`. Layers of which `thin`
    has weights are made of those, and not read: a surrogate in the trunk's place.

    Returns:
        A base model (no head) in eval mode, with `boundaries` as an attribute.

    Raises:
        SplitError: The model cannot be split, or not here, the checkpoint lacks weights, or something outside the
            layers would still change the hidden states.
    """
    config = AutoConfig.from_pretrained(folder)
    anatomy = examine(config, AutoModel)
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    left_out: dict[int, nn.Module] = {}
    thin = thin or {}

    def dig(base: Any) -> None:
        layers = list_of_layers(base, anatomy)
        left_out.update({i: layers[i] for i in thin})
        for i in (*cut.bottom, *cut.top, *thin):
            layers[i] = Hole(layers[i], anatomy.as_tuple)
        for path in anatomy.edges:
            owner, _, name = path.rpartition(".")
            setattr(base.get_submodule(owner), name, Absent())
        if hasattr(base, "embedding_multiplier"):  # Granite scales inputs_embeds itself
            base.embedding_multiplier = 1.0
        base.all_tied_weights_keys = {}
        ignore_in_checkpoint(base, "")

    base, missing = load_around_holes(anatomy.model_class, folder, config, dig, dtype, **options)
    if missing:
        raise SplitError(f"the checkpoint in {folder} lacks weights of the trunk, such as {sorted(missing)[0]}")
    for i, tensors in thin.items():
        list_of_layers(base, anatomy)[i] = thin_layer(left_out[i], tensors)
    base.config.use_cache = False
    base.boundaries = cut
    base.eval().requires_grad_(False)
    _check_edges_neutral(base, anatomy)
    return cast(PreTrainedModel, base)


class LocalTrunk:
    """A trunk in this process, for tests, benchmarks and whoever holds the whole checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Run the trunk now; see `slots.Trunk.start`."""
        done: Future[Tensor] = Future()
        done.set_result(run_trunk(self.model, hidden_states, attention_mask, position_ids))
        return done

    def open(self, packed: Packed, room: int) -> "tuple[LocalStream, Tensor]":
        """Begin to keep keys and values; see `generation.StreamingTrunk`."""
        stream = LocalStream(self.model, len(packed.lengths), room)
        return stream, stream.step(packed)

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """Recompute and pull a gradient back; see `slots.ExactTrunk.vjp`."""
        return pull_back(self.model, hidden_states, attention_mask, position_ids, gradient)


class LocalStream:
    """A `generation.Stream` in this process."""

    def __init__(self, model: PreTrainedModel, num_sequences: int, room: int) -> None:
        self._model, self._kept = model, KeyValues(num_sequences, room)
        self.truncate, self.reorder = self._kept.truncate, self._kept.reorder

    def step(self, packed: Packed) -> Tensor:
        """Run new tokens in one pass."""
        rows = packed.rows.split(packed.lengths)
        places = [None] * len(rows) if packed.positions is None else packed.positions.split(packed.lengths)
        parts = [NewTokens(self._kept, i, rows[i], places[i]) for i, length in enumerate(packed.lengths) if length]
        return torch.cat(run_pass(self._model, parts))

    def close(self) -> None:
        """Nothing to do: dropping it is enough."""


def run_trunk(
    model: PreTrainedModel, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Run a trunk's layers, forward only; shapes as in `slots.Trunk.start`; dtype and device of `hidden_states`."""
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


class Absent(nn.Module):
    """On the trunk, an embedding or a norm that nodes hold: passes hidden states on; to anything else adds 0."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states among the arguments, or a 0-d zero, which keeps dtype and device when added."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                return value
        return torch.zeros(())


def _check_edges_neutral(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse a trunk that, with every layer a hole, does not give back its inputs_embeds bit for bit."""
    layers = list_of_layers(base, anatomy)
    probe = torch.randn(2, 3, base.config.hidden_size, dtype=base.dtype, device=base.device)
    with all_left_out(layers, anatomy.as_tuple), torch.no_grad():
        out = base(inputs_embeds=probe)[0]
    if not torch.equal(probe, out):
        raise SplitError(
            f"{base.config.model_type} cannot be split: something outside its layers changes the hidden states"
        )
