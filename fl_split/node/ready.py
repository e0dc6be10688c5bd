"""All that a node needs for a round, made ready: examples, model, trunk, and what earlier rounds have left.

Data path: config -> **private examples, way to the trunk, the ends with adapters** -> `node.round`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import NodeConfig, RunConfig
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.fits import check_fits
from fl_split.data.load import Examples, load_examples
from fl_split.data.store import Prepared
from fl_split.model.distill import Distiller
from fl_split.model.loss import Batch
from fl_split.model.slots import Trunk
from fl_split.node import personal, rate_search, train, trial
from fl_split.node.account import Account
from fl_split.node.build import (
    build_model,
    check_consent,
    connect,
    connect_shares,
    fetch_matched,
    find_model,
    warn_of_room,
    with_cache,
)
from fl_split.node.choice import settle
from fl_split.node.evaluate import Scores, evaluate
from fl_split.node.ledger import NAME as LEDGER
from fl_split.node.ledger import Ledger
from fl_split.node.progress import Progress
from fl_split.node.state import NodeFolder, SavedRound
from fl_split.node.trunk_connection import TrunkConnection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Instructions:
    """What the server says of a round."""

    server_round: int  # from 1
    run_name: str  # folder of the run
    run_id: str  # identity of the run: state of another run of the same name is left alone
    trunk_address: str  # where the server says that the trunk is
    share_address: str = ""  # and the second one, of `surrogate.kind = shares`
    proximal_mu: float = 0.0  # weight of FedProx's term


@dataclass(frozen=True)
class Ready:
    """What the steps of a round work with."""

    config: RunConfig  # with its split chosen
    node: NodeConfig
    instructions: Instructions
    base: Path  # the base model's folder
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    connection: TrunkConnection
    trunk: Trunk  # the connection, or a cache before it
    model: PeftModel
    optimizer: torch.optim.Optimizer
    distiller: Distiller | None  # if the surrogate is trained on the way
    folder: NodeFolder
    saved: SavedRound  # the newest one before this
    account: Account  # of `dp.record-*`
    progress: Progress
    started: float  # by `time.monotonic`

    @classmethod
    def build(cls, config: RunConfig, node: NodeConfig, instructions: Instructions, stack: ExitStack) -> Self:
        """Load examples and model, and reach the trunk; `stack` closes what is to be closed."""
        started = time.monotonic()
        base = find_model(config)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(base))
        home = node.folder(config, instructions.run_name)
        examples = load_examples(config.data, node, tokenizer, config.train.seed, store=home / "examples")
        check_fits(AutoConfig.from_pretrained(base), tokenizer, examples, config.data)
        folder, account = NodeFolder(home, instructions.run_id), Account(home)
        saved = folder.load_before(instructions.server_round) or SavedRound(0)
        account.check(config.dp, saved.number)
        config = settle(config, node, base, tokenizer, examples, folder.choice)
        check_consent(config, node)
        if instructions.server_round == 1:
            warn_of_room(config, node)
        ledger = Ledger(home / LEDGER, instructions.server_round)
        ledger.note(
            "", "begin", 0, examples=len(examples.train) + len(examples.heldout), redacted=examples.report.redacted
        )
        trunk: Trunk
        if config.surrogate.kind == "shares":
            addresses = (instructions.trunk_address, instructions.share_address)
            trunk = connect_shares(config, node, base, addresses, stack, ledger)
            connection = trunk.first
        else:
            connection, expected = connect(config, node, base, instructions.trunk_address, stack, ledger)
            trunk = with_cache(config, connection, expected, home, stack)
        matched = fetch_matched(config, connection)
        model = build_model(config, node.lora(config.lora), base, trunk, tokenizer.pad_token_id, matched)
        seed = hash((config.train.seed, node.partition_id))
        tested = rate_search.STEPS, rate_search.MEASURED
        draw = partial(trial.draw, examples.train, tokenizer, config, seed, *tested)
        config = rate_search.settle(config, model, draw, folder.rates, folder.answers, late=saved.number > 0)
        optimizer, distiller, surrogate = train.make_optimizer(model, config.train), None, config.surrogate
        if surrogate.is_trained:
            distiller = train.make_distiller(model, surrogate.distill_lr, surrogate.probe_every)
        return cls(
            config=config,
            node=node,
            instructions=instructions,
            base=base,
            tokenizer=tokenizer,
            examples=examples,
            connection=connection,
            trunk=trunk,
            model=model,
            optimizer=optimizer,
            distiller=distiller,
            folder=folder,
            saved=saved,
            account=account,
            progress=Progress(
                home,
                f"node {node.partition_id}, run {instructions.run_name}, "
                f"round {instructions.server_round}/{config.num_server_rounds}",
                instructions.server_round,
                config.train.steps,
                node.report_to,
            ),
            started=started,
        )

    def describe(self) -> str:
        """Say what this round trains, and on what; for the node's own eyes."""
        config, trained = self.config, [p for p in self.model.parameters() if p.requires_grad]
        return (
            f"{len(self.examples.train)} examples to train on and {len(self.examples.heldout)} held out, of "
            f"{self.node.data_path or config.data.path}; model {config.model.name}; trains "
            f"{'bottom and top' if config.surrogate.trains_bottom else 'the top'} "
            f"(surrogate.kind={config.surrogate.kind!r}), "
            f"{sum(p.numel() for p in trained):,} weights of rank {self.node.lora(config.lora).rank}, "
            "rates {:g} and {:g}".format(*config.train.rates)
        )

    @property
    def halves(self) -> tuple[Prepared, Prepared]:
        """Held-out examples to choose by, of `aggregation.personal`, and those that are reported."""
        heldout = self.examples.heldout
        return personal.halves(heldout) if self.config.is_personal else (heldout[:0], heldout)

    def losses_on(self, examples: Prepared) -> trial.Losses:
        """Losses of single examples, with the model as it stands."""
        batches = heldout_batches(examples, self.tokenizer, self.config.train.batch_size)
        return trial.measure(self.model, list(batches), self.config.trunk.in_flight)

    def measure(self) -> Scores:
        """Score the model as it stands on the held-out examples."""
        config = self.config
        batches = heldout_batches(self.halves[1], self.tokenizer, config.train.batch_size, config.data)
        return evaluate(self.model, batches, config.trunk.in_flight)

    def batches(self, seed: int, first_example: int) -> Iterator[Batch]:
        """Endless batches of the examples to train on."""
        size, data = self.config.train.batch_size, self.config.data
        return training_batches(self.examples.train, self.tokenizer, size, seed, first_example, data)

    @property
    def same_heldout(self) -> bool:
        """Whether the last round's scores are of the examples that are held out by now."""
        return self.saved.heldout_id == self.examples.heldout_id

    def earlier_scores(self) -> dict[str, Scores]:
        """Scores of the last round, unless other examples are held out by now."""
        if self.saved.number and not self.same_heldout:
            logger.warning("other examples are held out than in the last round: the base model is scored on them anew")
            return {}
        return self.saved.scores
