"""What a node needs its trunk to be, and whether a trunk is that."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import AutoConfig, AutoModel

from fl_split import wire
from fl_split.errors import TrunkMismatch
from fl_split.model.checkpoint import config_digest, weights_digest
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries
from fl_split.model.thin import check_card
from fl_split.proto import trunk_pb2 as pb


@dataclass(frozen=True)
class Expected:
    """What a node needs its trunk to be."""

    config_digest: str
    weights_digest: str | None  # None: the node does not have the trunk's part of the checkpoint
    first_layer: int
    end_layer: int
    hidden_size: int

    @classmethod
    def from_checkpoint(cls, folder: Path, bottom_layers: int, top_layers: int) -> Self:
        """Work it out from the node's own copy of the base model.

        Raises:
            SplitError: The model cannot be split here.
        """
        config = AutoConfig.from_pretrained(folder)
        anatomy = examine(config, AutoModel)  # whatever head the node puts on it
        cut = Boundaries.of(anatomy, bottom_layers, top_layers)
        digest = weights_digest(folder, cut.layers_name, cut.trunk)
        return cls(config_digest(config), digest, cut.first, cut.end, config.hidden_size)

    def check_surrogate(self, card: Mapping[str, Any]) -> None:
        """Compare with what a fitted surrogate says of itself.

        Raises:
            SurrogateError: It was fitted to another trunk.
        """
        check_card(
            card,
            config_digest=self.config_digest,
            weights_digest=self.weights_digest,
            first=self.first_layer,
            end=self.end_layer,
        )

    def check(self, reply: pb.DescribeReply, address: str, dtype: pb.DType) -> None:
        """Compare with what a trunk says of itself.

        Raises:
            TrunkMismatch: They differ; names both sides.
        """
        held = (reply.first_layer, reply.end_layer)
        if held != (self.first_layer, self.end_layer):
            raise TrunkMismatch(
                f"the trunk at {address} holds layers {held[0]} to {held[1] - 1}, this node needs {self.first_layer} "
                f"to {self.end_layer - 1}: make split.bottom-layers and split.top-layers the same on both sides"
            )
        if reply.config_digest != self.config_digest or reply.hidden_size != self.hidden_size:
            raise TrunkMismatch(
                f"the trunk at {address} serves another model ({reply.model_type}, config {reply.config_digest[:12]}) "
                f"than this node's (config {self.config_digest[:12]}): set model.name to the one that the trunk serves"
            )
        if self.weights_digest is not None and reply.weights_digest != self.weights_digest:
            raise TrunkMismatch(
                f"the trunk at {address} has other weights ({reply.weights_digest[:12]}) than this node's copy of the "
                f"model ({self.weights_digest[:12]}): use the same checkpoint and model.revision on both sides"
            )
        if dtype not in reply.dtypes:
            raise TrunkMismatch(
                f"the trunk at {address} does not take trunk.wire-dtype={_name(dtype)!r}: "
                f"it takes {', '.join(_name(d) for d in reply.dtypes)}"
            )


def _name(dtype: pb.DType) -> str:
    return next((name for name, value in wire.NAMES.items() if value == dtype), f"dtype {dtype}")
