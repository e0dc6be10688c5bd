"""One node's round, from its configuration to what it gives away.

Data path: config -> private examples -> client model with adapters -> local round -> own disk -> shared part, metrics.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fl_split import adapters, data, train
from fl_split.checkpoint import resolve_model
from fl_split.config import NodeConfig, RunConfig
from fl_split.descent import Descent, DescentProbe, warn_if_stuck
from fl_split.errors import ConfigError
from fl_split.runs import NodeFolder, SavedRound, cache_folder
from fl_split.split import Trunk, load_client
from fl_split.surrogate import Distiller
from fl_split.trunk.cache import CachedTrunk
from fl_split.trunk.client import Credentials, Expected, TrunkClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a node gives away after a round."""

    shared: dict[str, Tensor]  # adapter weights that `aggregation.share` names
    metrics: dict[str, int | float]  # numbers about the round
    adapter: Path  # the export, on the node's own disk


@dataclass(frozen=True)
class Instructions:
    """What the server says of a round."""

    server_round: int  # from 1
    run_name: str  # folder of the run
    run_id: str  # identity of the run: state of another run of the same name is left alone
    trunk_address: str  # where the server says that the trunk is


def run_round(
    config: RunConfig, node: NodeConfig, received: dict[str, Tensor], instructions: Instructions
) -> RoundResult:
    """Train one node for one round and keep the result on its disk.

    Args:
        config: The run's configuration.
        node: The node's own values; they come before the run's.
        received: Shared adapter weights from the server; empty before the first aggregation.
        instructions: Which round, and of which run.

    Raises:
        FLSplitError: Anything that a person can mend; the text holds no private data.
    """
    transformers_logging.disable_progress_bar()
    _check_consent(config, node)
    folder = resolve_model(config.model.name, config.model.revision)
    tokenizer = data.prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    examples = data.load_examples(config.data, node, tokenizer, config.train.seed)
    home = node.folder(config, instructions.run_name)
    store = NodeFolder(home, instructions.run_id)
    server_round, in_flight = instructions.server_round, config.trunk.in_flight

    with ExitStack() as stack:
        client, expected = _connect(config, node, folder, instructions.trunk_address, stack)
        trunk = _with_cache(config, client, expected, home, stack)
        model = _build_model(config, folder, client, trunk)
        optimizer = train.make_optimizer(model, config.train)
        distiller = _make_distiller(config, model)
        saved = store.load_before(server_round) or SavedRound(0)
        _restore(model, optimizer, distiller, saved)
        adapters.load_adapter_state(model, received)

        def heldout() -> float:
            batches = data.heldout_batches(examples.heldout, tokenizer, config.train.batch_size)
            return train.evaluate(model, batches, in_flight)

        def batches(seed: int, first: int) -> Iterator[data.Batch]:
            return data.training_batches(examples.train, tokenizer, config.train.batch_size, seed, first)

        before = heldout()
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
        )
        descent = probe.ask() if probe else Descent(0.0, 0.0)
        after = heldout()

    falls = [*saved.falls, descent.measured]
    if probe:
        warn_if_stuck(falls, config.surrogate.kind)
    store.save(_to_save(server_round, model, optimizer, distiller, falls))
    card = _card(config, node, server_round, before, after, len(examples.train))
    adapters.export(model, store.adapter, _base_name(config, folder), config.model.revision, card)
    metrics: dict[str, int | float] = {
        "partition-id": node.partition_id,
        "num-examples": len(examples.train),
        "train-loss": trained.loss,
        "heldout-loss-before": before,
        "heldout-loss-after": after,
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
    return RoundResult(adapters.shared_state(model, config.aggregation.share), metrics, store.adapter)


def _check_consent(config: RunConfig, node: NodeConfig) -> None:
    """Exact gradients need the institution's own word, wherever it speaks for itself (a simulation cannot ask)."""
    if config.surrogate.kind != "exact":
        return
    if (node.data_path or node.out_dir) and not node.allow_exact_gradient:
        raise ConfigError(
            "this run has surrogate.kind='exact', which sends dL/dh2, the gradient of this node's private loss, to the "
            "trunk: to allow it, set allow-exact-gradient=true in --node-config; else use another surrogate.kind"
        )
    logger.warning("surrogate.kind='exact': dL/dh2, the gradient of this node's private loss, goes to the trunk")


def _connect(
    config: RunConfig, node: NodeConfig, folder: Path, address: str, stack: ExitStack
) -> tuple[TrunkClient, Expected]:
    expected = Expected.from_checkpoint(folder, config.split.bottom_layers, config.split.top_layers)
    client = TrunkClient(
        node.trunk_address or address,
        expected,
        wire_dtype=config.trunk.wire_dtype,
        timeout_s=config.trunk.timeout_s,
        in_flight=config.trunk.in_flight,
        credentials=Credentials(
            node.trunk_ca, node.trunk_cert, node.trunk_key, node.trunk_token_file, node.trunk_allow_plaintext
        ),
    )
    stack.enter_context(client)
    client.connect()
    return client, expected


def _with_cache(config: RunConfig, client: TrunkClient, expected: Expected, home: Path, stack: ExitStack) -> Trunk:
    """A frozen bottom asks the trunk about each example once."""
    if config.surrogate.kind != "none" or not config.trunk.cache_mb:
        return client
    salt = f"{expected}|{config.trunk.wire_dtype}".encode()
    cache = CachedTrunk(client, home / "trunk-cache.sqlite", config.trunk.cache_mb * 1_000_000, salt)
    stack.callback(cache.close)
    return cache


def _build_model(config: RunConfig, folder: Path, client: TrunkClient, trunk: Trunk) -> PeftModel:
    kind = config.surrogate.kind
    model = load_client(
        folder,
        config.split.bottom_layers,
        config.split.top_layers,
        trunk,
        surrogate=kind,
        surrogate_layers=config.surrogate.layers,
        matched=client.fetch_surrogate(cache_folder() / "surrogates") if kind == "matched" else None,
        dtype=getattr(torch, config.model.dtype),
    )
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "none":
        logger.warning(
            "surrogate.kind='none': the bottom stays frozen, without an adapter, because nothing on this node can give "
            "it a gradient; only the top is trained"
        )
    return adapters.attach(model, config.lora, train_bottom=kind != "none", seed=config.train.seed)


def _make_distiller(config: RunConfig, model: PeftModel) -> Distiller | None:
    surrogate = config.surrogate
    if surrogate.kind == "distilled" or (surrogate.kind == "matched" and surrogate.distill):
        return train.make_distiller(model, surrogate.distill_lr)
    return None


def _restore(
    model: PeftModel, optimizer: torch.optim.Optimizer, distiller: Distiller | None, saved: SavedRound
) -> None:
    """Put back what this node's earlier rounds have trained."""
    adapters.load_adapter_state(model, saved.adapter)
    train.load_optimizer_state(model, optimizer, saved.optimizer)
    if distiller is not None and saved.surrogate:
        distiller.load(saved.surrogate)
        train.load_optimizer_state(model, distiller.optimizer, saved.surrogate_optimizer)


def _to_save(
    server_round: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    distiller: Distiller | None,
    falls: list[float],
) -> SavedRound:
    return SavedRound(
        server_round,
        adapters.adapter_state(model),
        train.optimizer_state(model, optimizer),
        distiller.state() if distiller else {},
        train.optimizer_state(model, distiller.optimizer) if distiller else {},
        falls,
    )


def _base_name(config: RunConfig, folder: Path) -> str:
    """What the export names as its base: a hub id as it is, a local folder by its path."""
    is_local = config.model.name == "demo" or config.model.name.startswith(("/", "~"))
    return str(folder) if is_local else config.model.name


def _card(
    config: RunConfig, node: NodeConfig, server_round: int, before: float, after: float, num_examples: int
) -> str:
    revision = config.model.revision or "default"
    return f"""---
library_name: peft
base_model: {config.model.name}
---

# LoRA adapter of node {node.partition_id}

Trained with fl-split on the first {config.split.bottom_layers} and last {config.split.top_layers} layers.

| | |
|---|---|
| base model | {config.model.name} (revision: {revision}) |
| node | {node.partition_id} of {node.num_partitions} |
| rounds | {server_round} of {config.num_server_rounds}, {config.train.steps} steps each |
| training examples | {num_examples} |
| surrogate | {config.surrogate.kind} |
| rank, alpha | {config.lora.rank}, {config.lora.alpha:g} |
| held-out loss before and after the last round | {before:.4f}, {after:.4f} |
| shared with other nodes | {config.aggregation.share} |
"""
