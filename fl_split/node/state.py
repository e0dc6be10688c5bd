"""What a node keeps on its own disk between rounds; nobody else reads it.

    <run.dir>/<run.name>/nodes/<partition-id>/    in simulation; on a deployed node <out-dir>/<run.name>/
        adapter/                                  the PEFT export
        state/<run id>/round-0003/                adapter, optimizer, surrogate and numbers as safetensors: private
        state/<run id>/choice.json                what `surrogate.kind = auto` came to
        state/<run id>/rates.json                 what `train.top-lr = auto` came to
        state/<run id>/rate-search/                what the trunk answers until that is settled: private
        dp-account.json                           what `dp.record-*` has spent
        samples.jsonl                             what it answers to held-out prompts: private
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
from fl_split.node.trial import Gain

_TRIAL = ("trial-gain", "trial-gain-error", "trial-gain-top")  # of Gain
_TENSORS = (  # of SavedRound, a file each
    "adapter", "optimizer", "surrogate", "surrogate_optimizer", "shared_adapter", "shared_optimizer"
)  # fmt: skip


@dataclass(frozen=True)
class SavedRound:
    """What a node keeps of a finished round, for itself; round 0 is the start."""

    number: int
    adapter: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    surrogate: dict[str, Tensor] = field(default_factory=dict)  # empty unless it is distilled
    surrogate_optimizer: dict[str, Tensor] = field(default_factory=dict)
    shared_adapter: dict[str, Tensor] = field(default_factory=dict)  # empty without `aggregation.personal`
    shared_optimizer: dict[str, Tensor] = field(default_factory=dict)
    trial: Gain = Gain()  # the newest one of the bottom's gradient
    trained_bottom: bool = False
    scores: dict[str, Scores] = field(default_factory=dict)  # on held-out examples: `base`, `after`, `exported`
    heldout_id: bytes = b""  # of these examples: `Examples.heldout_id`


class NodeFolder:
    """A node's private results. Nothing in here is read by anybody but the node."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.adapter, state = root / "adapter", root / "state" / run_id
        self.choice, self.rates, self.answers = state / "choice.json", state / "rates.json", state / "rate-search"
        self.samples = root / "samples.jsonl"
        self.rounds = Rounds(state)

    def load_before(self, server_round: int) -> SavedRound | None:
        """The newest round before `server_round`; None at the start.

        Raises:
            NodeStateError: Later rounds are at hand (a server loses one round at most), or those of a version that
                held out other examples.
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
        if "heldout-id" not in numbers:
            raise NodeStateError(
                "this run was begun by an older fl-split, which drew the held-out examples otherwise: some of what it "
                "has trained on would now be held out; start a run with another run.name, or go on with that version"
            )
        heldout_id = bytes(int(value) for value in numbers.pop("heldout-id"))
        trial = Gain(*(numbers.pop(name).item() for name in _TRIAL))
        # older versions did not keep it: they also wanted a tenth of what the top wins
        useful = trial.is_sure and trial.mean > 0.1 * trial.top
        trained_bottom = bool(numbers.pop("bottom-trained", useful))
        scores: dict[str, Scores] = {}
        for key, value in numbers.items():
            when, _, name = key.partition("|")
            scores.setdefault(when, {})[name] = value.item()
        return SavedRound(
            number, **files, trial=trial, trained_bottom=trained_bottom, scores=scores, heldout_id=heldout_id
        )

    def save(self, saved: SavedRound) -> None:
        """Keep what a round has trained."""
        files = {name.replace("_", "-"): getattr(saved, name) for name in _TENSORS}
        trial = saved.trial
        numbers: dict[str, Any] = dict(zip(_TRIAL, (trial.mean, trial.error, trial.top), strict=True))
        numbers |= {"bottom-trained": saved.trained_bottom, "heldout-id": list(saved.heldout_id)}
        numbers |= {f"{when}|{name}": x for when, values in saved.scores.items() for name, x in values.items()}
        files["numbers"] = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        self.rounds.save(saved.number, files, keep=KEPT_ROUNDS)
