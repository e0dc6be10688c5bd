"""Generation with a cache: transformers' own `generate`, with the trunk's keys and values kept by the trunk.

Data path: bottom with its cache -> **new tokens of each sequence -> the stream of this cache** -> top with its cache.

transformers' cache has a place for every layer. At those of the trunk, a *register* is put where keys would be: which
of the stream's sequences a row is. Whatever `generate` does to its cache, such as cropping it after speculation or
reordering beams, it does to the register, and before the next step the stream is made to follow.

What was sent is kept, so that it can be sent again: when a trunk is lost in the middle of an answer, when there are
more tokens than room was reserved for. What leaves the node: hidden states after the bottom, of the prompt *and of the
answer*, one token after another.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fl_split.errors import SplitError
from fl_split.wire import Packed

_PLAIN: tuple[type, ...] = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)
_MORE_TOKENS = 64  # reserved at least beyond what is there, where nobody says how long an answer may be


class StreamLost(Exception):
    """A stream has ended; what it kept is gone."""


class Stream(Protocol):
    """Some sequences whose keys and values a trunk keeps."""

    def step(self, packed: Packed) -> Tensor:
        """Run new tokens: ``packed.lengths`` has an entry per sequence, 0 for none; returns rows of the same shape.

        Raises:
            StreamLost: Open another one.
        """
        ...

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first so many tokens of each sequence."""
        ...

    def reorder(self, sources: Sequence[int]) -> None:
        """Let sequence i go on from sequence ``sources[i]``."""
        ...

    def close(self) -> None:
        """Let the trunk forget it."""
        ...


class StreamingTrunk(Protocol):
    """A trunk that keeps keys and values."""

    def open(self, packed: Packed, room: int) -> tuple[Stream, Tensor]:
        """Open a stream with its first step; `room` is how many tokens a sequence may come to have."""
        ...


class Streams:
    """The streams of one model, one for each cache that is in use; each is closed when its cache is dropped."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type
        self._followers: weakref.WeakKeyDictionary[Cache, _Follower] = weakref.WeakKeyDictionary()
        self._thread = threading.local()

    def watch(self, model: PreTrainedModel) -> None:
        """Learn from `generate`, before it begins, how many tokens it may make: so much room is reserved."""
        prepare: Callable[..., Any] | None = getattr(model, "_prepare_cache_for_generation", None)
        if prepare is None:
            return
        signature = inspect.signature(prepare)

        def prepared(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self._thread.room = int(given.get("max_cache_length", 0)) + 1
            return prepare(*args, **kwargs)

        cast(Any, model)._prepare_cache_for_generation = prepared

    def step(
        self,
        trunk: object,
        cache: Cache,
        layer: int,
        hidden_states: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Run the trunk over new tokens, after what it has kept for this cache.

        Args:
            trunk: A `StreamingTrunk`, unless it keeps nothing.
            cache: That of the pass; its register is followed, but not added to: see `entry`.
            layer: The trunk's first.
            hidden_states: ``[batch, seq, hidden]`` of the new tokens; leaves the node.
            mask: ``[batch, all tokens]`` or ``[batch, seq]``, 1 for real tokens, or None if all are.
            positions: ``[batch or 1, seq]``, or None to count on.

        Returns:
            ``[batch, seq, hidden]``, zeros at padding.

        Raises:
            SplitError: The trunk, the family or the kind of cache cannot do it; says which.
        """
        self._check(trunk, cache, layer)
        columns = cache.get_seq_length(layer)
        follower = self._followers.get(cache)
        if columns == 0:
            if follower is not None:
                follower.close()
            room = self._thread.__dict__.pop("room", 0)
            follower = self._followers[cache] = _Follower(cast(StreamingTrunk, trunk), len(hidden_states), room)
            weakref.finalize(cache, follower.close).atexit = False
        elif follower is None:
            raise SplitError("this cache was not filled by this model, or is a copy: begin with an empty one")
        else:
            register: Tensor = cast(Any, cache.layers[layer]).keys
            follower.follow(register[:, 0, -1, 0].tolist(), columns)
            register.copy_(entry(register).expand_as(register))
        return follower.step(hidden_states, mask, positions)

    def _check(self, trunk: object, cache: Cache, layer: int) -> None:
        kinds = [kind for kind in map(type, (cache, *cache.layers[layer:])) if kind not in _PLAIN]
        if kinds:
            raise SplitError(
                f"generation with a cache does not work across the split for {self._model_type} with "
                f"{kinds[0].__name__}: only the dynamic cache of plain keys and values does; pass use_cache=False"
            )
        if not hasattr(trunk, "open"):
            raise SplitError(f"{type(trunk).__name__} keeps no keys and values: pass use_cache=False")


def entry(hidden_states: Tensor) -> Tensor:
    """What new tokens leave in the register: the number of their row, ``[batch, 1, seq, 1]``."""
    batch, seq = hidden_states.shape[0], hidden_states.shape[-2]
    return torch.arange(batch, device=hidden_states.device).view(batch, 1, 1, 1).expand(batch, 1, seq, 1)


class _Follower:
    """One stream, what was sent on it, and how many columns its cache has, padding included."""

    def __init__(self, trunk: StreamingTrunk, num_sequences: int, room: int) -> None:
        self._trunk, self._room, self._columns = trunk, room, 0
        self._stream: Stream | None = None
        self._sent: list[list[Tensor]] = [[] for _ in range(num_sequences)]  # rows, [tokens, hidden] each
        self._places: list[list[Tensor]] = [[] for _ in range(num_sequences)]  # their positions, [tokens] each

    @property
    def _lengths(self) -> list[int]:
        return [sum(map(len, places)) for places in self._places]

    def follow(self, sources: Sequence[int], columns: int) -> None:
        """Do to the stream what was done to its cache."""
        if list(sources) != list(range(len(self._sent))):
            self._sent = [list(self._sent[source]) for source in sources]
            same_number = len(sources) == len(self._places)
            self._places = [list(self._places[source]) for source in sources]
            if self._stream is not None and same_number:
                self._stream.reorder(sources)
            else:
                self.close()
        if (removed := self._columns - columns) > 0:
            lengths = [max(0, length - removed) for length in self._lengths]
            self._sent = [_first(rows, n) for rows, n in zip(self._sent, lengths, strict=True)]
            self._places = [_first(places, n) for places, n in zip(self._places, lengths, strict=True)]
            if self._stream is not None:
                self._stream.truncate(lengths)
        self._columns = columns

    def step(self, hidden_states: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Run new tokens; see `Streams.step`."""
        batch, seq, hidden_size = hidden_states.shape
        before = self._lengths
        real = self._real(mask, batch, seq)
        rows, lengths = hidden_states[real].cpu(), real.sum(1).tolist()
        if positions is None:
            positions = torch.arange(self._columns, self._columns + seq)[None]
        places = positions.cpu().expand(batch, seq)[real]
        for i, (new, its) in enumerate(zip(rows.split(lengths), places.split(lengths), strict=True)):
            self._sent[i].append(new)
            self._places[i].append(its)
        self._columns += seq
        out = self._run(_packed(rows, lengths, places, before))
        result = hidden_states.new_zeros(batch, seq, hidden_size)
        result[real.to(result.device)] = out.to(result)
        return result

    def _real(self, mask: Tensor | None, batch: int, seq: int) -> Tensor:
        if mask is None:
            return torch.ones(batch, seq, dtype=torch.bool)
        real = mask[:, -seq:].bool().cpu()
        begun = torch.tensor([length > 0 for length in self._lengths])
        if (real.diff(dim=1).logical_and(real[:, :-1])).any() or not real[begun].all():
            raise SplitError("attention_mask has padding after real tokens: generation needs it on the left")
        return real

    def _run(self, new: Packed) -> Tensor:
        needed = max(self._lengths)
        if self._stream is not None and needed <= self._room:
            try:
                return self._stream.step(new)
            except StreamLost:
                self._stream = None
        self.close()
        if needed > self._room:
            self._room = max(2 * needed, needed + _MORE_TOKENS)
        lengths = self._lengths
        rows, places = (torch.cat([t for its in kept for t in its]) for kept in (self._sent, self._places))
        self._stream, out = self._trunk.open(_packed(rows, lengths, places, [0] * len(lengths)), self._room)
        ends = zip(out.split(lengths), new.lengths, strict=True)
        return torch.cat([its[len(its) - n :] for its, n in ends])

    def close(self) -> None:
        """Let the trunk forget the stream; the next step opens another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _packed(rows: Tensor, lengths: list[int], places: Tensor, before: Sequence[int]) -> Packed:
    """Pack rows, with their positions only where these do not count on from what is there."""
    counted = torch.cat([torch.arange(n, n + new) for n, new in zip(before, lengths, strict=True)])
    return Packed(rows, lengths, None if torch.equal(places, counted) else places)


def _first(pieces: Sequence[Tensor], length: int) -> list[Tensor]:
    """Keep the first `length` rows of what `pieces` hold."""
    kept: list[Tensor] = []
    for piece in pieces:
        if length <= 0:
            break
        kept.append(piece[:length])
        length -= len(kept[-1])
    return kept
