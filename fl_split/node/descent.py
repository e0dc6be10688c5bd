"""The descent ratio: does the bottom's update lower the loss as much as the surrogate's gradient promises?

Needs no exact gradient. On a fixed small batch, through the real trunk:

    ratio = (loss before - loss with the bottom's update alone) / -(g_before + g_after) / 2 . (update of the bottom)

with g the surrogate's gradient at both ends of the update (trapezoid rule along it). An exact gradient gives about 1
for small updates; a surrogate whose gradient is too short gives more, and whole rounds bend the path. What counts is
the sign: at 0 or below, the bottom learns nothing.

What leaves the node for this: hidden states of the batch under the bottom before and after a round of ordinary
training, which is what the next pass over the same examples would send anyway. A step along one batch's gradient
would be a sharper probe, and is not made: hidden states on both sides of it would give that gradient to the trunk.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from fl_split.model.adapters import part_of
from fl_split.model.loss import Batch, accumulate

logger = logging.getLogger(__name__)

WINDOW = 3  # rounds over which the bottom has to lower the loss


@dataclass(frozen=True)
class Descent:
    """What a round's update of the bottom did, on the fixed batch; in nats per response token."""

    measured: float  # fall of the loss through the real trunk
    predicted: float  # fall that the surrogate's gradient promised

    @property
    def ratio(self) -> float:
        """About 1 for an exact gradient; 0 where nothing was promised."""
        return self.measured / self.predicted if self.predicted else 0.0


class DescentProbe:
    """Made before a round, asked after it."""

    def __init__(self, model: PeftModel, batch: Batch) -> None:
        """Note the loss and the bottom's gradient before the round: one forward pass, one backward."""
        self._model, self._batch = model, batch
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._bottom = [p for name, p in trained if part_of(model, name) == "bottom"]
        self._top = [p for name, p in trained if part_of(model, name) == "top"]
        self._bottom_before, self._top_before = _copy(self._bottom), _copy(self._top)
        self._loss, self._gradient = self._measure()

    def ask(self) -> Descent:
        """What the bottom's update did, with the top as it was before; leaves the model as it is."""
        top_after = _copy(self._top)
        _put(self._top, self._top_before)
        loss, gradient = self._measure()
        _put(self._top, top_after)
        predicted = 0.0
        for p, before, g0, g1 in zip(self._bottom, self._bottom_before, self._gradient, gradient, strict=True):
            predicted -= ((g0 + g1) / 2 * (p.detach() - before)).sum().item()
        return Descent(self._loss - loss, predicted)

    def _measure(self) -> tuple[float, list[Tensor]]:
        self._model.eval()
        loss = accumulate(self._model, [self._batch])
        gradient = [cast(Tensor, p.grad).clone() for p in self._bottom]
        self._model.zero_grad(set_to_none=True)
        return loss, gradient


def warn_if_stuck(falls: Sequence[float], surrogate: str) -> bool:
    """Say so if the bottom has not lowered the loss over the newest `WINDOW` rounds; returns whether.

    Args:
        falls: `Descent.measured` of each round so far.
        surrogate: Its kind, for the text.
    """
    window = falls[-WINDOW:]
    stuck = len(window) == WINDOW and sum(window) <= 0
    if stuck:
        logger.warning(
            "over %d rounds the bottom's updates have not lowered the loss, but raised it by %.4f in all: with "
            "surrogate.kind=%r, try more surrogate.layers, a 'matched' surrogate, or a smaller train.bottom-lr",
            WINDOW,
            -sum(window),
            surrogate,
        )
    return stuck


def _copy(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _put(parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
