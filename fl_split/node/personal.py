"""What sharing adds to a node's own adapter, which trains alone: as much as helps on examples that are kept apart.

Data path: own adapter, and the one that is shared, after a round of training each -> **weights** -> export.

With `aggregation.personal` a node's adapter is that of a run that shares nothing, bit for bit. Beside it the node
trains a second one, as a run without `aggregation.personal` would: that one begins at what the server made of all
nodes' and is what leaves. The node's model is ``(1 - w) own + w shared``. Each part's w comes from a grid with 0 in
it, chosen on one half of the held-out examples; the other half is what is reported.

Sharing the nodes' own adapters instead, and mixing their mean in, costs no second training, but the mean of what was
trained apart falls behind as training goes on (benchmarks/README.md).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from peft import PeftModel
from torch import Tensor

from fl_split.data.store import Prepared
from fl_split.model import adapters
from fl_split.model.adapters import Part
from fl_split.node.trial import Gain, Losses, gain

logger = logging.getLogger(__name__)

GRID = (0.25, 0.5, 0.75, 1.0)  # beside 0
LEAST = 8  # examples in each half: with fewer, chance chooses


@dataclass(frozen=True)
class Worth:
    """What came of it."""

    weights: Mapping[Part, float] = field(default_factory=dict)  # of what is shared; empty: the own adapter alone
    gain: Gain = Gain()  # of the mixture over the own adapter alone, on examples that chose nothing

    def record(self) -> dict[str, float]:
        """As metrics."""
        weights = {f"shared-weight-{part}": self.weights.get(part, 0.0) for part in ("bottom", "top")}
        return {**weights, "gain-over-alone": self.gain.mean, "gain-over-alone-error": self.gain.error}


def halves(heldout: Prepared) -> tuple[Prepared, Prepared]:
    """Examples to choose by, and examples to report on; equal rows are in one half, and each row stays in its own.

    The first half is empty where either would be too small.
    """
    chooses = (heldout.keys & np.uint64(1)).astype(bool)  # a bit that has not decided what is held out
    if min(chooses.sum(), (~chooses).sum()) < LEAST:
        return heldout[:0], heldout
    return heldout.take(np.flatnonzero(chooses)), heldout.take(np.flatnonzero(~chooses))


def weigh(
    model: PeftModel, shared: Mapping[str, Tensor], parts: Sequence[Part], alone: Losses, measure: Callable[[], Losses]
) -> tuple[dict[Part, float], Losses]:
    """Choose how much of what is shared to take, and leave the model so.

    Args:
        model: The node's, with its own adapter; mutated: the shared one stays in it, unless it does not help.
        shared: As `adapters.add_residual` takes it.
        parts: Which have adapters; first one weight for all, then one for the first.
        alone: Losses of the examples to choose by, with the own adapter alone.
        measure: The same, with the model as it stands.

    Returns:
        Each part's weight, none if nothing is better than the own adapter alone by more than one standard error; and
        the losses of the model as it is left.
    """
    adapters.add_residual(model, shared)
    chosen: dict[Part, float] = {}
    best, least = Gain(), alone
    for group in (parts, parts[:1])[: len(parts)]:
        start = dict(chosen)
        for weight in (0.0, *GRID):
            weights = {**start, **dict.fromkeys(group, weight)}
            if not any(weights.values()) or weights == start:
                continue
            adapters.mix(model, weights)
            losses = measure()
            if (found := gain(alone, losses)).mean > best.mean:
                best, chosen, least = found, weights, losses
    if best.mean <= best.error:
        adapters.drop_residual(model)
        return {}, alone
    adapters.mix(model, chosen)
    return chosen, least


def explain(worth: Worth) -> str:
    """Say what came of it; for the node's own eyes."""
    if not worth.weights:
        return "what is shared adds nothing sure to this node's own adapter: it stays alone"
    weights = ", ".join(f"{weight:g} of the {part}" for part, weight in sorted(worth.weights.items()))
    return (
        f"the shared adapter is {weights}: the held-out loss is lower by {worth.gain.mean:.4f} (standard error "
        f"{worth.gain.error:.4f}) than with this node's own alone"
    )
