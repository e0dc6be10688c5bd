"""What a node makes of the arrays that the server sent; the inverse side of `server.aggregation.combine`.

Data path: what the server combined -> **this node's adapter** -> local round.
"""

import torch
from peft import PeftModel
from torch import Tensor

from fl_split.config import Combine
from fl_split.model import adapters
from fl_split.model.products import LORA_A, LORA_B, RESIDUAL_A, RESIDUAL_B, Arrays, add, are_equal, modules, prefixes
from fl_split.node.train import forget_moments


def receive(model: PeftModel, optimizer: torch.optim.Optimizer, received: Arrays, how: Combine, seed: int) -> None:
    """Put what the server made of the nodes' shared weights into this node's model; mutates model and optimizer.

    Args:
        model: The node's, as its own last round left it.
        optimizer: It forgets the moments of weights that were factored anew or begin anew.
        received: From the server's `combine`; empty at the start.
        how: `aggregation.combine`.
        seed: Of adapters that begin anew.
    """
    fresh = adapters.fresh_state(adapters.adapter_shapes(model), seed)
    taken, residual = take(received, how, adapters.adapter_state(model), fresh, adapters.scaling_of(model))
    adapters.load_adapter_state(model, taken)
    adapters.add_residual(model, residual)
    if how in ("svd", "stack"):  # other directions than those that the optimizer remembers
        forget_moments(model, optimizer, taken)


def take(
    received: Arrays, how: Combine, own: Arrays, fresh: Arrays, scaling: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Work out a node's next adapter from the arrays that the server sent.

    Args:
        received: From `combine`; empty at the start.
        how: As there.
        own: The node's adapter, whose ranks stay what they are.
        fresh: A new adapter, with B = 0, of the same shapes.
        scaling: alpha / rank of this node.

    Returns:
        New values of some of the adapter's arrays; and the arrays, ``residual_A`` and ``residual_B`` of each module, of
        what is to be added to the model itself.
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


def products(adapter: Arrays, scaling: float) -> dict[str, Tensor]:
    """An adapter and what is part of the model beside it as whole products, of any rank, named as residuals.

    Args:
        adapter: This node's, with residuals where the server sent some.
        scaling: alpha / rank of this node.
    """
    result: dict[str, Tensor] = {}
    for module in prefixes(adapter, LORA_A):
        parts = [(adapter[module + LORA_A], scaling * adapter[module + LORA_B])]
        if module + RESIDUAL_A in adapter:
            parts.append((adapter[module + RESIDUAL_A], adapter[module + RESIDUAL_B]))
        a, b = add(parts)
        result[module + RESIDUAL_A], result[module + RESIDUAL_B] = a.float(), b.float()
    return result


def moved(new: Arrays, old: Arrays) -> dict[str, Tensor]:
    """`new`, with one number moved by a hair if all equal `old`: Flower's clipping divides by the update's norm."""
    if not new or not are_equal(new, old):
        return dict(new)
    name = next(iter(new))
    flat = new[name].clone().flatten()
    flat[0] += max(1e-6 * float(flat[0].abs()), 1e-12)
    return {**new, name: flat.view_as(new[name])}
