"""Whether examples laid end to end are kept apart by a model: shown on the model at hand, never assumed."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fl_split.errors import SplitError
from fl_split.model.slots import offline

_LENGTHS = (5, 9)  # tokens of two random examples
_TOLERANCE = 0.1  # of the difference that sharing attention makes; what rounding makes is far below


def check_packing(ends: PreTrainedModel) -> None:
    """Run two random examples through the node's own layers, alone and packed; nothing leaves the node.

    The trunk needs no check: it gets packed examples as sequences of their own (`wire.pack_batch`).

    Raises:
        SplitError: The examples see each other.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ends.config.vocab_size, (1, sum(_LENGTHS)), generator=generator).to(ends.device)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(ends.device)

    def last(**inputs: Tensor) -> Tensor:
        return cast(Tensor, ends(**inputs).logits)[0, -1].float()

    alone = offline(ends, lambda: last(input_ids=ids[:, _LENGTHS[0] :]))
    packed = offline(ends, lambda: last(input_ids=ids, position_ids=positions))
    mixed = offline(ends, lambda: last(input_ids=ids))
    if (packed - alone).norm() > _TOLERANCE * (mixed - alone).norm():
        raise SplitError(
            f"data.packing=true is not exact for {ends.config.model_type}: packed examples would see each other; set "
            "data.packing=false, and data.group-by-length=true for less padding"
        )
