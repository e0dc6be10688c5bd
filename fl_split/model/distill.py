"""A surrogate that learns on the node, from what the trunk answers anyway and from random probes.

Data path: (h1, S(h1), T(h1)) of a training pass -> **the surrogate's own loss and optimizer**.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_split.errors import TrainingError

_PROBE_SIZE = 0.05  # of a random step, over the size of a token's hidden state: above the rounding of the wire


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

        Raises:
            TrainingError: S is no longer finite.
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
        if not math.isfinite(error.item()):
            raise TrainingError(
                "what the surrogate learns is not finite: this round is dropped, and the last good round's surrogate "
                f"and adapter stay; lower surrogate.distill-lr={self.optimizer.param_groups[0]['lr']:g}"
            )
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
    """Make an index of the tokens that are not padding."""
    return slice(None) if attention_mask is None else attention_mask.bool()


def _relative_error(error: Tensor, scale: Tensor) -> Tensor:
    return error.float().square().sum() / scale.float().square().sum().clamp_min(1e-12)
