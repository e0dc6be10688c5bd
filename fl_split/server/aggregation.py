"""LoRA algebra on named arrays: how the server combines what nodes share. Pure functions.

Data path: shared part of the adapters -> reply -> **combine** -> next round -> **take** on each node.

A node's update of a linear is scaling * B A, with scaling = alpha / rank. `mean` averages A and B apart, as everybody
does, which is not the mean of the products. The others are exact in the product:

* `svd` (FlexLoRA, arXiv 2402.11505): the mean product, factored anew to each node's rank.
* `stack` (FLoRA, arXiv 2409.05976): the mean product becomes part of every node's model as it is; adapters start anew.
* `exact` (FedEx-LoRA, arXiv 2410.09432): A and B are averaged apart, and what the mean product is more than their
  product, the residual, becomes part of every node's model.

What became part of the model travels as two more arrays a module, `residual_A` and `residual_B`, whole in every round,
so that a node that missed rounds is not behind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_split.config import Combine
from fl_split.errors import AggregationError
from fl_split.model.products import (
    LORA_A,
    LORA_B,
    RESIDUAL_A,
    RESIDUAL_B,
    Arrays,
    Factors,
    add,
    modules,
    prefixes,
    truncate,
)


@dataclass(frozen=True)
class Update:
    """What one node shares in one round."""

    arrays: Arrays
    weight: float  # in the mean, above 0
    scaling: float  # alpha / rank, of this node
    node: str = "a node"  # for messages


def combine(updates: Sequence[Update], how: Combine, residual: Arrays | None = None) -> dict[str, Tensor]:
    """The arrays that all nodes get next.

    Args:
        updates: One per node; their order does not matter.
        how: See the module's docstring.
        residual: The last round's result, whose residual the new one adds to (`stack` and `exact`).

    Returns:
        ``lora_A`` ``[rank, in]`` and ``lora_B`` ``[out, rank]`` of each module, and for `stack` and `exact`
        ``residual_A`` and ``residual_B``; arrays that are not LoRA's are averaged. For `svd` the product B A is the
        update itself, with scaling 1 and singular values in descending order; `stack` returns no ``lora_*``.

    Raises:
        AggregationError: No updates, a weight or scaling that is not above 0, arrays that do not belong together.
    """
    check(updates, how)
    others = [name for name in updates[0].arrays if not name.endswith((LORA_A, LORA_B))]
    result = {name: _mean(updates, name) for name in others}
    if how in ("mean", "exact"):
        result |= {name: _mean(updates, name) for name in updates[0].arrays if name not in result}
    if how == "mean":
        return result
    for module in modules(updates[0].arrays):
        product = mean_product(updates, module)
        if how == "svd":
            largest = max(len(u.arrays[module + LORA_A]) for u in updates)
            result[module + LORA_A], result[module + LORA_B] = truncate(product, largest)
            continue
        parts = [product]
        if residual and module + RESIDUAL_A in residual:
            parts.append((residual[module + RESIDUAL_A], residual[module + RESIDUAL_B]))
        if how == "exact":
            parts.append((result[module + LORA_A], -updates[0].scaling * result[module + LORA_B]))
        result[module + RESIDUAL_A], result[module + RESIDUAL_B] = truncate(add(parts))
    return result


def mean_product(updates: Sequence[Update], module: str) -> Factors:
    """Weighted mean of scaling * B A over the nodes, as factors ``[sum of ranks, in]`` and ``[out, sum of ranks]``."""
    total = sum(u.weight for u in updates)
    return add([(u.arrays[module + LORA_A], u.weight / total * u.scaling * u.arrays[module + LORA_B]) for u in updates])


def check(updates: Sequence[Update], how: Combine) -> None:
    """Refuse updates that do not belong together, naming the node.

    Raises:
        AggregationError: See `combine`.
    """
    if not updates:
        raise AggregationError("there is nothing to combine: no node shared anything")
    first = updates[0]
    for update in updates:
        if not 0 < update.weight < float("inf") or not 0 < update.scaling < float("inf"):
            raise AggregationError(
                f"{update.node} shares an adapter with weight {update.weight} and alpha/rank {update.scaling}: "
                "both must be numbers above 0"
            )
        if update.arrays.keys() != first.arrays.keys():
            odd = sorted(update.arrays.keys() ^ first.arrays.keys())[0]
            raise AggregationError(f"{update.node} and {first.node} share different arrays, such as {odd}")
        if how in ("mean", "exact") and update.scaling != first.scaling:
            raise AggregationError(
                f"alpha/rank is {update.scaling:g} on {update.node} and {first.scaling:g} on {first.node}: "
                f"aggregation.combine={how!r} averages A and B apart and needs them equal; use 'svd' or 'stack'"
            )
        for name, value in update.arrays.items():
            other = first.arrays[name].shape
            free = how in ("svd", "stack") and name.endswith((LORA_A, LORA_B))
            axis = 0 if name.endswith(LORA_A) else 1
            kept = [s for i, s in enumerate(value.shape) if not (free and i == axis)]
            expected = [s for i, s in enumerate(other) if not (free and i == axis)]
            if kept != expected:
                raise AggregationError(
                    f"{name} is {tuple(value.shape)} on {update.node} and {tuple(other)} on {first.node}: "
                    + ("only ranks may differ" if free else "different ranks need aggregation.combine 'svd' or 'stack'")
                )
        for module in prefixes(update.arrays, LORA_A) if how != "mean" else ():
            if (
                module + LORA_B not in update.arrays
                or update.arrays[module + LORA_A].shape[0] != (update.arrays[module + LORA_B].shape[1])
            ):
                raise AggregationError(f"{module} of {update.node} has an A without a B of the same rank")


def check_scaling(updates: Sequence[Update], alpha: float, by_root: bool) -> None:
    """Refuse an update whose scaling is not what the run's alpha and the node's rank make, naming the node.

    Args:
        updates: Ranks are taken from the shapes of their arrays.
        alpha: `lora.alpha`, the same on all nodes.
        by_root: Scaling is alpha / sqrt(rank), as in rsLoRA.

    Raises:
        AggregationError: The scaling is another.
    """
    for update in updates:
        ranks = {value.shape[0] for name, value in update.arrays.items() if name.endswith(LORA_A)}
        ranks |= {value.shape[1] for name, value in update.arrays.items() if name.endswith(LORA_B)}
        for rank in sorted(ranks):
            expected = alpha / (math.sqrt(rank) if by_root else rank)
            if not math.isclose(update.scaling, expected, rel_tol=1e-6):
                raise AggregationError(
                    f"{update.node} says that alpha/rank is {update.scaling:g}, but lora.alpha={alpha:g} and its "
                    f"adapter of rank {rank} make it {expected:g}: run the same version of fl-split on all nodes"
                )


def _mean(updates: Sequence[Update], name: str) -> Tensor:
    total = sum(u.weight for u in updates)
    mean = sum(u.weight / total * u.arrays[name].double() for u in updates)
    return torch.as_tensor(mean).to(updates[0].arrays[name].dtype)
