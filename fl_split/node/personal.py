"""What the others' adapters add to a node's own, which trains alone: as much as helps on examples that are kept apart.

Data path: own adapter after its round, mean of the nodes' adapters after the last -> **weights** -> export.

With `aggregation.personal` a node's adapter is that of a run that shares nothing, bit for bit. What the server made of
all adapters is beside it and never trained, and the node's model is ``(1 - w) own + w mean``. Each part's w comes from
a grid with 0 in it, chosen on one half of the held-out examples; the other half is what is reported. That the node's
own adapter is in the mean as well only rescales w: nothing has to be taken out of it.

Adding the mean to the whole of one's own (``own + w mean``) was worse than alone for every w on the toy of
`benchmarks/`; this was better, and better than training from the mean as well.
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

    weights: Mapping[Part, float] = field(default_factory=dict)  # of the others; empty: the node's own adapter alone
    gain: Gain = Gain()  # of the mixture over the own adapter alone, on examples that chose nothing

    def record(self) -> dict[str, float]:
        """As metrics."""
        weights = {f"others-weight-{part}": self.weights.get(part, 0.0) for part in ("bottom", "top")}
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
    model: PeftModel, others: Mapping[str, Tensor], parts: Sequence[Part], measure: Callable[[], Losses]
) -> tuple[dict[Part, float], Losses]:
    """Choose how much of the others' adapters to take, and leave the model so.

    Args:
        model: The node's, after its round; mutated: the others' adapters stay in it, unless none helps.
        others: Their mean, as `adapters.add_residual` takes it.
        parts: Which are shared; first one weight for all, then one for the first.
        measure: Losses of the examples to choose by.

    Returns:
        Each part's weight, none if nothing is better than the own adapter alone by more than one standard error; and
        the losses of the model as it is left.
    """
    alone = measure()
    adapters.add_residual(model, others)
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
        return "the others' adapters add nothing sure to this node's own: it stays alone"
    weights = ", ".join(f"{weight:g} of the {part}" for part, weight in sorted(worth.weights.items()))
    return (
        f"the others' adapters are {weights}: the held-out loss is lower by {worth.gain.mean:.4f} (standard error "
        f"{worth.gain.error:.4f}) than with this node's own alone"
    )
