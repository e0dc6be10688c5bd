"""The trunk's differentiable stand-in on the node.

Data path: bottom -> wire -> trunk -> wire -> **surrogate joins value and Jacobian** -> top.

The trunk T only runs forward, so dL/dh1 = J_T^T dL/dh2 cannot be had. With a surrogate S on the node,

    h2 = S(h1) + (T(h1) - S(h1)).detach()

has the trunk's value and the surrogate's Jacobian, and ordinary autograd trains the bottom. S never touches
the loss itself: a wrong surrogate makes the bottom learn slowly, not the model compute wrongly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fl_split.config import KindOrAuto
from fl_split.errors import ConfigError


def join(surrogate: Tensor, trunk: Tensor) -> Tensor:
    """Give the trunk's value the surrogate's Jacobian.

    Args:
        surrogate: S(h1), ``[batch, seq, hidden]``, with its graph.
        trunk: T(h1), same shape, without a graph.

    Returns:
        ``[batch, seq, hidden]``: equal to ``trunk`` bit for bit; its gradient is that of ``surrogate``.
    """
    joined: Tensor = _Join.apply(surrogate, trunk)  # type: ignore[no-untyped-call]
    return joined


def join_exact(hidden_states: Tensor, trunk: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
    """Give the trunk's value its own Jacobian. **dL/dh2 leaves the node**: `vjp` gets it.

    Args:
        hidden_states: h1, ``[batch, seq, hidden]``, with its graph.
        trunk: T(h1), same shape, without a graph.
        vjp: Maps dL/dh2 to dL/dh1, both of the same shape.
    """
    joined: Tensor = _JoinExact.apply(hidden_states, trunk, vjp)  # type: ignore[no-untyped-call]
    return joined


def kept_layers(kind: KindOrAuto, count: int, first: int, end: int) -> tuple[int, ...]:
    """Indices of the trunk layers that a node keeps as its surrogate, as they are: the trunk's first ones.

    Its early layers carry the Jacobian: of SmolLM2-135M's 14 middle layers the first 4 give the gradient a cosine of
    0.54, evenly spaced ones 0.16; on a Llama of 12 layers there is hardly a difference (0.80 and 0.79).

    Args:
        kind: ``blocks`` and ``distilled`` keep layers, ``auto`` may; the others keep none.
        count: How many to keep; of ``auto``, at most.
        first: First layer of the trunk.
        end: The layer after its last.

    Raises:
        ConfigError: The trunk has fewer than ``count`` layers, or ``count`` is not positive.
    """
    if kind not in ("auto", "blocks", "distilled"):
        return ()
    depth = end - first
    if kind == "auto":  # nobody asked for so many
        count = min(count, depth)
    if not 1 <= count <= depth:
        raise ConfigError(
            f"surrogate.layers={count} cannot be kept of a trunk of {depth} layers: "
            f"use 1 to {depth}, or surrogate.kind='identity', which keeps none"
        )
    return tuple(range(first, first + count))


class _Join(torch.autograd.Function):
    """The module's formula without its rounding: forward is T(h1) bit for bit, backward goes to S(h1)."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, trunk: Tensor) -> Tensor:
        return trunk.view_as(trunk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _JoinExact(torch.autograd.Function):
    """Forward is T(h1); backward asks whoever holds T for its vector-Jacobian product."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, trunk: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.vjp = vjp
        return trunk.view_as(trunk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.vjp(grad_outputs[0]), None, None
