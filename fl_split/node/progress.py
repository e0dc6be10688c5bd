"""What an institution sees of its own round, and the numbers that it keeps of it; nothing of this leaves the node.

round starts -> a line -> every few seconds a line (on a terminal a bar) and an entry -> a summary and an entry
"""

import logging
import math
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_split.errors import ConfigError
from fl_split.files import line_of, read_entries, write_atomic
from fl_split.log import clock
from fl_split.node.train import Step

logger = logging.getLogger(__name__)

_EVERY_S = 5.0  # between two lines about steps


class Progress:
    """Says how far a node's round is, and writes it to the node's own ``metrics.jsonl``.

    Args:
        folder: Where the node keeps what it trains.
        name: Of the node and the round, such as ``node 0, round 2/5``.
        server_round: The round, from 1: entries of a round that has to be done again are dropped.
        num_steps: Optimizer steps of a round.
        to: `report.to` of the node: ``tensorboard`` or nothing.
    """

    def __init__(self, folder: Path, name: str, server_round: int, num_steps: int, to: str = "") -> None:
        self._name, self._round, self._num_steps = name, server_round, num_steps
        self._file, self._said_at = folder / "metrics.jsonl", -math.inf
        self._board = _tensorboard(folder / "tensorboard") if to else None
        kept = [entry for entry in read_entries(self._file) if entry["round"] < server_round]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, "".join(line_of(entry) for entry in kept))

    def start(self, what: str) -> None:
        """Say what the round is about."""
        logger.info("%s: %s", self._name, what)

    def step(self, step: Step) -> None:
        """Keep a step's numbers, and say them every few seconds; a terminal has a bar instead."""
        speed = step.num_tokens / step.seconds if step.seconds else 0.0
        self._add({"step": step.number, "loss": step.loss, "tokens-per-s": speed})
        if self._board:
            self._board.add_scalar("step/loss", step.loss, step.number)
        done = step.number - (self._round - 1) * self._num_steps
        now = time.monotonic()
        if sys.stderr.isatty() or (now < self._said_at + _EVERY_S and done < self._num_steps):
            return
        self._said_at = now
        left = clock(step.seconds / done * (self._num_steps - done))
        text = "%s: step %d/%d, loss %.3f, %.0f tokens/s, %s left"
        logger.info(text, self._name, done, self._num_steps, step.loss, speed, left)

    def finish(self, metrics: Mapping[str, int | float], seconds: float, adapter: Path) -> None:
        """Say what the round came to."""
        base, after = metrics["heldout-loss-base"], metrics["heldout-loss-after"]
        self._add({**metrics, "seconds": seconds, "adapter": str(adapter)})
        if self._board:
            for key, value in metrics.items():
                self._board.add_scalar(f"round/{key}", value, self._round)
            self._board.close()
        text = "%s is done in %s: held-out loss %.3f (base) -> %.3f, gain %+.3f; adapter of round %d: %s"
        logger.info(text, self._name, clock(seconds), base, after, base - after, metrics["exported-round"], adapter)
        if after > base:
            logger.warning(
                "%s: the held-out loss after training (%.3f) is above the base model's (%.3f): the operator should "
                "lower train.bottom-lr and train.top-lr, or more examples are needed",
                self._name,
                after,
                base,
            )

    def _add(self, entry: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line_of({"time": now, "round": self._round, **entry}))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"report.to='tensorboard' in node-config needs a package that is not installed ({error.name}): pip install "
            "tensorboard"
        ) from None
    return SummaryWriter(str(folder))
