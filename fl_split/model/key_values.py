"""Keys and values of a trunk's layers, for generation: kept per sequence, gathered for one forward pass.

Data path: new hidden states of several sequences -> **layers, with what each sequence has kept** -> hidden states.

Sequences of a pass may have different pasts and different numbers of new tokens: all end at the same column, as with
padding on the left, so that distances between tokens, and with them sliding windows, are those of each one alone.
"""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from fl_split.model.family import CANNOT_RUN

_TOLERANCE = 0.1  # of the difference that the past makes; what rounding makes is far below


class KeyValues:
    """Keys and values of some sequences in all layers that keep any, with room for `capacity` tokens each."""

    def __init__(self, num_sequences: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * num_sequences  # tokens kept of each sequence
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # each [sequences, heads, capacity, head_dim]

    @property
    def size_bytes(self) -> int:
        """Of all tensors; 0 before the first pass."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's tensors, made at first in the form of `keys` and `values`, ``[_, heads, _, head_dim]``."""
        if index not in self._layers:
            shapes = [(len(self.lengths), t.shape[1], self.capacity, t.shape[3]) for t in (keys, values)]
            self._layers[index] = (keys.new_empty(shapes[0]), values.new_empty(shapes[1]))
        return self._layers[index]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first so many tokens of each sequence; never more than it has."""
        self.lengths = [min(old, new) for old, new in zip(self.lengths, lengths, strict=True)]

    def reorder(self, sources: Sequence[int]) -> None:
        """Let sequence i go on from what sequence ``sources[i]`` has kept; as many as before."""
        index, longest = torch.tensor(sources), max(self.lengths)
        with torch.inference_mode():  # in which they were made
            for tensor in itertools.chain.from_iterable(self._layers.values()):
                tensor[:, :, :longest] = tensor[index.to(tensor.device), :, :longest]
        self.lengths = [self.lengths[source] for source in sources]


@dataclass(frozen=True)
class NewTokens:
    """One sequence's new tokens: ``rows`` is ``[tokens, hidden]``, ``positions`` ``[tokens]`` or None to count on."""

    kept: KeyValues
    sequence: int
    rows: Tensor
    positions: Tensor | None = None

    @property
    def past(self) -> int:
        """Tokens of the sequence that are kept."""
        return self.kept.lengths[self.sequence]

    @property
    def end(self) -> int:
        """Its tokens once these are in."""
        return self.past + len(self.rows)


class _PassCache(Cache):
    """What the layers take for their cache in one pass."""

    def __init__(self, parts: Sequence[NewTokens]) -> None:
        super().__init__(layers=[DynamicLayer()])  # says that it is no sliding one; it holds nothing
        self._parts = parts
        self._width = max(len(part.rows) for part in parts)
        self._total = max(part.end for part in parts)
        kept = parts[0].kept
        self._whole = (
            all(part.kept is kept for part in parts)
            and [part.sequence for part in parts] == list(range(len(kept.lengths)))
            and len({(part.past, part.end) for part in parts}) == 1
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what is new, ``[parts, heads, width, head_dim]``; returns all, ``[parts, heads, total, head_dim]``."""
        both = (key_states, value_states)
        if self._whole:
            past, end = self._parts[0].past, self._parts[0].end
            stored = self._parts[0].kept.layer(layer_idx, *both)
            for tensor, new in zip(stored, both, strict=True):
                tensor[:, :, past:end] = new
            return stored[0][:, :, :end], stored[1][:, :, :end]
        gathered = [t.new_zeros(len(self._parts), t.shape[1], self._total, t.shape[3]) for t in both]
        for i, part in enumerate(self._parts):
            stored, n = part.kept.layer(layer_idx, *both), len(part.rows)
            for out, tensor, new in zip(gathered, stored, both, strict=True):
                mine = tensor[part.sequence]
                mine[:, part.past : part.end] = new[i, :, self._width - n :]
                out[i, :, self._total - part.end :] = mine[:, : part.end]
        return gathered[0], gathered[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the new ones."""
        return self._total - self._width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All columns, from the first on."""
        return self._total, 0


def run_pass(model: PreTrainedModel, parts: Sequence[NewTokens]) -> list[Tensor]:
    """Run a trunk's layers over new tokens of some sequences, each at most once, and keep their keys and values.

    There must be room: ``part.end`` at most its capacity.

    Returns:
        Of each part ``[tokens, hidden]``, in the dtype and on the device of its rows.
    """
    width, total = max(len(part.rows) for part in parts), max(part.end for part in parts)
    hidden_states = torch.zeros(len(parts), width, parts[0].rows.shape[1], dtype=model.dtype)
    positions = torch.zeros(len(parts), width, dtype=torch.long)
    for i, part in enumerate(parts):
        hidden_states[i, width - len(part.rows) :] = part.rows
        positions[i, width - len(part.rows) :] = (
            torch.arange(part.past, part.end) if part.positions is None else part.positions
        )
    ends = torch.tensor([part.end for part in parts])
    mask = (torch.arange(total)[None] >= total - ends[:, None]).long() if ends.min() < total else None
    takes = inspect.signature(type(model).forward).parameters
    kwargs: dict[str, Any] = {"cache" if "cache" in takes else "past_key_values": _PassCache(parts)}
    if "position_ids" in takes:
        kwargs["position_ids"] = positions.to(model.device)
    if mask is not None:
        kwargs["attention_mask"] = mask.to(model.device)
    with torch.inference_mode():
        out: Tensor = model(inputs_embeds=hidden_states.to(model.device), use_cache=True, **kwargs)[0]
    for part in parts:
        part.kept.lengths[part.sequence] = part.end
    return [out[i, width - len(p.rows) :].to(p.rows, copy=True) for i, p in enumerate(parts)]


def bytes_per_token(model: PreTrainedModel) -> int:
    """What a token's keys and values take in a trunk's layers; 0 if the layers keep something else, or more.

    Found out by trying: two sequences in two passes must give what each gives at once.
    """
    hidden_size = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, hidden_size, generator=generator) for n in (7, 4)]
    kept = KeyValues(2, 8)
    try:
        run_pass(model, [NewTokens(kept, i, r[:-3]) for i, r in enumerate(rows)])
        stepped = run_pass(model, [NewTokens(kept, i, r[-3:]) for i, r in enumerate(rows)])
    except CANNOT_RUN:
        return 0
    for row, found in zip(rows, stepped, strict=True):
        with torch.inference_mode():
            given = row[None].to(device=model.device, dtype=model.dtype)
            whole = model(inputs_embeds=given)[0][0, -3:].to(found)
            alone = model(inputs_embeds=given[:, -3:])[0][0].to(found)
        if not (found - whole).norm() <= _TOLERANCE * (alone - whole).norm():
            return 0
    return kept.size_bytes // (2 * kept.capacity)
