"""Trunks in this process, for `bench_real`: of exact gradients, of gradients in shares, of probes; a recorded one."""

import hashlib
import time
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_split import wire
from fl_split.model.trunk import load_trunk
from fl_split.shares import mask_of, split_gradient, step_of

BOTTOM = 2  # layers of a frozen bottom
MASK_STD = 30.0  # of shares
PROBE_STEP = 0.02  # of a token's root mean square


def as_model(folder: Path, bottom: int, top: int, dtype: torch.dtype) -> Any:
    """The trunk. `eager`: the fused kernel's backward pass is slow on a CPU in bfloat16."""
    return load_trunk(folder, bottom, top, dtype=dtype, attn_implementation="eager")


class ExactTrunk:
    """A trunk in this process that keeps the graph of its last forward pass, for the gradient that may be asked for."""

    def __init__(self, model: Any) -> None:
        self.model, self.keeps_graph = model, False

    def start(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> "Future[Tensor]":
        """See `slots.Trunk.start`."""
        with torch.set_grad_enabled(self.keeps_graph and torch.is_grad_enabled()):
            self.at = h1.to(self.model.dtype).requires_grad_(torch.is_grad_enabled())
            self.out = self.model(inputs_embeds=self.at, attention_mask=attention_mask, position_ids=position_ids)[0]
        done: Future[Tensor] = Future()
        done.set_result(self.out.detach().to(h1.dtype))
        return done

    def vjp(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor) -> Tensor:
        """See `slots.ExactTrunk.vjp`; of the last forward pass."""
        return torch.autograd.grad(self.out, self.at, gradient.to(self.out.dtype))[0].to(h1.dtype)


class SharesTrunk(ExactTrunk):
    """Two trunks in this process that each get a share, as `node.shares` makes it; nothing is hidden here."""

    leak_bits = 0.0

    def vjp(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor) -> Tensor:
        """See `slots.ExactTrunk.vjp`; of the last forward pass."""
        rows, lengths = wire.pack(gradient, attention_mask)
        shares = split_gradient(rows, lengths, MASK_STD)
        self.leak_bits += shares.leak_bits
        masks = (mask_of(shares.seed, MASK_STD, step_of(MASK_STD), *rows.shape), shares.rest)
        padded = [wire.unpack(share, attention_mask, len(h1)) for share in masks]
        pulled = [torch.autograd.grad(self.out, self.at, share, retain_graph=True)[0].double() for share in padded]
        return (sum(pulled) * wire.unpack(shares.norms, attention_mask, len(h1))).to(h1.dtype)


class ProbesTrunk(ExactTrunk):
    """A trunk that runs forward only, on h1 + e v, too: each token's v is credited with its own output's response."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__(model)
        self.count, self.noise = count, torch.Generator().manual_seed(0)

    def vjp(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, gradient: Tensor) -> Tensor:
        """See `slots.ExactTrunk.vjp`; an estimate, unless the graph is kept."""
        if self.keeps_graph:
            return super().vjp(h1, attention_mask, position_ids, gradient)
        step = PROBE_STEP * h1.square().mean(-1, keepdim=True).sqrt()
        step[:, 0] = 0  # all others look at the first token
        estimate = torch.zeros_like(h1)
        with torch.no_grad():
            for _ in range(self.count):
                v = torch.randn(h1.shape, generator=self.noise)
                inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
                response = self.model(inputs_embeds=h1 + step * v, **inputs)[0] - self.out
                estimate += (gradient * response).sum(-1, keepdim=True) * v
        estimate[:, 1:] /= self.count * step[:, 1:]
        return estimate


class RecordedTrunk:
    """What a frozen bottom's trunk says, after every layer that a top may begin at; asked once for each batch."""

    def __init__(self, folder: Path, tops: list[int]) -> None:
        self.trunk = ExactTrunk(as_model(folder, BOTTOM, min(tops), torch.bfloat16))
        num_layers = self.trunk.model.config.num_hidden_layers
        self.kept: dict[tuple[bytes, int], Tensor] = {}
        self.key, self.top, self.seconds = b"", tops[0], 0.0
        layers = self.trunk.model.get_submodule(self.trunk.model.boundaries.layers_path)
        for top in tops:
            layers[num_layers - top].register_forward_pre_hook(partial(self._keep, top))

    def _keep(self, top: int, layer: Any, args: Any) -> None:
        self.kept[self.key, top] = args[0]

    def start(self, h1: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> "Future[Tensor]":
        """See `slots.Trunk.start`."""
        self.key = hashlib.sha256(h1.numpy().tobytes()).digest()
        if (self.key, self.top) not in self.kept:
            started = time.process_time()
            with torch.no_grad():
                self.trunk.start(h1, attention_mask, position_ids)
            self.seconds += time.process_time() - started
        done: Future[Tensor] = Future()
        done.set_result(self.kept[self.key, self.top].to(h1.dtype))
        return done


@cache
def recorded(folder: Path, tops: tuple[int, ...]) -> RecordedTrunk:
    return RecordedTrunk(folder, list(tops))
