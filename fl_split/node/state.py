"""What a node keeps on its own disk between rounds; nobody else reads it.

    <run.dir>/<run.name>/nodes/<partition-id>/    in simulation; on a deployed node <out-dir>/<run.name>/
        adapter/                                  the PEFT export
        state/<run id>/round-0003/                adapter, optimizer, surrogate and numbers as safetensors: private
        examples/                                 the prepared examples: private
        trunk-cache.sqlite                        what the trunk answered, of a frozen bottom: private

A round's folder is written under another name and renamed when complete, so a kill loses no finished round.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_split.errors import NodeStateError
from fl_split.files import KEPT_ROUNDS, Rounds
from fl_split.node.evaluate import Scores

_TENSORS = ("adapter", "optimizer", "surrogate", "surrogate_optimizer")  # of SavedRound, a file each


@dataclass(frozen=True)
class SavedRound:
    """What a node keeps of a finished round, for itself; round 0 is the start."""

    number: int
    adapter: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    surrogate: dict[str, Tensor] = field(default_factory=dict)  # empty unless it is distilled
    surrogate_optimizer: dict[str, Tensor] = field(default_factory=dict)
    falls: list[float] = field(default_factory=list)  # of the loss by the bottom's update, one a round
    scores: dict[str, Scores] = field(default_factory=dict)  # on held-out examples: `base`, `after`, `exported`


class NodeFolder:
    """A node's private results. Nothing in here is read by anybody but the node."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.adapter = root / "adapter"
        self.rounds = Rounds(root / "state" / run_id)

    def load_before(self, server_round: int) -> SavedRound | None:
        """The newest round before `server_round`; None at the start.

        Raises:
            NodeStateError: Later rounds are at hand: a server loses one round at most.
        """
        finished = self.rounds.finished()
        if finished and max(finished) > server_round:
            raise NodeStateError(
                f"this node has finished round {max(finished)} and is asked for round {server_round}: the server's "
                "run folder is older than the node's; start a run with another run.name"
            )
        before = [n for n in finished if n < server_round]
        if not before:
            return None
        number = before[-1]
        files = {name: self.rounds.load(number, name.replace("_", "-")) for name in _TENSORS}
        numbers = self.rounds.load(number, "numbers")
        falls = numbers.pop("falls").tolist()
        scores: dict[str, Scores] = {}
        for key, value in numbers.items():
            when, _, name = key.partition("|")
            scores.setdefault(when, {})[name] = value.item()
        return SavedRound(number, **files, falls=falls, scores=scores)

    def save(self, saved: SavedRound) -> None:
        """Keep what a round has trained."""
        files = {name.replace("_", "-"): getattr(saved, name) for name in _TENSORS}
        numbers: dict[str, Any] = {"falls": saved.falls}
        numbers |= {f"{when}|{name}": x for when, values in saved.scores.items() for name, x in values.items()}
        files["numbers"] = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        self.rounds.save(saved.number, files, keep=KEPT_ROUNDS)
