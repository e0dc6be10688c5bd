"""Numbers as whole steps in a ring of 64 bits, in which sums of masked numbers come out to the step.

Data path: shared arrays -> **ring** -> masks (`node.masks`) -> reply -> sum (`server.secure`) -> **numbers**.
A float32 times a weight below 2^20 is a whole number of steps but for what is smaller than a step; sums are exact.
"""

from typing import Any

import numpy as np
from torch import Tensor

from fl_split.errors import AggregationError

Ring = np.ndarray[Any, np.dtype[np.int64]]

STEP = 2.0**-32
_RANGE = 2.0**31  # of a sum, above and below 0
WEIGHT = "secure-weight"  # name of the array that carries a node's weight


def to_ring(name: str, values: Tensor, weight: int, num_nodes: int) -> Ring:
    """A node's weighted values in steps.

    Raises:
        AggregationError: The nodes' sum could leave the ring's range, or a value is not finite.
    """
    weighted = values.detach().double().cpu().numpy() * weight
    bound = _RANGE / num_nodes
    if not bool((np.abs(weighted) < bound).all()):  # nor is it for NaN
        raise AggregationError(
            f"{name} times this node's weight is not below {bound:g} everywhere, so that the sum of {num_nodes} nodes "
            "could wrap round: lower train.bottom-lr and train.top-lr, or set aggregation.weighting='equal'"
        )
    steps: Ring = np.rint(weighted / STEP).astype(np.int64)
    return steps


def add(rings: list[Ring]) -> Ring:
    """The sum in the ring, in which what is too large wraps round."""
    total = np.zeros(rings[0].shape, dtype=np.uint64)
    for ring in rings:
        total += ring.astype(np.int64, copy=False).view(np.uint64)
    return total.view(np.int64)


def from_ring(steps: Ring) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers out of steps."""
    return steps.astype(np.float64) * STEP
