"""One node's round, from its configuration to what it gives away.

Data path: config -> private examples -> client model with adapters -> local round -> own disk -> shared part, metrics.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split.config import NodeConfig, RunConfig
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.model import adapters
from fl_split.model.checkpoint import node_needs, resolve_model
from fl_split.model.distill import Distiller
from fl_split.model.loss import Batch
from fl_split.node import evaluate as classification
from fl_split.node import train
from fl_split.node.build import build_model, check_consent, connect, make_distiller, with_cache
from fl_split.node.card import base_name, card_text
from fl_split.node.descent import Descent, DescentProbe, warn_if_stuck
from fl_split.node.received import take
from fl_split.node.state import NodeFolder, Quality, SavedRound
from fl_split.node.trunk_cache import CachedTrunk
from fl_split.plan.fits_here import check_room
from fl_split.plan.plan import choose_split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a node gives away after a round."""

    shared: dict[str, Tensor]  # adapter weights that `aggregation.share` and `aggregation.tensors` name
    scaling: float  # alpha / rank of this node, without which they mean nothing
    metrics: dict[str, int | float]  # numbers about the round
    adapter: Path  # the export, on the node's own disk


@dataclass(frozen=True)
class Instructions:
    """What the server says of a round."""

    server_round: int  # from 1
    run_name: str  # folder of the run
    run_id: str  # identity of the run: state of another run of the same name is left alone
    trunk_address: str  # where the server says that the trunk is
    proximal_mu: float = 0.0  # weight of FedProx's term


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
    config = choose_split(config)
    split, surrogate = config.split, config.surrogate
    needs = node_needs(split.bottom_layers, split.top_layers, surrogate.kind, surrogate.layers)
    folder = resolve_model(config.model.name, config.model.revision, needs)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    home = node.folder(config, instructions.run_name)
    if instructions.server_round == 1:
        _warn_of_room(config, node)
    examples = load_examples(config.data, node, tokenizer, config.train.seed, store=home / "examples")
    store = NodeFolder(home, instructions.run_id)
    server_round, in_flight = instructions.server_round, config.trunk.in_flight

    with ExitStack() as stack:
        client, expected = connect(config, node, folder, instructions.trunk_address, stack)
        trunk = with_cache(config, client, expected, home, stack)
        model = build_model(config, node.lora(config.lora), folder, client, trunk, tokenizer.pad_token_id)
        optimizer = train.make_optimizer(model, config.train)
        distiller = make_distiller(config, model)
        saved = store.load_before(server_round) or SavedRound(0)
        _restore(model, optimizer, distiller, saved)
        _take(config, model, optimizer, received, server_round)

        def heldout() -> Quality:
            batches = heldout_batches(examples.heldout, tokenizer, config.train.batch_size, config.data)
            if config.task == "sequence-classification":
                return asdict(classification.evaluate(model, batches, in_flight))
            return {"loss": train.evaluate(model, batches, in_flight)}

        def batches(seed: int, first: int) -> Iterator[Batch]:
            size = config.train.batch_size
            return training_batches(examples.train, tokenizer, size, seed, first, config.data)

        quality = _quality_before(config, model, heldout, saved)
        probe = None
        if config.surrogate.kind != "none":
            (fixed,) = islice(batches(config.train.seed, 0), 1)
            probe = DescentProbe(model, fixed)
        torch.manual_seed(hash((config.train.seed, server_round, node.partition_id)))  # of dropout
        first_step = (server_round - 1) * config.train.steps
        trained = train.train_round(
            model,
            optimizer,
            batches(
                hash((config.train.seed, node.partition_id)),
                first_step * config.train.batch_size * config.train.accumulation,
            ),
            config.train,
            first_step=first_step,
            total_steps=config.num_server_rounds * config.train.steps,
            distiller=distiller,
            in_flight=in_flight,
            proximal_mu=instructions.proximal_mu,
            anchored=lambda name: adapters.is_shared(model, name, config.aggregation),
        )
        descent = probe.ask() if probe else Descent(0.0, 0.0)
        quality["after"] = heldout()

    falls = [*saved.falls, descent.measured]
    if probe:
        warn_if_stuck(falls, config.surrogate.kind)
    kept = {when: quality[when] for when in ("base", "after")}
    store.save(_to_save(server_round, model, optimizer, distiller, falls, kept))
    heldout_metrics = {
        f"heldout-{name.replace('_', '-')}-{when}": x for when, values in quality.items() for name, x in values.items()
    }
    card = card_text(config, node, server_round, heldout_metrics, len(examples.train))
    adapters.export(model, store.adapter, base_name(config, folder), config.model.revision, card)
    metrics: dict[str, int | float] = {
        "partition-id": node.partition_id,
        "num-examples": len(examples.train),
        "weight": 1 if config.aggregation.weighting == "equal" else len(examples.train),
        "bad-rows": examples.report.num_bad,
        "truncated-examples": examples.report.num_truncated,
        "truncated-tokens": examples.report.num_cut,
        "train-loss": trained.loss,
        **heldout_metrics,
        "descent-ratio": descent.ratio,
        "bottom-loss-fall": descent.measured,
        "train-tokens": trained.num_tokens,
        "tokens-per-s": trained.num_tokens / trained.seconds,
        "train-s": trained.seconds,
        "trunk-forward-s": client.forward_s,
        "activation-bytes": client.bytes_sent,
        "cached-sequences": trunk.hits if isinstance(trunk, CachedTrunk) else 0,
        "rounds-missed": server_round - 1 - saved.number,
    }
    shared = adapters.shared_state(model, config.aggregation)
    return RoundResult(shared, adapters.scaling_of(model), metrics, store.adapter)


def _warn_of_room(config: RunConfig, node: NodeConfig) -> None:
    """Say before the first round what `fl-split doctor` would have said of memory and disk."""
    for check in check_room(config, node):
        if check.status == "fail":
            logger.warning("%s: %s", check.name, check.text)


def _restore(
    model: PeftModel, optimizer: torch.optim.Optimizer, distiller: Distiller | None, saved: SavedRound
) -> None:
    """Put back what this node's earlier rounds have trained."""
    adapters.load_adapter_state(model, saved.adapter)
    train.load_optimizer_state(model, optimizer, saved.optimizer)
    if distiller is not None and saved.surrogate:
        distiller.load(saved.surrogate)
        train.load_optimizer_state(model, distiller.optimizer, saved.surrogate_optimizer)


def _take(
    config: RunConfig,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    received: dict[str, Tensor],
    server_round: int,
) -> None:
    """Put what the server made of the nodes' shared weights into this node's model; mutates model and optimizer."""
    how, own = config.aggregation.combine, adapters.adapter_state(model)
    fresh = adapters.fresh_state(adapters.adapter_shapes(model), config.train.seed + server_round)
    taken, residual = take(received, how, own, fresh, adapters.scaling_of(model))
    adapters.load_adapter_state(model, taken)
    adapters.add_residual(model, residual)
    if how in ("svd", "stack"):  # other directions than those that the optimizer remembers
        train.forget_moments(model, optimizer, taken)


def _quality_before(
    config: RunConfig, model: PeftModel, heldout: Callable[[], Quality], saved: SavedRound
) -> dict[str, Quality]:
    """How good the base model, what is shared alone, and the whole are before this round's training."""
    own = adapters.adapter_state(model)
    private = {name for name in own if not adapters.is_shared(model, name, config.aggregation)}
    nothing_new = private == own.keys() and saved.number > 0
    quality = {"base": saved.quality["base"] if saved.number else _base_quality(model, heldout)}
    quality["before"] = saved.quality["after"] if nothing_new else heldout()
    if all(".lora_A." in name for name in own.keys() - private):  # nothing, or A alone: without its B it does nothing
        quality["shared"] = quality["base"]
    elif not private:
        quality["shared"] = quality["before"]
    else:
        fresh = adapters.fresh_state(adapters.adapter_shapes(model), config.train.seed)
        adapters.load_adapter_state(model, {name: fresh[name] for name in private if name in fresh})
        quality["shared"] = heldout()
        adapters.load_adapter_state(model, own)
    return quality


def _base_quality(model: PeftModel, heldout: Callable[[], Quality]) -> Quality:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with model.disable_adapter():
        quality = heldout()
    for p in frozen:  # PEFT has made all of every adapter trainable
        p.requires_grad_(False)
    return quality


def _to_save(
    server_round: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    distiller: Distiller | None,
    falls: list[float],
    quality: dict[str, Quality],
) -> SavedRound:
    return SavedRound(
        server_round,
        adapters.adapter_state(model),
        train.optimizer_state(model, optimizer),
        distiller.state() if distiller else {},
        train.optimizer_state(model, distiller.optimizer) if distiller else {},
        falls,
        quality,
    )
