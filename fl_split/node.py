"""One node's round, from its configuration to what it gives away.

Data path: config -> private examples -> client model with adapters -> local round -> own disk -> shared part, metrics.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fl_split import adapters, data, train
from fl_split.checkpoint import resolve_model
from fl_split.config import NodeConfig, RunConfig
from fl_split.runs import NodeFolder
from fl_split.split import load_client
from fl_split.trunk.client import Credentials, Expected, TrunkClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a node gives away after a round."""

    shared: dict[str, Tensor]  # adapter weights that `aggregation.share` names
    metrics: dict[str, int | float]  # numbers about the round
    adapter: Path  # the export, on the node's own disk


def run_round(
    config: RunConfig,
    node: NodeConfig,
    received: dict[str, Tensor],
    *,
    server_round: int,
    run_name: str,
    run_id: str,
    trunk_address: str,
) -> RoundResult:
    """Train one node for one round and keep the result on its disk.

    Args:
        config: The run's configuration.
        node: The node's own values; they come before the run's.
        received: Shared adapter weights from the server; empty before the first aggregation.
        server_round: Number of the round, from 1.
        run_name: Folder of the run.
        run_id: Identity of the run: state of another run of the same name is left alone.
        trunk_address: Where the server says that the trunk is.

    Raises:
        FLSplitError: Anything that a person can mend; the text holds no private data.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = resolve_model(config.model.name, config.model.revision)
    tokenizer = data.prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    seed = config.train.seed
    examples = data.load_examples(config.data, node, tokenizer, seed)
    expected = Expected.from_checkpoint(folder, config.split.bottom_layers, config.split.top_layers)
    home = node.folder(config, run_name)
    store = NodeFolder(home, run_id)

    address = node.trunk_address or trunk_address
    with TrunkClient(
        address,
        expected,
        wire_dtype=config.trunk.wire_dtype,
        timeout_s=config.trunk.timeout_s,
        in_flight=config.trunk.in_flight,
        credentials=_credentials(node),
    ) as trunk:
        trunk.connect()
        model = _build_model(config, folder, trunk)
        optimizer = train.make_optimizer(model, config.train)
        rounds_done = _restore(model, optimizer, store, server_round)
        adapters.load_adapter_state(model, received)

        before = train.evaluate(model, _heldout(config, examples, tokenizer), config.trunk.in_flight)
        torch.manual_seed(hash((seed, server_round, node.partition_id)))  # of dropout
        first_step = (server_round - 1) * config.train.steps
        drawn = first_step * config.train.batch_size * config.train.accumulation
        batches = data.training_batches(
            examples.train, tokenizer, config.train.batch_size, hash((seed, node.partition_id)), drawn
        )
        trained = train.train_round(
            model,
            optimizer,
            batches,
            config.train,
            first_step=first_step,
            total_steps=config.num_server_rounds * config.train.steps,
            in_flight=config.trunk.in_flight,
        )
        after = train.evaluate(model, _heldout(config, examples, tokenizer), config.trunk.in_flight)

    store.save(server_round, adapters.adapter_state(model), train.optimizer_state(model, optimizer))
    card = _card(config, node, server_round, before, after, len(examples.train))
    adapters.export(model, store.adapter, _base_name(config, folder), config.model.revision, card)
    metrics: dict[str, int | float] = {
        "partition-id": node.partition_id,
        "num-examples": len(examples.train),
        "train-loss": trained.loss,
        "heldout-loss-before": before,
        "heldout-loss-after": after,
        "train-tokens": trained.num_tokens,
        "tokens-per-s": trained.num_tokens / trained.seconds,
        "train-s": trained.seconds,
        "trunk-forward-s": trunk.forward_s,
        "activation-bytes": trunk.bytes_sent,
        "rounds-missed": server_round - 1 - rounds_done,
    }
    return RoundResult(adapters.shared_state(model, config.aggregation.share), metrics, store.adapter)


def _build_model(config: RunConfig, folder: Path, trunk: TrunkClient) -> PeftModel:
    client = load_client(
        folder,
        config.split.bottom_layers,
        config.split.top_layers,
        trunk,
        surrogate=config.surrogate.kind,
        surrogate_layers=config.surrogate.layers,
        dtype=getattr(torch, config.model.dtype),
    )
    torch.nn.Module.to(client, "cuda" if torch.cuda.is_available() else "cpu")
    trains_bottom = config.surrogate.kind != "none"
    if not trains_bottom:
        logger.warning(
            "surrogate.kind='none': the bottom stays frozen, without an adapter, because nothing on this node can give "
            "it a gradient; only the top is trained"
        )
    return adapters.attach(client, config.lora, train_bottom=trains_bottom, seed=config.train.seed)


def _restore(model: PeftModel, optimizer: torch.optim.Optimizer, store: NodeFolder, server_round: int) -> int:
    """Put back what this node's earlier rounds have trained; returns the number of the newest of them, or 0."""
    saved = store.load_before(server_round)
    if saved is None:
        return 0
    number, adapter, optimizer_tensors = saved
    adapters.load_adapter_state(model, adapter)
    train.load_optimizer_state(model, optimizer, optimizer_tensors)
    return number


def _credentials(node: NodeConfig) -> Credentials:
    return Credentials(
        node.trunk_ca, node.trunk_cert, node.trunk_key, node.trunk_token_file, node.trunk_allow_plaintext
    )


def _heldout(config: RunConfig, examples: data.Examples, tokenizer: PreTrainedTokenizerBase) -> Iterable[data.Batch]:
    return data.heldout_batches(examples.heldout, tokenizer, config.train.batch_size)


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
