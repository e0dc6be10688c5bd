"""A gradient in two shares that each look like noise: what a node makes of dL/dh2, and one half made anew by a trunk.

A vector-Jacobian product is linear in the gradient g, so one trunk may get a mask r, the other g - r, and the answers
add up (P3EFT, arXiv 2412.16669, does this for labels). Each sequence's g is first divided by its norm, which stays on
the node: shares do not tell one gradient's size from another's either. r is normal with standard deviation c (`std`).

**What a share says.** y = u - r with ``|u| <= 1`` and r ~ N(0, c^2 I) is a Gaussian channel: whatever the distribution
of u, it carries at most sum_i log2(1 + E u_i^2 / c^2) / 2 <= ``|u|^2 / (2 ln 2 c^2)`` = 0.72 / c^2 bits a sequence.
Rounding does not add to it: u and r are both whole multiples of one step, so y is the normal channel's output, rounded;
float32 holds it exactly. That u was rounded itself makes ``|u|^2`` a little more than 1; `Shares.leak_bits` counts it.
r by itself says nothing of u.
"""

import hashlib
import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_split.errors import TrainingError

SEED_BYTES = 32
MAX_STD = 4096.0
_PAIRS_AT_ONCE = 2**20  # of numbers in float64, while a mask is made
_LARGEST = 8.7  # standard deviations: of 53 random bits, Box-Muller makes no larger numbers


@dataclass(frozen=True)
class Shares:
    """One gradient, ready for two trunks."""

    seed: bytes  # for the one: `mask_of` makes r of it
    rest: Tensor  # u - r, for the other; float32, [tokens, hidden]
    norms: Tensor  # of each token's sequence: what the sum of both answers is to be multiplied by, [tokens, 1]
    leak_bits: float  # that `rest` carries of the gradient, at most, all sequences together


def split_gradient(gradient: Tensor, lengths: list[int], std: float) -> Shares:
    """Split dL/dh2 ``[sum(lengths), hidden]`` in two.

    Args:
        gradient: Of the tokens of all sequences, one after another.
        lengths: Tokens of each sequence.
        std: Of the mask, in units of a sequence's gradient: larger leaks less and rounds more.

    Raises:
        TrainingError: A number is not finite, which no mask hides.
    """
    seed, step = secrets.token_bytes(SEED_BYTES), step_of(std)
    gradient = gradient.detach().to("cpu", torch.float64)
    norms = torch.stack([part.norm() for part in gradient.split(lengths)]).repeat_interleave(torch.tensor(lengths))
    if not norms.isfinite().all():
        raise TrainingError(
            "the gradient dL/dh2 is not finite, and nothing of it was sent: this round is dropped, and the last good "
            "round's adapter stays; lower train.bottom-lr and train.top-lr"
        )
    unit = gradient / torch.where(norms == 0, 1.0, norms)[:, None] / step
    # Rounded up or down by chance: else the many small numbers of a long sequence would all become 0.
    chance = torch.from_numpy(np.random.Generator(np.random.PCG64(secrets.randbits(128))).random(unit.shape))
    whole = torch.floor(unit + chance)
    leak_bits = float((whole * step).square().sum()) / (2 * math.log(2) * std**2)
    rest = (whole * step - mask_of(seed, std, step, *unit.shape).double()).float()
    return Shares(seed, rest, norms[:, None], leak_bits)


def step_of(std: float) -> float:
    """The step that all numbers of a share are multiples of: the smallest power of 2 with which float32 holds them."""
    return 2.0 ** math.ceil(math.log2((_LARGEST * std + 1) / 2**24))


def mask_of(seed: bytes, std: float, step: float, num_rows: int, hidden_size: int) -> Tensor:
    """The mask r of a seed, float32 ``[num_rows, hidden_size]``, as `trunk.proto` defines it.

    Made of bytes and float64 on the CPU wherever it is used, so both parties have the same.
    """
    pairs = -(-hidden_size // 2)
    chunk = max(1, _PAIRS_AT_ONCE // pairs)
    parts = []
    for first in range(0, num_rows, chunk):
        keys = [seed + row.to_bytes(8, "little") for row in range(first, min(first + chunk, num_rows))]
        data = b"".join(hashlib.shake_256(key).digest(16 * pairs) for key in keys)
        words = torch.from_numpy(((np.frombuffer(data, "<u8") >> 11) + 0.5) * 2.0**-53).view(len(keys), pairs, 2)
        radius, angle = torch.sqrt(-2 * torch.log(words[..., 0])), 2 * math.pi * words[..., 1]
        normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).view(len(keys), -1)
        parts.append((torch.round(normal[:, :hidden_size] * (std / step)) * step).float())
    return torch.cat(parts)


def leak_bits(std: float) -> float:
    """What one share says of one sequence's gradient, at most, in bits."""
    return 1 / (2 * math.log(2) * std**2)
