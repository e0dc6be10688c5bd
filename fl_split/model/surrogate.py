"""The trunk's differentiable stand-in on the node.

Data path: bottom -> wire -> trunk -> wire -> **surrogate joins value and Jacobian** -> top.

The trunk T only runs forward, so dL/dh1 = J_T^T dL/dh2 cannot be had. With a surrogate S on the node,

    h2 = S(h1) + (T(h1) - S(h1)).detach()

has the trunk's value and the surrogate's Jacobian, and ordinary autograd trains the bottom. S never touches
the loss itself: a wrong surrogate makes the bottom learn slowly, not the model compute wrongly.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fl_split.errors import ConfigError, SurrogateError

_PROBE_SIZE = 0.05  # of a random step, over the size of a token's hidden state: above the rounding of the wire

Kind = Literal["none", "identity", "blocks", "distilled", "matched", "exact"]


class _Join(torch.autograd.Function):
    """The formula above without its rounding: forward is T(h1) bit for bit, backward goes to S(h1)."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, trunk: Tensor) -> Tensor:
        return trunk.view_as(trunk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


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


class _JoinExact(torch.autograd.Function):
    """Forward is T(h1); backward asks whoever holds T for its vector-Jacobian product."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, trunk: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.vjp = vjp
        return trunk.view_as(trunk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.vjp(grad_outputs[0]), None, None


def join_exact(hidden_states: Tensor, trunk: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
    """Give the trunk's value its own Jacobian. **dL/dh2 leaves the node**: `vjp` gets it.

    Args:
        hidden_states: h1, ``[batch, seq, hidden]``, with its graph.
        trunk: T(h1), same shape, without a graph.
        vjp: Maps dL/dh2 to dL/dh1, both of the same shape.
    """
    joined: Tensor = _JoinExact.apply(hidden_states, trunk, vjp)  # type: ignore[no-untyped-call]
    return joined


def kept_layers(kind: Kind, count: int, first: int, end: int) -> tuple[int, ...]:
    """Indices of the trunk layers that a node keeps as its surrogate, as they are.

    Args:
        kind: ``blocks`` and ``distilled`` keep layers; the others keep none.
        count: How many to keep, evenly spaced.
        first: First layer of the trunk.
        end: The layer after its last.

    Raises:
        ConfigError: The trunk has fewer than ``count`` layers, or ``count`` is not positive.
    """
    if kind not in ("blocks", "distilled"):
        return ()
    depth = end - first
    if not 1 <= count <= depth:
        raise ConfigError(
            f"surrogate.layers={count} cannot be kept of a trunk of {depth} layers: "
            f"use 1 to {depth}, or surrogate.kind='identity', which keeps none"
        )
    return tuple(first + (2 * i + 1) * depth // (2 * count) for i in range(count))


# ------------------------------------------------------------------------------------------------- thin layers


class LowRank(nn.Module):
    """``x -> B A x + bias``, in place of a linear: ``[..., in]`` -> ``[..., out]``."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B, self.bias)


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a layer by their names in it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of a layer's submodule."""
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, module)


def thin_layer(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a layer of the trunk's class thin: every linear a product of two matrices, all weights from `tensors`.

    Args:
        layer: A layer of the full model, on the meta device; mutated.
        tensors: A thin layer's `state_dict`.

    Raises:
        SurrogateError: The tensors are not those of such a layer.
    """
    for name in linears(layer):
        try:
            a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
        except KeyError as error:
            raise SurrogateError(
                f"the fitted surrogate lacks weights for {name}: fit it again for this model"
            ) from error
        replace(layer, name, LowRank(a, b, tensors.get(f"{name}.bias")))
    try:
        layer.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise SurrogateError("the fitted surrogate's weights do not fit the model's layers: fit it again") from error
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        raise SurrogateError(
            "layers of this model hold buffers that a fitted surrogate lacks: use surrogate.kind='blocks'"
        )
    return layer


def read_card(file: Path) -> dict[str, Any]:
    """What a fitted surrogate says of itself: model digests, layers, budget, cosine reached.

    Raises:
        SurrogateError: It is not a file that ``fl-split surrogate fit`` wrote.
    """
    try:
        with safe_open(file, "pt") as tensors:
            card: dict[str, Any] = json.loads((tensors.metadata() or {})["card"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise SurrogateError(
            f"{file} is not a fitted surrogate ({type(error).__name__}): make one with 'fl-split surrogate fit'"
        ) from error
    return card


def read_thin_layers(file: Path) -> dict[int, dict[str, Tensor]]:
    """The weights of a fitted surrogate, by layer of the full model."""
    layers: dict[int, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():
            layer, _, name = key.partition(".")
            layers.setdefault(int(layer), {})[name] = tensors.get_tensor(key)
    return layers


def check_card(
    card: Mapping[str, Any], *, config_digest: str, weights_digest: str | None, first: int, end: int
) -> None:
    """Refuse a surrogate that was fitted to another trunk.

    Raises:
        SurrogateError: Another model, other weights or other layers; names both.
    """
    if (card["first-layer"], card["end-layer"]) != (first, end):
        raise SurrogateError(
            f"the surrogate was fitted to layers {card['first-layer']} to {card['end-layer'] - 1}, this run's trunk "
            f"holds {first} to {end - 1}: fit one for this split"
        )
    if card["config-digest"] != config_digest or weights_digest not in (None, card["weights-digest"]):
        raise SurrogateError(
            f"the surrogate was fitted to another model (config {card['config-digest'][:12]}, weights "
            f"{card['weights-digest'][:12]}) than this run's (config {config_digest[:12]}, weights "
            f"{(weights_digest or 'unknown')[:12]}): fit one for this model"
        )


# ------------------------------------------------------------------------------------------------ distillation


@dataclass(frozen=True)
class Probe:
    """What surrogate and trunk made of hidden states a random step away from h1, ``[batch, seq, hidden]`` each."""

    moved: Tensor  # h1 + step
    surrogate: Tensor  # S(h1 + step), with its graph
    trunk: Tensor  # T(h1 + step)


class Distiller:
    """Trains kept layers on what the trunk's calls return anyway, and on random probes if asked to.

    It minimises ``||S(h1) - h2||^2 / ||h2 - h1||^2``, and for a probe with the random step v, with D(f) =
    f(h1 + v) - f(h1), ``||D(S) - D(T)||^2 / ||D(T) - v||^2``: over random v that is the error of S's Jacobian, which
    is what the bottom's gradient needs. The task loss never moves S: it would bend the stand-in towards the labels and
    away from the trunk. Its optimizer is its own; its state stays on the node's disk.

    **What leaves the node**: for a probe, h1 + v beside h1. v is drawn at random and scaled by h1's size alone, so it
    says nothing that h1 does not say. A step along a gradient, or along anything that was computed from labels, would
    give that gradient away, however useful it would be; no such step is ever sent.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float, probe_every: int = 0) -> None:
        """Begin.

        Args:
            parameters: S's weights by name.
            lr: AdamW's rate.
            probe_every: Probe at every so many forward passes, which costs one more call to the trunk; 0: never.
        """
        self.parameters = dict(parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=0.0)
        self.probe_every, self._passes = probe_every, 0
        self._gradients: list[Tensor] = []
        self.value_error = self.slope_error = float("nan")  # of the newest batch, of the newest probe

    def probe(self, start: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """A random step away from h1, ``[batch, seq, hidden]``, where it is time for one."""
        self._passes += 1
        if not self.probe_every or self._passes % self.probe_every:
            return None
        norms = start.float().norm(dim=-1)[_real(attention_mask)]
        # The median, since single tokens of large models have hidden states a thousand times as large as the rest.
        step: Tensor = torch.randn_like(start) * (_PROBE_SIZE * norms.median() / math.sqrt(start.shape[-1]))
        return step if attention_mask is None else step * attention_mask[..., None]

    def observe(
        self, start: Tensor, surrogate: Tensor, trunk: Tensor, attention_mask: Tensor | None, probe: Probe | None = None
    ) -> None:
        """Add the gradient of one batch; ``[batch, seq, hidden]`` each, the mask ``[batch, seq]``.

        Args:
            start: h1.
            surrogate: S(h1), with its graph, which is kept for the task's backward.
            trunk: h2.
            attention_mask: 1 for real tokens, or None.
            probe: The same a random step away.
        """
        real = _real(attention_mask)
        error = _relative_error((surrogate - trunk)[real], (trunk - start)[real])
        self.value_error = error.item()
        if probe is not None:
            slope = probe.trunk - trunk
            slope_error = _relative_error(
                (probe.surrogate - surrogate - slope)[real], (slope - (probe.moved - start))[real]
            )
            self.slope_error = slope_error.item()
            error = error + slope_error
        gradients = torch.autograd.grad(error, list(self.parameters.values()), retain_graph=True)
        if self._gradients:
            gradients = tuple(a + b for a, b in zip(self._gradients, gradients, strict=True))
        self._gradients = list(gradients)

    def state(self) -> dict[str, Tensor]:
        """S's weights by name; private, like everything that is trained on a node's own text."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    def step(self) -> None:
        """Step S with what was observed since the last step."""
        if not self._gradients:
            return
        for parameter, gradient in zip(self.parameters.values(), self._gradients, strict=True):
            parameter.grad = gradient  # in place of what the task's backward left there
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients = []


def _real(attention_mask: Tensor | None) -> Any:
    """Index of the tokens that are not padding."""
    return slice(None) if attention_mask is None else attention_mask.bool()


def _relative_error(error: Tensor, scale: Tensor) -> Tensor:
    return error.float().square().sum() / scale.float().square().sum().clamp_min(1e-12)
