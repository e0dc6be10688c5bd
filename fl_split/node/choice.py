"""`surrogate.kind = "auto"`: what gives this node's bottom its gradient, settled once, before its first round of a run.

The rule is `config.sections.AUTO`. Nothing that sends a gradient is ever chosen without the words that it needs
otherwise, and `exact` never. What is chosen may differ from node to node: all kinds but `none` have the same bottom
adapter, so where that is shared, `identity` stands in for `none`, and its trial keeps it from training on noise.

What leaves the node: nothing. A step of `streamed` is timed without the trunk.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fl_split.config import Kind, NodeConfig, RunConfig, num_bytes
from fl_split.data.batches import training_batches
from fl_split.data.load import Examples
from fl_split.errors import ConfigError, SplitError
from fl_split.files import write_atomic
from fl_split.model.checkpoint import read_config, weights_digest
from fl_split.model.ends import check_weights
from fl_split.model.family import auto_class, examine
from fl_split.model.loading import Boundaries
from fl_split.model.loss import accumulate
from fl_split.model.slots import Nowhere
from fl_split.model.surrogate import kept_layers
from fl_split.node.build import build_model
from fl_split.plan.fits_here import check_room
from fl_split.plan.plan import make_plan

logger = logging.getLogger(__name__)

_PART = 0.5  # of `run.round-timeout` that the steps of a round may take; the rest is for evaluation and for others
Clock = Callable[[RunConfig], float]  # seconds that the steps of a round would take


@dataclass(frozen=True)
class Choice:
    """A kind, and why."""

    kind: Kind
    why: str

    def __str__(self) -> str:
        return f"surrogate.kind='auto' is {self.kind!r} here: {self.why}"


def settle(
    config: RunConfig,
    node: NodeConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    kept: Path,
) -> RunConfig:
    """The run's configuration with a kind for this node where it is ``auto``; the same in all rounds of a run.

    Args:
        config: The run's, with its split chosen.
        node: The node's own.
        folder: The base model's.
        tokenizer: Its tokenizer.
        examples: What a step is timed on.
        kept: The file that remembers the choice.
    """
    if config.surrogate.kind != "auto":
        return config

    def clock(config: RunConfig) -> float:
        model = build_model(config, node.lora(config.lora), folder, Nowhere(), tokenizer.pad_token_id)
        batch = next(training_batches(examples.train, tokenizer, config.train.batch_size, 0, 0, config.data))
        started = time.monotonic()
        accumulate(model, [batch])
        return (time.monotonic() - started) * _num_batches(config)

    if kept.is_file():
        choice = Choice(**json.loads(kept.read_text(encoding="utf-8")))
    else:
        choice = choose(config, node, folder, clock)
        write_atomic(kept, json.dumps(asdict(choice)))
        logger.info("%s", choice)
    return chosen(config, choice.kind, folder)


def chosen(config: RunConfig, kind: Kind, folder: Path) -> RunConfig:
    """The configuration with what `auto` became, which keeps no more layers than the trunk has."""
    cut = _cut(config, folder)
    return config.with_kind(kind, len(kept_layers("auto", config.surrogate.layers, cut.first, cut.end)))


def choose(config: RunConfig, node: NodeConfig, folder: Path, clock: Clock | None = None) -> Choice:
    """Apply the rule; arguments as of `settle`.

    Args:
        config: The run's, with its split chosen.
        node: The node's own.
        folder: The base model's.
        clock: Says how long a round would take; without one, time is left open.

    Raises:
        ConfigError: A bottom that is shared would send more than `surrogate.max-bytes`.
    """
    if config.has_shares and (node.allow_gradient_shares or not node.is_deployed):
        if not _too_much_to_send(config.with_kind("shares"), folder):
            return Choice("shares", "the run names a second trunk, and nothing forbids it on this node")
    limit = _PART * config.run.round_timeout
    if too_much := _too_much_to_send(config.with_kind("streamed"), folder):
        if config.aggregation.share in ("bottom", "both"):
            raise ConfigError(
                f"{too_much}, and aggregation.share={config.aggregation.share!r} needs a bottom that trains: set a "
                "larger one, fewer train.steps, or aggregation.share='top'"
            )
        return _at_least(config, too_much, "a larger one, or fewer steps")
    why_not = _no_streamed(config, node, folder)
    if not why_not:
        split, labels = config.split, config.data.label_names
        try:
            if clock is None:
                check_weights(folder, split.bottom_layers, split.top_layers, "streamed", 0, labels)
                return Choice("streamed", f"the whole checkpoint is on this disk, if a round takes at most {limit:g} s")
            seconds = clock(config.with_kind("streamed"))
        except SplitError:
            why_not = "the trunk's layers cannot be read one at a time from this checkpoint"
        else:
            if seconds <= limit:
                why = f"the whole checkpoint is on this disk, and the steps of a round take about {seconds:.0f} s"
                return Choice("streamed", why)
            why_not = f"with 'streamed' the steps of a round would take about {seconds:.0f} s, more than {limit:g} s"
    blocks = chosen(config, "blocks", folder)
    if not _lacks_memory(blocks, node):
        return Choice("blocks", f"{why_not}; a trial says whether the bottom trains")
    why_not += f"; and memory does not suffice for surrogate.layers={blocks.surrogate.layers} of the trunk's"
    return _at_least(config, why_not, "the whole checkpoint on this disk, or memory, for a deeper top as well")


def _at_least(config: RunConfig, why_not: str, help: str) -> Choice:
    """Settle for no gradient, or for the cheapest where nodes share their bottoms."""
    if config.aggregation.share in ("bottom", "both"):
        return Choice("identity", f"{why_not}; a trial says whether the bottom trains")
    return Choice("none", f"{why_not}; what would help is {help}")


def _too_much_to_send(config: RunConfig, folder: Path) -> str:
    """Say why a round's training would send and get more than the run allows; "" if it would not."""
    if not config.surrogate.max_bytes:
        return ""
    plan = make_plan(read_config(str(folder)), config)
    needed = (plan.request_bytes + plan.reply_bytes) * _num_batches(config)
    if needed <= num_bytes(config.surrogate.max_bytes):
        return ""
    return (
        f"a bottom that trains would send and get {needed / 1e6:.1f} MB in a round of full-length examples, more "
        f"than surrogate.max-bytes={config.surrogate.max_bytes}"
    )


def _num_batches(config: RunConfig) -> int:
    """Count the micro-batches that a node trains in a round."""
    return config.train.accumulation * config.train.steps * config.num_trainings


def _no_streamed(config: RunConfig, node: NodeConfig, folder: Path) -> str:
    """Say why the trunk's layers cannot be run from this node's disk; "" if nothing is against it before one is run."""
    cut = _cut(config, folder)
    if weights_digest(folder, cut.layers_name, cut.trunk) is None:
        return "the trunk's part of the checkpoint is not on this disk"
    if _lacks_memory(config.with_kind("streamed"), node):
        return "memory does not suffice for what 'streamed' keeps of each layer"
    return ""


def _cut(config: RunConfig, folder: Path) -> Boundaries:
    anatomy = examine(read_config(str(folder)), auto_class(config.task))
    return Boundaries.of(anatomy, config.split.bottom_layers, config.split.top_layers)


def _lacks_memory(config: RunConfig, node: NodeConfig) -> bool:
    return any(check.name == "memory" and check.status == "fail" for check in check_room(config, node))
