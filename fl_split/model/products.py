"""Adapters as products B A: factors added, multiplied out never, truncated; names of their arrays. Pure functions.

A node's update of a linear is scaling * B A, with scaling = alpha / rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Arrays = Mapping[str, Tensor]  # by name
Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]; they stand for B A

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
RESIDUAL_A, RESIDUAL_B = ".residual_A.weight", ".residual_B.weight"  # what became part of the model

_NEGLIGIBLE = 1e-7  # of the largest singular value: float32 cannot hold less


def are_equal(one: Arrays, other: Arrays) -> bool:
    """Whether two adapters have the same arrays, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def modules(arrays: Arrays) -> list[str]:
    """Names of the modules whose A *and* B are at hand, in order."""
    return [module for module in prefixes(arrays, LORA_A) if module + LORA_B in arrays]


def prefixes(arrays: Arrays, ending: str) -> list[str]:
    """Names of the modules that have an array of this ending, in order."""
    return [name.removesuffix(ending) for name in arrays if name.endswith(ending)]


def add(products: Sequence[Factors]) -> Factors:
    """Factors of a sum of products, exactly: ranks add up."""
    return torch.cat([a.double() for a, _ in products]), torch.cat([b.double() for _, b in products], dim=1)


def truncate(factors: Factors, rank: int | None = None) -> Factors:
    """The best approximation of B A of a rank (Eckart and Young), without ever forming B A.

    Args:
        factors: A ``[any, in]`` and B ``[out, any]``.
        rank: Of the result, or less where `in` or `out` is; None keeps all that float32 can hold, at least 1.

    Returns:
        A with orthonormal rows and B, float32, singular values in descending order.
    """
    a, b = factors
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if rank is None:
        rank = max(1, int((s > _NEGLIGIBLE * s[0]).sum()))
    return (v[:rank] @ q_a.T).float().contiguous(), (q_b @ (u[:, :rank] * s[:rank])).float().contiguous()
