"""A node's model for a round: the way to the trunk, the two ends around it, adapters, a surrogate that learns."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel

from fl_split.config import Lora, NodeConfig, RunConfig
from fl_split.errors import ConfigError
from fl_split.files import cache_folder
from fl_split.model import adapters
from fl_split.model.causal import check_causal
from fl_split.model.client import checkpoint_activations, load_client
from fl_split.model.distill import Distiller
from fl_split.model.packing import check_packing
from fl_split.model.slots import Trunk
from fl_split.node import train
from fl_split.node.expected import Expected
from fl_split.node.replicas import Credentials
from fl_split.node.trunk_cache import CachedTrunk
from fl_split.node.trunk_client import TrunkClient

logger = logging.getLogger(__name__)


def check_consent(config: RunConfig, node: NodeConfig) -> None:
    """Exact gradients need the institution's own word, wherever it speaks for itself (a simulation cannot ask)."""
    if config.surrogate.kind != "exact":
        return
    if (node.data_path or node.out_dir) and not node.allow_exact_gradient:
        raise ConfigError(
            "this run has surrogate.kind='exact', which sends dL/dh2, the gradient of this node's private loss, to the "
            "trunk: to allow it, set allow-exact-gradient=true in --node-config; else use another surrogate.kind"
        )
    logger.warning("surrogate.kind='exact': dL/dh2, the gradient of this node's private loss, goes to the trunk")


def connect(
    config: RunConfig, node: NodeConfig, folder: Path, address: str, stack: ExitStack
) -> tuple[TrunkClient, Expected]:
    """Reach the trunk and check that it is the run's.

    Args:
        config: The run's, with its split chosen.
        node: Its address of the trunk comes first.
        folder: The base model's.
        address: Where the server says that the trunk is.
        stack: Closes the client.

    Raises:
        TrunkError: It cannot be reached, is another, or does not let this node in.
    """
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


def with_cache(config: RunConfig, client: TrunkClient, expected: Expected, home: Path, stack: ExitStack) -> Trunk:
    """A frozen bottom asks the trunk about each example once."""
    if config.surrogate.kind != "none" or not config.trunk.cache_mb:
        return client
    salt = f"{expected}|{client.trunk_id.hex()}|{config.trunk.wire_dtype}".encode()  # its precision is in its id
    cache = CachedTrunk(client, home / "trunk-cache.sqlite", config.trunk.cache_mb * 1_000_000, salt)
    stack.callback(cache.close)
    return cache


def build_model(
    config: RunConfig, lora: Lora, folder: Path, client: TrunkClient, trunk: Trunk, pad_token_id: int | None
) -> PeftModel:
    """The two ends with their adapters, on the device that there is."""
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
        labels=config.data.label_names,
        seed=config.train.seed,
    )
    model.config.pad_token_id = pad_token_id  # a decoder classifies by the last token that is not padding
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    if config.task == "causal-lm":
        check_causal(model)
    if config.data.packing:
        check_packing(model)
    if kind == "none":
        logger.warning(
            "surrogate.kind='none': the bottom stays frozen, without an adapter, because nothing on this node can give "
            "it a gradient; only the top is trained"
        )
    adapted = adapters.attach(model, lora, train_bottom=kind != "none", seed=config.train.seed)
    if config.aggregation.tensors == "b-only":
        adapters.freeze_a(adapted, config.aggregation.share)
    return adapted


def make_distiller(config: RunConfig, model: PeftModel) -> Distiller | None:
    """What trains the surrogate on the way, if the run asks for it; mutates the model."""
    surrogate = config.surrogate
    if surrogate.kind == "distilled" or (surrogate.kind == "matched" and surrogate.distill):
        return train.make_distiller(model, surrogate.distill_lr, surrogate.probe_every)
    return None
