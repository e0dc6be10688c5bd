"""The base model's bottom, as whoever runs the trunk has it: it is public. And what a node's own bottom would send.

Both run here, in this process; nothing is sent.
"""

import copy
import inspect
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from fl_split import wire
from fl_split.errors import SplitError
from fl_split.model.family import Hole, examine
from fl_split.model.loading import Boundaries, ignore_in_checkpoint, list_of_layers, load_around_holes

_CHUNK = 512  # rows at a time, each with a copy of what came before
_COPIES = 2**15  # tokens of those copies, at most


class Bottom:
    """Embeddings and the first layers, with a cache."""

    def __init__(self, folder: Path, bottom_layers: int, top_layers: int) -> None:
        """Load it from the checkpoint, without the layers behind.

        Raises:
            SplitError: The model cannot be split, or not here, or the checkpoint lacks weights.
        """
        config = AutoConfig.from_pretrained(folder)
        anatomy = examine(config, AutoModel)
        cut = Boundaries.of(anatomy, bottom_layers, top_layers)

        def dig(base: PreTrainedModel) -> None:
            layers = list_of_layers(base, anatomy)
            for i in range(cut.first, cut.num_layers):
                layers[i] = Hole(layers[i], anatomy.as_tuple)
            ignore_in_checkpoint(base, "")

        self._model, missing = load_around_holes(anatomy.model_class, folder, config, dig, torch.float32)
        if missing:
            raise SplitError(f"the checkpoint in {folder} lacks weights of the bottom, such as {sorted(missing)[0]}")
        self._model.eval().requires_grad_(False)
        self._seen: Tensor | None = None
        list_of_layers(self._model, anatomy)[cut.first].register_forward_hook(self._see)

    def _see(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        self._seen = args[0]

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        return int(self._model.config.vocab_size)

    def new_cache(self) -> DynamicCache:
        """What stands for no tokens yet."""
        return DynamicCache(config=self._model.config)

    def row_of(self, cache: DynamicCache, row: int) -> DynamicCache:
        """A cache of one row alone."""
        mine = copy.deepcopy(cache)
        if mine.get_seq_length():
            mine.batch_select_indices(torch.tensor([row]))
        return mine

    @torch.inference_mode()
    def run(self, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Tokens ``[rows, seq]``, after those in `cache`, which grows -> hidden states ``[rows, seq, hidden]``."""
        self._model(input_ids=ids, **with_cache(self._model, cache))
        return cast(Tensor, self._seen)

    def candidates(self, ids: Tensor, cache: DynamicCache) -> Iterator[tuple[slice, Tensor]]:
        """One token more, in each of several ways: ``[rows, ways]`` -> slices of ways, ``[rows, slice, hidden]``."""
        rows, ways = ids.shape
        width = max(1, min(_CHUNK, _COPIES // max(1, cache.get_seq_length())) // rows)
        for start in range(0, ways, width):
            part = slice(start, min(start + width, ways))
            some = ids[:, part]
            mine = copy.deepcopy(cache)
            if mine.get_seq_length():
                mine.batch_repeat_interleave(some.shape[1])
            yield part, self.run(some.reshape(-1, 1), mine).view(rows, some.shape[1], -1)

    def vocabulary(self, context: Tensor) -> Tensor:
        """Every token after one context ``[seq]``, which may be empty: ``[vocabulary, hidden]``."""
        cache = self.new_cache()
        if len(context):
            self.run(context[None], cache)
        ids = torch.arange(self.vocab_size)[None]
        return torch.cat([hidden[0] for _, hidden in self.candidates(ids, cache)])


def with_cache(model: PreTrainedModel, cache: DynamicCache | None) -> dict[str, Any]:
    """The arguments that give a model a cache."""
    if cache is None:
        return {}
    takes = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}  # the latter up to 5.23


class Listener:
    """A `slots.Trunk` that keeps what it is given, and answers with it."""

    def __init__(self) -> None:
        self.heard: list[wire.Packed] = []

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Keep what a trunk would be sent."""
        self.heard.append(wire.pack_batch(hidden_states, attention_mask, position_ids))
        done: Future[Tensor] = Future()
        done.set_result(hidden_states)
        return done


def sent(model: PeftModel, listener: Listener, ids: list[list[int]], wire_dtype: str) -> list[Tensor]:
    """What arrives at the trunk of each example: ``[length, hidden]``, through the encoding of the wire."""
    base, dtype = cast(PreTrainedModel, model.get_base_model()).base_model, wire.NAMES[wire_dtype]
    listener.heard.clear()
    with torch.inference_mode():
        for example in ids:
            base(input_ids=torch.tensor([example]))
    arrived = []
    for packed in listener.heard:
        message = wire.encode_request(packed, dtype)
        rows, hidden_size = packed.rows.shape
        arrived.append(wire.decode_rows(message.hidden_states, dtype, message.outliers, rows, hidden_size).float())
    return arrived
