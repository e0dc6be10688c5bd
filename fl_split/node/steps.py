"""The steps of a node's round: train, answer, save, reply; `node.round` puts them in order.

Data path: the ends with adapters -> **local round -> own disk -> shared part, metrics**.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from fl_split.config import Aggregation
from fl_split.errors import TrainingError
from fl_split.model import adapters
from fl_split.node import personal, record_dp, train
from fl_split.node.account import Charge
from fl_split.node.card import base_name, card_text, write_recipe
from fl_split.node.evaluate import Scores, scores_before
from fl_split.node.metrics import RoundMetrics, given_away, heldout_metrics
from fl_split.node.ready import Ready
from fl_split.node.received import receive
from fl_split.node.samples import Sample, answer_heldout, keep, means
from fl_split.node.shares import SharesTrunk
from fl_split.node.state import SavedRound
from fl_split.node.train import RoundSettings, Step, Trained, train_round
from fl_split.node.trial import STEPS, Gain, draw, explain, is_due, passes, try_bottom
from fl_split.node.trunk_cache import CachedTrunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a node gives away after a round."""

    shared: dict[str, Tensor]  # adapter weights that `aggregation.share` and `aggregation.tensors` name
    scaling: float  # alpha / rank of this node, without which they mean nothing
    metrics: dict[str, int | float]  # numbers about the round: `node.metrics`
    adapter: str  # where the export is; of a deployed node not the path, which is its own affair


@dataclass(frozen=True)
class Shadow:
    """What a node with `aggregation.personal` trains for the others: the round of a run that shares."""

    adapter: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a round's training came to."""

    trained: Trained
    trial: Gain  # the newest one of the bottom's gradient
    trained_bottom: bool
    heldout: dict[str, Scores]  # `base`, `before`, `shared`, `after`; and of `aggregation.personal`, `alone`
    evaluate_s: float
    trunk_forward_s: float  # of training
    charge: Charge | None = None  # of `dp.record-*`
    shadow: Shadow | None = None  # of `aggregation.personal`, as `worth` is
    worth: personal.Worth | None = None
    samples: Sequence[Sample] = ()  # private; their means are not


@dataclass(frozen=True)
class Round(Ready):
    """One round of a node; its steps: `run`, `answer`, `save` and `reply`."""

    def run(self, received: dict[str, Tensor]) -> Outcome:
        """Train one round, from what earlier ones and the server have left.

        Args:
            received: What the server made of the nodes' shared weights; empty before it made anything.

        Raises:
            TrainingError: A number is not finite; nothing of the round is kept.
        """
        self.restore()
        self.receive(received, self.optimizer)
        return self.train(self.config.aggregation)

    def restore(self) -> None:
        """Put back what this node's earlier rounds have trained."""
        saved = self.saved
        adapters.load_adapter_state(self.model, saved.adapter)
        train.load_optimizer_state(self.model, self.optimizer, saved.optimizer)
        if self.distiller is not None and saved.surrogate:
            self.distiller.load(saved.surrogate)
            train.load_optimizer_state(self.model, self.distiller.optimizer, saved.surrogate_optimizer)

    def receive(self, received: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Put what the server made of all nodes' rounds into the model."""
        seed = self.config.train.seed + self.instructions.server_round
        receive(self.model, optimizer, received, self.config.aggregation.combine, seed)

    def train(self, how: Aggregation) -> Outcome:
        """Score, train, score again, as a run does that shares as `how` says; errors as of `run`."""
        self.progress.start(self.describe())
        config, server_round = self.config, self.instructions.server_round
        started = time.monotonic()
        heldout = scores_before(self.model, how, config.train.seed, self.earlier_scores(), self.measure)
        evaluate_s = time.monotonic() - started
        if not isfinite(heldout["base"]["loss"]):
            raise TrainingError(
                f"the base model's held-out loss is not finite: check model.name={config.model.name!r}, and try "
                "model.dtype='float32'"
            )
        trial, follow = self.try_bottom(how)
        if trial.error and not follow:
            logger.warning("%s", explain(trial, config.surrogate.kind))
        private = record_dp.begin(config, self.examples.train, self.tokenizer, self.account, server_round)
        forward_s = -self.connection.forward_s
        trained = self.run_steps(self.optimizer, how, follow, self.progress.step, private)
        forward_s += self.connection.forward_s
        started = time.monotonic()
        heldout["after"] = self.measure()
        if not isfinite(heldout["after"]["loss"]):
            raise TrainingError(
                "the held-out loss after training is not finite: this round is dropped, and the adapter of the last "
                "good round stays; lower train.bottom-lr={:g} and train.top-lr={:g}".format(*config.train.rates)
            )
        evaluate_s += time.monotonic() - started
        charge = private.charge if private else None
        return Outcome(trained, trial, follow, heldout, evaluate_s, forward_s, charge)

    def run_steps(
        self,
        optimizer: torch.optim.Optimizer,
        how: Aggregation,
        trains_bottom: bool,
        on_step: Callable[[Step], None] = lambda step: None,
        private: record_dp.RecordDp | None = None,
    ) -> Trained:
        """Train the steps of this round, of a run that shares as `how` says."""
        config, server_round, partition = self.config, self.instructions.server_round, self.node.partition_id
        seed = config.train.seed
        torch.manual_seed(hash((seed, server_round, partition)))  # of dropout
        settings = self.settings(how, trains_bottom, private)
        first_example = settings.first_step * config.train.batch_size * config.train.accumulation
        batches = self.batches(hash((seed, partition)), first_example)
        return train_round(self.model, optimizer, batches, config.train, settings, on_step)

    def settings(
        self, how: Aggregation, trains_bottom: bool, private: record_dp.RecordDp | None = None
    ) -> RoundSettings:
        """Which part of the run this round is; arguments as of `run_steps`."""
        config, steps = self.config, self.config.train.steps
        return RoundSettings(
            first_step=(self.instructions.server_round - 1) * steps,
            total_steps=config.num_server_rounds * steps,
            in_flight=config.trunk.in_flight,
            proximal_mu=0.0 if how.share == "none" else self.instructions.proximal_mu,
            trains_bottom=trains_bottom,
            anchored=lambda name: adapters.is_shared(self.model, name, how),
            record_dp=private,
        )

    def try_bottom(self, how: Aggregation) -> tuple[Gain, bool]:
        """Say what came of the newest trial of the bottom's gradient, held now if one is due; and whether it trains."""
        config, server_round, saved = self.config, self.instructions.server_round, self.saved
        if not config.surrogate.is_tried:
            return saved.trial, config.surrogate.trains_bottom
        if not is_due(server_round, saved.number):
            return saved.trial, saved.trained_bottom
        seed, examples = hash((config.train.seed, self.node.partition_id, server_round)), self.examples.train
        drawn = draw(examples, self.tokenizer, config, seed)
        if drawn is None:
            logger.warning(
                "the bottom is not trained: %d examples to train on are too few to try whether surrogate.kind=%r gives "
                "it a useful gradient; surrogate.check=false trains it untried",
                len(examples),
                config.surrogate.kind,
            )
            return Gain(), False
        logger.info("tries the bottom's gradient: %d steps, once without it and once with it", STEPS)
        torch.manual_seed(seed)  # of dropout
        trial = try_bottom(self.model, self.optimizer, *drawn, config.train, self.settings(how, trains_bottom=True))
        return trial, passes(trial, saved.trained_bottom)

    def answer(self) -> list[Sample]:
        """Answer the first held-out prompts, for the node's own eyes."""
        examples, size = self.examples.heldout[: self.config.data.samples], self.config.train.batch_size
        samples = answer_heldout(self.model, self.connection, self.tokenizer, examples, size) if examples else []
        if samples:
            keep(self.folder.samples, self.instructions.server_round, samples)
            logger.info("%d held-out prompts are answered, for your eyes only: %s", len(samples), self.folder.samples)
        return samples

    def save(self, outcome: Outcome) -> int:
        """Keep on the node's own disk what was trained; export the adapter if it is the one to keep: whose round is."""
        config, server_round, distiller = self.config, self.instructions.server_round, self.distiller
        after, shadow = outcome.heldout["after"], outcome.shadow or Shadow()
        chosen_by = outcome.heldout.get("selection", after)["loss"]
        now = {**after, "round": float(server_round), "chosen-by": chosen_by}
        earlier = self.saved.scores.get("exported", now) if self.same_heldout else now
        exported = now if config.train.keep == "last" else min(earlier, now, key=_chosen_by)
        if exported is now:  # before the round counts: what a kill leaves is then done again
            scores, privacy = heldout_metrics(outcome.heldout), str(outcome.charge or "")
            card = card_text(config, self.node, server_round, scores, self.examples, privacy)
            base = base_name(config.model, self.base)
            adapters.export(self.model, self.folder.adapter, base, config.model.revision, card)
            write_recipe(self.folder.adapter, config, self.tokenizer)
        self.folder.save(
            SavedRound(
                server_round,
                adapters.adapter_state(self.model),
                train.optimizer_state(self.model, self.optimizer),
                distiller.state() if distiller else {},
                train.optimizer_state(self.model, distiller.optimizer) if distiller else {},
                shadow.adapter,
                shadow.optimizer,
                outcome.trial,
                outcome.trained_bottom,
                {"base": outcome.heldout["base"], "after": after, "exported": exported},
                self.examples.heldout_id,
            )
        )
        return int(exported["round"])

    def reply(self, outcome: Outcome, exported_round: int) -> RoundResult:
        """What leaves the node: the shared part of the adapter, and numbers."""
        how, trained, examples = self.config.aggregation, outcome.trained, self.examples
        shares = self.trunk if isinstance(self.trunk, SharesTrunk) else None
        metrics = RoundMetrics(
            partition_id=self.node.partition_id,
            num_examples=len(examples.train),
            weight=1 if how.weighting == "equal" else len(examples.train),
            bad_rows=examples.report.num_bad,
            truncated_examples=examples.report.num_truncated,
            truncated_tokens=examples.report.num_cut,
            train_loss=trained.loss,
            heldout=outcome.heldout,
            samples=means(outcome.samples),
            bottom_trained=int(outcome.trained_bottom),
            bottom_gain=outcome.trial.mean,
            bottom_gain_error=outcome.trial.error,
            top_gain=outcome.trial.top,
            train_tokens=trained.num_tokens,
            tokens_per_s=trained.num_tokens / trained.seconds,
            train_s=trained.seconds,
            evaluate_s=outcome.evaluate_s,
            trunk_forward_s=outcome.trunk_forward_s,
            activation_bytes=(shares or self.connection).bytes_sent,
            share_leak_bits=shares.leak_bits if shares else 0.0,
            cached_sequences=self.trunk.hits if isinstance(self.trunk, CachedTrunk) else 0,
            rounds_missed=self.instructions.server_round - 1 - self.saved.number,
            exported_round=exported_round,
            worth=outcome.worth.record() if outcome.worth else {},
            record_dp=outcome.charge.record() if outcome.charge else {},
        )
        record, path = metrics.record(), self.folder.adapter
        self.progress.finish(record, time.monotonic() - self.started, path)
        shared = adapters.shared_state(self.model, how, outcome.shadow.adapter if outcome.shadow else None)
        where = f"<out-dir>/{self.instructions.run_name}/{path.name}" if self.node.out_dir else str(path)
        num_scored = min(len(half) for half in self.halves if half)  # scores are of either
        given = given_away(record, num_scored, self.node, len(outcome.samples))
        return RoundResult(shared, adapters.scaling_of(self.model), given, where)


def _chosen_by(scores: Scores) -> float:
    """What `train.keep` goes by; rounds of older versions have no loss of its own for that."""
    return scores.get("chosen-by", scores["loss"])
