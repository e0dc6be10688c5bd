"""What a node makes of the arrays that the server sent; the inverse side of `server.aggregation.combine`."""

import torch
from torch import Tensor

from fl_split.config import Combine
from fl_split.model.products import LORA_A, LORA_B, RESIDUAL_A, RESIDUAL_B, Arrays, modules, prefixes


def take(
    received: Arrays, how: Combine, own: Arrays, fresh: Arrays, scaling: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a node makes of the arrays that the server sent: the inverse side of `combine`.

    Args:
        received: From `combine`; empty at the start.
        how: As there.
        own: The node's adapter, whose ranks stay what they are.
        fresh: A new adapter, with B = 0, of the same shapes.
        scaling: alpha / rank of this node.

    Returns:
        New values of some of the adapter's arrays, and the factors of what is to be added to the model itself, by
        module: names without their ending, A first.
    """
    adapter = {name: value for name, value in received.items() if not name.endswith((RESIDUAL_A, RESIDUAL_B))}
    if how == "svd":
        for module in modules(adapter):
            a, b = adapter[module + LORA_A], adapter[module + LORA_B] / scaling
            rank, width = len(own[module + LORA_A]), len(a)
            # more rank than the update has: the rest starts anew, since A = B = 0 would never learn
            adapter[module + LORA_A] = torch.cat([a[:rank], fresh[module + LORA_A][width:]])
            adapter[module + LORA_B] = torch.cat([b[:, :rank], fresh[module + LORA_B][:, width:]], dim=1)
    residual = {name: value for name, value in received.items() if name not in adapter}
    if how == "stack":
        adapter |= {m + end: fresh[m + end] for m in prefixes(residual, RESIDUAL_A) for end in (LORA_A, LORA_B)}
    return adapter, residual


def moved(new: Arrays, old: Arrays) -> dict[str, Tensor]:
    """`new`, with one number moved by a hair if all equal `old`: Flower's clipping divides by the update's norm."""
    same = new.keys() == old.keys() and all(torch.equal(value, old[name]) for name, value in new.items())
    if not new or not same:
        return dict(new)
    name = next(iter(new))
    flat = new[name].clone().flatten()
    flat[0] += max(1e-6 * float(flat[0].abs()), 1e-12)
    return {**new, name: flat.view_as(new[name])}
