"""One node's round, from its configuration to what it gives away.

Data path: config -> private examples -> the ends with adapters -> local round -> own disk -> shared part, metrics.
"""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from transformers.utils import logging as transformers_logging

from fl_split.config import Aggregation, NodeConfig, RunConfig
from fl_split.errors import FLSplitError
from fl_split.model import adapters
from fl_split.model.products import are_equal
from fl_split.model.slots import trunk_calls_of
from fl_split.node import masks, personal, train
from fl_split.node.build import check_consent, check_demo_data
from fl_split.node.evaluate import Scores, scores_before
from fl_split.node.ready import Instructions
from fl_split.node.received import products
from fl_split.node.samples import check_scorer
from fl_split.node.steps import Outcome, Round, RoundResult, Shadow
from fl_split.node.train import Trained
from fl_split.node.trial import Losses, gain
from fl_split.plan.plan import choose_split

logger = logging.getLogger(__name__)


def run_round(
    config: RunConfig, node: NodeConfig, received: dict[str, Tensor], instructions: Instructions
) -> RoundResult:
    """Train one node for one round and keep the result on its disk.

    Args:
        config: The run's configuration.
        node: The node's own values; they come before the run's.
        received: What the server made of the nodes' shared weights; empty before it made anything.
        instructions: Which round, and of which run.

    Raises:
        FLSplitError: Anything that a person can mend; the text holds no private data.
    """
    transformers_logging.disable_progress_bar()
    check_consent(config, node)
    masks.check_consent(config, node)
    check_demo_data(config, node)
    if config.data.samples:
        check_scorer()
    config = node.with_record_dp(config)
    with ExitStack() as stack:
        kind = PersonalRound if config.is_personal else Round
        this = kind.build(choose_split(config).with_rates(), node, instructions, stack)
        outcome = this.run(received)
        outcome = replace(outcome, samples=this.answer())
    return this.reply(outcome, this.save(outcome))


@dataclass(frozen=True)
class PersonalRound(Round):
    """A round with `aggregation.personal`: of a run alone, of a run that shares, and a mixture of both adapters."""

    def run(self, received: dict[str, Tensor]) -> Outcome:
        """Train the node's own adapter, then what is shared, and take of that what helps; arguments as of `Round.run`.

        The own adapter is kept whatever ends the rest, be it that memory is too little for a second training.

        Raises:
            FLSplitError: What is shared cannot be trained or weighed.
        """
        began = adapters.adapter_state(self.model)
        self.restore()
        outcome, alone = self.train_own()
        with ExitStack() as unfinished:
            unfinished.callback(self.keep_own, outcome)
            try:
                outcome = self.weigh(self.train_shared(outcome, received, began), received, alone)
            except FLSplitError as error:
                text = f"of what is shared, beside this node's own adapter, which is kept: {error}"
                raise type(error)(text) from error
            unfinished.pop_all()
        return outcome

    def keep_own(self, outcome: Outcome) -> None:
        """Keep the node's own adapter of this round, and what is shared as the last round left it."""
        adapters.drop_residual(self.model)
        self.save(replace(outcome, shadow=Shadow(self.saved.shared_adapter, self.saved.shared_optimizer)))

    def train_own(self) -> tuple[Outcome, Losses | None]:
        """Train the node's own adapter; with its losses on the examples to choose by, None where they are too few.

        They are measured now: it has to be kept even if the trunk goes away afterwards.
        """
        outcome, started = self.train(Aggregation()), time.monotonic()
        chooses, after = self.halves[0], outcome.heldout["after"]
        alone = self.losses_on(chooses) if chooses else None
        selection = _mean(alone) if alone else {"loss": after["loss"]}  # the same metrics on all nodes
        heldout = {**outcome.heldout, "alone": after, "selection": selection}
        return replace(outcome, heldout=heldout, evaluate_s=outcome.evaluate_s + time.monotonic() - started), alone

    def train_shared(self, outcome: Outcome, received: dict[str, Tensor], began: dict[str, Tensor]) -> Outcome:
        """Train what is shared, as in a run without `aggregation.personal`; leaves the node's own adapter in the model.

        Args:
            outcome: Of the node's own training.
            received: What the server made of all nodes' shared weights.
            began: The adapter as the run began.
        """
        self.progress.start("trains what is shared, apart from its own adapter: as many steps again")
        model, saved, trained = self.model, self.saved, outcome.trained
        own, calls = adapters.adapter_state(model), trunk_calls_of(model.get_base_model())
        optimizer = train.make_optimizer(model, self.config.train)
        distiller, calls.distiller = calls.distiller, None  # a surrogate learns from the node's own training alone
        try:
            adapters.load_adapter_state(model, saved.shared_adapter or began)
            train.load_optimizer_state(model, optimizer, saved.shared_optimizer)
            self.receive(received, optimizer)
            heldout, started = dict(outcome.heldout), time.monotonic()
            if received:
                how, known = self.config.aggregation, {"base": heldout["base"]}
                heldout["shared"] = scores_before(model, how, self.config.train.seed, known, self.measure)["shared"]
            evaluate_s, forward_s = outcome.evaluate_s + time.monotonic() - started, -self.connection.forward_s
            again = self.run_steps(optimizer, self.config.aggregation, outcome.trained_bottom)
            shadow = Shadow(adapters.adapter_state(model), train.optimizer_state(model, optimizer))
        finally:
            adapters.drop_residual(model)
            adapters.load_adapter_state(model, own)
            calls.distiller = distiller
        forward_s += self.connection.forward_s
        return replace(
            outcome,
            shadow=shadow,
            heldout=heldout,
            evaluate_s=evaluate_s,
            trained=Trained(trained.loss, trained.num_tokens + again.num_tokens, trained.seconds + again.seconds),
            trunk_forward_s=outcome.trunk_forward_s + forward_s,
        )

    def weigh(self, outcome: Outcome, received: dict[str, Tensor], alone: Losses | None) -> Outcome:
        """Take as much of what is shared as helps: `node.personal`; mutates the model, until the round's end."""
        started = time.monotonic()
        chooses, reported = self.halves
        worth, heldout = personal.Worth(), dict(outcome.heldout)
        if alone is None:
            logger.warning(
                "%d held-out examples are too few to weigh what is shared: this node's own adapter stays alone; raise "
                "data.holdout",
                len(self.examples.heldout),
            )
        elif received and outcome.shadow and not are_equal(outcome.shadow.adapter, adapters.adapter_state(self.model)):
            # equal before others' rounds: then any mixture would win or lose by rounding alone
            shared = products({**received, **outcome.shadow.adapter}, adapters.scaling_of(self.model))
            parts = [part for part in adapters.PARTS if part == "top" or self.config.surrogate.trains_bottom]
            without = self.losses_on(reported)
            weights, chosen = personal.weigh(self.model, shared, parts, alone, partial(self.losses_on, chooses))
            if weights:
                worth = personal.Worth(weights, gain(without, self.losses_on(reported)))
                heldout |= {"after": self.measure(), "selection": _mean(chosen)}
            logger.info("%s", personal.explain(worth))
        evaluate_s = outcome.evaluate_s + time.monotonic() - started
        return replace(outcome, heldout=heldout, worth=worth, evaluate_s=evaluate_s)


def _mean(losses: Losses) -> Scores:
    sums, targets = losses
    return {"loss": (sums.sum() / targets.sum()).item()}
