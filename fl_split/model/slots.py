"""The way of hidden states from bottom to top: a call that begins at the trunk's first layer and ends at its last.

Data path: bottom -> **first slot starts the call -> the surrogate's layers meanwhile -> last slot joins** -> top.

What leaves the node: what `TrunkCalls.start` hands to the trunk, and nothing else (hidden states after the bottom, or
a random step away from them, the padding mask, position ids).
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fl_split.config import Kind
from fl_split.errors import SplitError
from fl_split.model.distill import Distiller, Probe
from fl_split.model.family import Hole
from fl_split.model.generation import Streams, entry
from fl_split.model.loading import Boundaries
from fl_split.model.surrogate import join, join_exact
from fl_split.model.turns import in_turn


class Trunk(Protocol):
    """Whatever runs the middle layers: a service or a model in this process."""

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Begin one forward pass.

        Args:
            hidden_states: ``[batch, seq, hidden]``, output of the last bottom layer; leaves the node.
            attention_mask: ``[batch, seq]``, 1 for real tokens, or None if all are real.
            position_ids: ``[batch or 1, seq]``, or None for 0, 1, 2, ...

        Returns:
            Output of the last trunk layer, ``[batch, seq, hidden]``, without a graph. Rows of padding are undefined.
        """
        ...


class Nowhere:
    """A trunk of no layers: nothing is sent."""

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Return what came; see `Trunk.start`."""
        done: Future[Tensor] = Future()
        done.set_result(hidden_states)
        return done


class ExactTrunk(Trunk, Protocol):
    """A trunk that also gives gradients, for ``surrogate.kind`` `exact` and `shares`."""

    def vjp(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """Pull dL/dh2 back to dL/dh1; shapes as in `start`.

        **Both leave the node, so the promise is broken**; unless they leave in shares (`node.shares`).
        """
        ...


class TrunkCalls:
    """The calls of one model to its trunk: begun at the trunk's first layer, finished at its last.

    Plain Python, not a module: the model owns it through its slots. What is in flight is kept per thread.
    """

    def __init__(self, trunk: Trunk, kind: Kind, streams: Streams) -> None:
        self.trunk, self.kind, self.streams = trunk, kind, streams
        self.distiller: Distiller | None = None  # trains the kept layers, if set
        self._thread = threading.local()

    def remember(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Note what the model was called with: its layers see only a 4D mask made of it."""
        self._thread.context = (attention_mask, position_ids)

    def start(self, hidden_states: Tensor, training: bool) -> None:
        """Send ``[batch, seq, hidden]`` to the trunk; it computes while the surrogate does."""
        mine, h1 = self._thread, hidden_states.detach()
        mine.start, mine.surrogate, mine.probe = hidden_states, [], None
        mine.pending = in_turn(self.trunk.start(h1, *mine.context))
        mine.distiller = self.distiller if training and hidden_states.requires_grad else None
        if mine.distiller is not None and (step := mine.distiller.probe(h1, mine.context[0])) is not None:
            mine.probe = (h1 + step, self.trunk.start(h1 + step, *mine.context))

    def step(self, hidden_states: Tensor, cache: Cache, layer: int) -> None:
        """Send new tokens ``[batch, seq, hidden]`` to the trunk, which has kept what came before them.

        Raises:
            SplitError: See `Streams.step`; or there would be a gradient to make.
        """
        if hidden_states.requires_grad:
            raise SplitError("there is no gradient through a cache: pass use_cache=False, or use torch.no_grad()")
        mine = self._thread
        mine.start, mine.surrogate, mine.probe, mine.distiller = hidden_states, [], None, None
        mine.pending = Future()
        mine.pending.set_result(self.streams.step(self.trunk, cache, layer, hidden_states, *mine.context))

    def passed(self, layer: Callable[[Tensor], Tensor]) -> None:
        """Note a layer of the surrogate as it was called, so that a probe can take the same way."""
        if self._thread.probe is not None:
            self._thread.surrogate.append(layer)

    def finish(self, surrogate: Tensor) -> Tensor:
        """Wait for the trunk's output and give it the surrogate's Jacobian, ``[batch, seq, hidden]``."""
        mine = self._thread
        hidden_states: Tensor = mine.pending.result()
        start, (mask, positions) = mine.start, mine.context
        if mine.distiller is not None:
            probe = None
            if mine.probe is not None:
                moved, answer = mine.probe
                probe = Probe(moved, reduce(lambda h, layer: layer(h), mine.surrogate, moved), answer.result())
            mine.distiller.observe(start.detach(), surrogate, hidden_states, mask, probe)
        mine.pending = mine.start = mine.surrogate = mine.probe = mine.distiller = None
        if self.kind == "none" or not start.requires_grad:
            return hidden_states
        if self.kind in ("exact", "shares"):
            trunk, h1 = cast(ExactTrunk, self.trunk), start.detach()
            return join_exact(start, hidden_states, lambda gradient: trunk.vjp(h1, mask, positions, gradient))
        return join(surrogate, hidden_states)


class TrunkSlot(Hole):
    """The place of one trunk layer between a node's ends: a hole, or a layer kept as part of the surrogate.

    The first slot starts the call, the last finishes it. A kept layer steps aside when there is no gradient to make.
    """

    def __init__(self, layer: nn.Module, as_tuple: bool, calls: TrunkCalls, index: int, cut: Boundaries) -> None:
        super().__init__(layer, as_tuple)
        self.kept = None if type(layer) is Hole else layer
        self.calls, self.index, self.first, self.last = calls, index, index == cut.first, index == cut.end - 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, seq, hidden]`` -> the same."""
        # by type: the argument is `past_key_values` up to transformers 5.23, `cache` from 5.24 on
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if self.first and cache is not None:
            self.calls.step(hidden_states, cache, self.index)
        elif self.first:
            self.calls.start(hidden_states, self.training)
        if cache is not None:
            register = entry(hidden_states)
            cache.update(register, register, self.index)
        if self.kept is not None and hidden_states.requires_grad:
            layer = partial(self._keep, args, kwargs)
            self.calls.passed(layer)
            hidden_states = layer(hidden_states)
        if self.last:
            hidden_states = self.calls.finish(hidden_states)
        return super().forward(hidden_states)

    def _keep(self, args: Any, kwargs: Any, hidden_states: Tensor) -> Tensor:
        out = cast(nn.Module, self.kept)(hidden_states, *args, **kwargs)
        return cast(Tensor, out[0] if self.as_tuple else out)


def trunk_calls_of(model: nn.Module) -> TrunkCalls:
    """The calls that a node's model, from `ends.load_ends`, makes to its trunk."""
    return cast(TrunkCalls, model.trunk_calls)


@contextmanager
def in_its_place(model: nn.Module, trunk: Trunk) -> Iterator[None]:
    """Put another trunk in the place of a model's own, for a while."""
    calls = trunk_calls_of(model)
    usual, calls.trunk = calls.trunk, trunk
    try:
        yield
    finally:
        calls.trunk = usual


def offline(ends: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Make a call with `Nowhere` in the trunk's place; then all is as it was."""
    training = ends.training
    ends.eval()
    try:
        with in_its_place(ends, Nowhere()), torch.no_grad():
            return call()
    finally:
        ends.train(training)
