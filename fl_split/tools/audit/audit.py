"""An audit of one node: its own text, model, split, wire and adapter; run on the node, which sends nothing."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split import __version__
from fl_split.config import Lora, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.redact import redactor
from fl_split.data.sources import num_files
from fl_split.errors import ConfigError
from fl_split.model import adapters
from fl_split.model.checkpoint import weights_digest
from fl_split.model.ends import load_ends
from fl_split.model.loading import Boundaries, boundaries_of
from fl_split.node.build import check_demo_data, find_model
from fl_split.node.ledger import Sums, read_ledger
from fl_split.plan.plan import choose_split
from fl_split.tools.audit.attack import Attacker, add_noise
from fl_split.tools.audit.bottom import Listener, sent
from fl_split.tools.audit.counts import count, kinds_of, share_found, share_right
from fl_split.tools.audit.membership import membership
from fl_split.tools.audit.text import Planted, own_ids, plant, public_ids

logger = logging.getLogger(__name__)

_CONTROLS = 8  # examples to control the attack with
CONTROL = 0.95  # an attack in sequence that reads less without any defence says nothing of a defence


@dataclass(frozen=True)
class Setting:
    """What an audit looks at."""

    adapter: Path | None = None  # of a run; None: the base model, as at a run's start
    noise: float = 0.0  # added to hidden states, relative to their root mean square: what that would do
    passes: int = 1  # in which an example is sent, each with other noise
    ledger: Path | None = None  # of a run, in which passes were counted: it comes before `passes`
    members: int = 64  # rows of each side, to tell those that the adapter was trained on from others
    examples: int = 16
    tokens: int = 64  # of each, from its beginning
    canaries: int = 8  # planted records
    public: Sequence[Path] = ()  # texts to attack with
    seed: int = 0


@dataclass(frozen=True)
class Node:
    """What of a node an audit holds against what was read."""

    folder: Path  # of the base model
    ends: tuple[int, int]
    tokenizer: PreTrainedTokenizerBase
    own: list[list[int]]  # the node's own text
    planted: list[Planted]
    arrived: list[Tensor]  # what the trunk would get of its own text, then of planted records
    whole: bool  # whether the whole base model is here, and fits

    @classmethod
    def load(cls, config: RunConfig, own: NodeConfig, setting: Setting) -> Self:
        """Make what the node would send."""
        folder, ends = find_model(config), (config.split.bottom_layers, config.split.top_layers)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
        texts = own_ids(config.data, own, tokenizer, setting.examples, setting.tokens, setting.seed)
        if not texts:
            raise ConfigError("no example is longer than a token: give --tokens of at least 2, and see 'doctor'")
        planted = plant(setting.canaries, setting.seed)
        redact = redactor(config.data, own)
        written = [redact.text(record.text) if redact else record.text for record in planted]
        records = [tokenizer.encode(text, add_special_tokens=False) for text in written]
        lora, state = adapters.read_export(setting.adapter) if setting.adapter else (Lora(), {})
        listener = Listener()
        model = load_ends(
            folder,
            *ends,
            listener,
            surrogate="identity",
            dtype=config.model.torch_dtype,
            labels=config.data.label_names,
        )
        whole = _can_load_whole(folder, boundaries_of(model))
        adapted = adapters.attach(model, lora, train_bottom=True, seed=0)
        adapters.load_adapter_state(adapted, state)
        arrived = sent(adapted, listener, [*texts, *records], config.trunk.wire_dtype)
        return cls(folder, ends, tokenizer, texts, planted, arrived, whole)

    @property
    def truth(self) -> list[Tensor]:
        """Its own text, as tensors."""
        return [torch.tensor(ids) for ids in self.own]


def _can_load_whole(folder: Path, cut: Boundaries) -> bool:
    if weights_digest(folder, cut.layers_name, cut.trunk) is None:
        return False
    needed = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # in float32
    if needed <= psutil.virtual_memory().available:
        return True
    logger.warning("the base model's own guesses are left out: they would take %.1f GB of memory", needed / 1e9)
    return False


def audit(config: RunConfig, own: NodeConfig, setting: Setting) -> dict[str, Any]:
    """Attack this node's own hidden states as the trunk's operator could; a report in numbers, flat, without text.

    Raises:
        FLSplitError: Model, data, adapter or public text cannot be used.
    """
    started = time.monotonic()
    check_demo_data(config, own)
    counted = _counted(setting.ledger) if setting.ledger else None
    if counted:
        setting = replace(setting, passes=max(1, round(counted.passes)))
    config = choose_split(config)
    if not own.data_path and own.num_partitions == 1:  # a simulation, of which nobody said how many nodes it has
        own = own.model_copy(update={"num_partitions": num_files(config.data)})
    logger.info("what this node would send ...")
    node = Node.load(config, own, setting)
    logger.info("the vocabulary and public text through the base bottom ...")
    public = public_ids(setting.public, node.folder, setting.tokens, setting.seed)
    attacker = Attacker.prepare(node.folder, node.ends, public, config.trunk.wire_dtype, whole=node.whole)
    logger.info("reading %d examples and %d planted records ...", len(node.own), len(node.planted))
    generator, noise = torch.Generator().manual_seed(setting.seed), setting.noise / math.sqrt(setting.passes)
    attacked = add_noise(node.arrived, setting.noise, setting.passes, generator) if noise else node.arrived
    outcome = attacker.read(attacked, noise)
    own_text = outcome.first(len(node.own))
    figures = count(own_text, node.truth, kinds_of(node.tokenizer, attacker.bottom.vocab_size, public))
    figures |= {
        "canary-fields": share_found(outcome.ids[len(node.own) :], node.planted, node.tokenizer),
        "drift": outcome.drift,
        **_controls(attacker, node, attacked, noise),
    }
    if setting.adapter and setting.members and node.whole:
        logger.info("losses of rows that were trained on, and of others ...")
        figures |= membership(config, own, node.folder, setting.adapter, setting.members)
    return {
        "verdict": verdict(figures),
        **figures,
        "examples": len(node.own),
        "tokens": sum(map(len, node.own)),
        "passes": setting.passes,
        **({"sent-again": counted.repeated / counted.sequences, "ledger-head": counted.head} if counted else {}),
        "noise": setting.noise,
        "model": config.model.name,
        "split": "{}+{}".format(*node.ends),
        "wire-dtype": config.trunk.wire_dtype,
        "adapter": setting.adapter is not None,
        "prepare-s": attacker.seconds,
        **{f"{name}-s": seconds for name, seconds in outcome.seconds.items()},
        "audit-s": time.monotonic() - started,
        "fl-split": __version__,
    }


def _counted(ledger: Path) -> Sums:
    """A run's ledger, checked; of one in which no hidden states were sent, nothing can be said."""
    sums = read_ledger(ledger)
    if not (sums.sequences and sums.examples):
        raise ConfigError(f"{ledger} has no line of hidden states: expected the ledger of a run on this node")
    return sums


def _controls(attacker: Attacker, node: Node, attacked: Sequence[Tensor], noise: float) -> dict[str, float]:
    """What the attack reads where it must, and what can be had by guessing."""
    truth = node.truth
    plain = [attacker.bottom.run(ids[None])[0] for ids in truth[:_CONTROLS]]
    lengths = [len(ids) for ids in truth]
    rows = torch.cat(list(attacked[: len(truth)]))
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].split(lengths)
    guesses = attacker.prior.guesses(node.own) if attacker.prior else []
    return {
        "control-no-defence": share_right(attacker.read(plain).ids, truth[:_CONTROLS]),
        "control-shuffled": share_right([r.ids[:, 0] for r in attacker.reader.read(shuffled, noise)], truth),
        "control-prior-alone": share_right(guesses, [ids[1:] for ids in truth]) if guesses else math.nan,
    }


def verdict(figures: Mapping[str, float]) -> str:
    """Say in words what the figures mean: how much is readable at least, never that something is private."""
    control, readable = figures["control-no-defence"], figures["readable"]
    if not control > CONTROL:
        return (
            f"inconclusive: without any defence the attack reads {100 * control:.1f} % of tokens only, so that what it "
            "reads here says little; longer public text (--text) may help"
        )
    least = math.floor(1000 * readable) / 10
    return f"at least {least:.1f} % of this node's tokens are readable by the trunk's operator"
