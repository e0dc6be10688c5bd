"""What a node needs for a round: consent, room, the base model, the way to the trunk, the two ends with adapters."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel

from fl_split.config import Lora, NodeConfig, RunConfig
from fl_split.errors import ConfigError
from fl_split.files import cache_folder
from fl_split.model import adapters
from fl_split.model.causal import check_causal
from fl_split.model.checkpoint import node_needs, resolve_model
from fl_split.model.ends import checkpoint_activations, load_ends
from fl_split.model.packing import check_packing
from fl_split.model.slots import Trunk
from fl_split.node.expected import Expected
from fl_split.node.ledger import Ledger
from fl_split.node.replicas import Credentials
from fl_split.node.shares import SharesTrunk, Sides
from fl_split.node.trunk_cache import CachedTrunk
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.plan.fits_here import check_room
from fl_split.shares import leak_bits

logger = logging.getLogger(__name__)


def check_consent(config: RunConfig, node: NodeConfig) -> None:
    """Refuse exact gradients without the institution's own word, where there is one (a simulation cannot ask)."""
    if config.surrogate.kind == "shares":
        _check_consent_to_shares(config, node)
    if config.surrogate.kind != "exact":
        return
    if node.is_deployed and not node.allow_exact_gradient:
        raise ConfigError(
            "this run has surrogate.kind='exact', which sends dL/dh2, the gradient of this node's private loss, to the "
            "trunk: to allow it, set allow-exact-gradient=true in --node-config; else use another surrogate.kind"
        )
    logger.warning("surrogate.kind='exact': dL/dh2, the gradient of this node's private loss, goes to the trunk")


def _check_consent_to_shares(config: RunConfig, node: NodeConfig) -> None:
    if node.is_deployed and not node.allow_gradient_shares:
        raise ConfigError(
            "this run has surrogate.kind='shares', which sends hidden states to two trunks, and to each a share of "
            "dL/dh2, the gradient of this node's private loss: to allow it, set allow-gradient-shares=true in "
            "--node-config; else use another surrogate.kind"
        )
    logger.warning(
        "surrogate.kind='shares': hidden states go to two trunks, and to each a share of dL/dh2, the gradient of this "
        "node's private loss. Alone, a share says at most %.2g bits of a sequence's. This holds only while the two "
        "operators do not collude: together they have the gradient",
        leak_bits(config.surrogate.mask_std),
    )


def check_demo_data(config: RunConfig, node: NodeConfig) -> None:
    """Refuse to train on the demo's invented data where a data-path was forgotten or misspelt.

    Raises:
        ConfigError: A deployed node, or another model than the demo's, is left with `data.path = "demo"`.
    """
    if node.data_path or config.data.path != "demo":
        return
    text = "this node has no data-path, and the run's data.path='demo' is the demo's invented data"
    if node.is_deployed:
        raise ConfigError(f"{text}, not an institution's: set data-path in --node-config")
    if config.model.name != "demo":
        raise ConfigError(
            f"{text}, for model.name='demo', not {config.model.name!r}: set data.path, or data-path in --node-config"
        )


def warn_of_room(config: RunConfig, node: NodeConfig) -> None:
    """Say before the first round what `fl-split doctor` would have said of memory and disk."""
    for check in check_room(config, node):
        if check.status == "fail":
            logger.warning("%s: %s", check.name, check.text)


def find_model(config: RunConfig) -> Path:
    """Find the folder of the base model, fetching what a node needs of it; `config` has its split chosen.

    Raises:
        ConfigError: There is no such model.
    """
    split, surrogate = config.split, config.surrogate
    needs = node_needs(split.bottom_layers, split.top_layers, surrogate.kind, surrogate.layers)
    return resolve_model(config.model.name, config.model.revision, needs)


def connect(
    config: RunConfig, node: NodeConfig, folder: Path, address: str, stack: ExitStack, ledger: Ledger | None = None
) -> tuple[TrunkConnection, Expected]:
    """Reach the trunk and check that it is the run's.

    Args:
        config: The run's, with its split chosen.
        node: Its address of the trunk comes first.
        folder: The base model's.
        address: Where the server says that the trunk is.
        stack: Closes the connection.
        ledger: Every message is noted there before it is sent.

    Raises:
        TrunkError: It cannot be reached, is another, or does not let this node in.
    """
    expected = Expected.from_checkpoint(folder, config.split.bottom_layers, config.split.top_layers)
    make = _maker(config, expected, ledger)
    connection = stack.enter_context(make(node.trunk_address or address, credentials=_credentials(node)))
    connection.connect()
    return connection, expected


def connect_shares(
    config: RunConfig,
    node: NodeConfig,
    folder: Path,
    addresses: tuple[str, str],
    stack: ExitStack,
    ledger: Ledger | None = None,
) -> SharesTrunk:
    """Reach the two trunks that a gradient's shares go to; arguments and errors as of `connect`.

    Raises:
        ConfigError: The two are not apart.
    """
    places = (node.trunk_address or addresses[0], node.trunk_share_address or addresses[1])
    credentials = (
        _credentials(node),
        Credentials(
            node.trunk_share_ca,
            node.trunk_share_cert,
            node.trunk_share_key,
            node.trunk_share_token_file,
            operator_key=node.trunk_share_operator_key,
            verifier=node.trunk_share_verifier,
        ),
    )
    first_shows, second_shows = ((bool(own.operator_key), bool(own.verifier)) for own in credentials)
    if first_shows != second_shows:
        raise ConfigError(
            "surrogate.kind='shares' sends hidden states to two trunks, and only one of them has to show who runs it: "
            "set trunk-operator-key and trunk-share-operator-key, trunk-verifier and trunk-share-verifier, together"
        )
    sides = Sides(places, credentials)
    make = _maker(config, Expected.from_checkpoint(folder, config.split.bottom_layers, config.split.top_layers), ledger)
    first, second = (
        stack.enter_context(make(place, credentials=own, meet=partial(sides.meet, side)))
        for side, (place, own) in enumerate(zip(places, credentials, strict=True))
    )
    return SharesTrunk(first, second, config.surrogate.mask_std)


def _maker(config: RunConfig, expected: Expected, ledger: Ledger | None) -> Callable[..., TrunkConnection]:
    """What all connections of a run have in common; what is left is an address, credentials, and `meet`."""
    how = config.trunk
    return partial(
        TrunkConnection,
        expected=expected,
        wire_dtype=how.wire_dtype,
        timeout_s=how.timeout_s,
        in_flight=how.in_flight,
        ledger=ledger,
    )


def _credentials(node: NodeConfig) -> Credentials:
    return Credentials(
        node.trunk_ca,
        node.trunk_cert,
        node.trunk_key,
        node.trunk_token_file,
        node.trunk_allow_plaintext,
        node.trunk_operator_key,
        node.trunk_verifier,
    )


def with_cache(
    config: RunConfig, connection: TrunkConnection, expected: Expected, home: Path, stack: ExitStack
) -> Trunk:
    """Put a cache before the trunk where the bottom is frozen: then each example is asked about once."""
    if config.surrogate.trains_bottom or not config.trunk.cache_mb:
        return connection
    salt = f"{expected}|{connection.trunk_id.hex()}|{config.trunk.wire_dtype}".encode()  # its precision is in its id
    cache = CachedTrunk(connection, home / "trunk-cache.sqlite", config.trunk.cache_mb * 1_000_000, salt)
    stack.callback(cache.close)
    return cache


def fetch_matched(config: RunConfig, connection: TrunkConnection) -> Path | None:
    """The surrogate that the trunk publishes, if the run uses that."""
    return connection.fetch_surrogate(cache_folder() / "surrogates") if config.surrogate.kind == "matched" else None


def build_model(
    config: RunConfig, lora: Lora, folder: Path, trunk: Trunk, pad_token_id: int | None, matched: Path | None = None
) -> PeftModel:
    """Load the two ends with their adapters, on the device that there is."""
    model = load_ends(
        folder,
        config.split.bottom_layers,
        config.split.top_layers,
        trunk,
        surrogate=config.surrogate.planned,
        surrogate_layers=config.surrogate.layers,
        matched=matched,
        dtype=config.model.torch_dtype,
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
    if not config.surrogate.trains_bottom:
        logger.warning(
            "surrogate.kind='none': the bottom stays frozen, without an adapter, because nothing on this node can give "
            "it a gradient; only the top is trained"
        )
    adapted = adapters.attach(model, lora, train_bottom=config.surrogate.trains_bottom, seed=config.train.seed)
    if config.aggregation.tensors == "b-only":
        adapters.freeze_a(adapted, config.aggregation.share)
    return adapted
