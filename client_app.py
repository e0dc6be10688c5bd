"""The ClientApp: one message is one local round on one institution's data. Wiring only.

What leaves the node: to the trunk, hidden states (`fl_split.wire`); to the server, the reply built at the end of
`train`: shared adapter weights by name, under masks with `aggregation.secure`, numbers, and what the adapter is called.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ray's workers put the folder that Flower's SuperLink was started in before the app's own: if that is a checkout of
# fl-split, they would run its code instead of the code that was submitted.
if Path(sys.argv[0]).name == "flwr-simulation":
    os.chdir(Path(__file__).resolve().parent)

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod  # noqa: E402
from flwr.clientapp.typing import ClientAppCallable  # noqa: E402

from fl_split.config import NodeConfig, RunConfig  # noqa: E402
from fl_split.errors import ConfigError, FLSplitError  # noqa: E402
from fl_split.files import disk_in_words  # noqa: E402
from fl_split.log import show_log  # noqa: E402
from fl_split.node.ledger import NAME, Ledger  # noqa: E402
from fl_split.node.masks import Identity, SignedKey, agree, digest, mask, sign_key  # noqa: E402
from fl_split.node.ready import Instructions  # noqa: E402
from fl_split.node.received import moved  # noqa: E402
from fl_split.node.round import run_round  # noqa: E402

app = ClientApp()
logger = logging.getLogger("fl_split")


def clip(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip the update before it leaves the node, if the run asks for that (``dp.mode = "client-..."``)."""
    mode = _config(msg).dp.mode
    mods = {"client-fixed": fixedclipping_mod, "client-adaptive": adaptiveclipping_mod}
    return mods[mode](msg, context, call_next) if mode in mods else call_next(msg, context)


def conceal(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mask what leaves the node, clipped or not, if the run asks for that (``aggregation.secure``)."""
    config = _config(msg)
    if not config.aggregation.secure:
        return call_next(msg, context)
    with _explained(msg, context):
        node, told = NodeConfig.from_flat(context.node_config), msg.content.config_records["config"]
        records = msg.content.config_records["keys"]
        del msg.content["keys"]  # Flower's clipping takes one ConfigRecord and no other
        given = zip(*(records[name] for name in ("public", "identity", "signature")), strict=True)
        signed_keys = [SignedKey(*map(bytes, each)) for each in given]
        received = msg.content.array_records["arrays"].to_torch_state_dict()
        all_told = digest(received, *(str(told[name]) for name in sorted(told)))
        secrets = agree(Identity.of(node), _folder(config, node, msg), _about(msg), signed_keys, all_told)
    reply = call_next(msg, context)
    if reply.has_error():  # Flower's clipping answers so
        return reply
    with _explained(msg, context):
        shared = reply.content.array_records["arrays"].to_torch_state_dict()
        weight = int(reply.content.metric_records["metrics"]["weight"])  # type: ignore[arg-type]
        hidden = mask(shared, weight, secrets)
        reply.content["arrays"] = ArrayRecord({name: Array(value) for name, value in hidden.items()})
    return reply


def account(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Write down what leaves for the server, as it leaves."""
    reply = call_next(msg, context)
    with _explained(msg, context):
        if reply.has_error():  # Flower's clipping answers so
            _ledger(msg, context).note("server", "error", len((reply.error.reason or "").encode()))
            return reply
        ledger = _ledger(msg, context)
        for name, record in reply.content.items():
            ledger.note("server", {"arrays": "shared-adapter"}.get(name, name), record.count_bytes())
    return reply


@app.query("keys", mods=[account])
def keys(msg: Message, context: Context) -> Message:
    """Make this node's key of a round's masks; the public one leaves, signed."""
    with _explained(msg, context):
        node = NodeConfig.from_flat(context.node_config)
        signed = sign_key(Identity.of(node), _folder(_config(msg), node, msg), _about(msg))
    return Message(RecordDict({"key": ConfigRecord({**vars(signed)})}), reply_to=msg)


def _about(msg: Message) -> bytes:
    told = msg.content.config_records["config"]
    return f"{told['run-id']!s} {told['server-round']!s}\n".encode()


def _folder(config: RunConfig, node: NodeConfig, msg: Message) -> Path:
    return node.folder(config, str(msg.content.config_records["config"]["run-name"]))


def _ledger(msg: Message, context: Context) -> Ledger:
    """Where this node writes down what leaves it.

    Raises:
        ConfigError: The node's configuration cannot be used.
    """
    number = int(msg.content.config_records["config"]["server-round"])  # type: ignore[arg-type]  # the ServerApp's own
    return Ledger(_folder(_config(msg), NodeConfig.from_flat(context.node_config), msg) / NAME, number)


@contextmanager
def _explained(msg: Message, context: Context) -> Iterator[None]:
    """Make errors safe to leave the node: their text goes to the server, what led to them stays here."""
    name = f"node {context.node_config.get('partition-id', '?')}"
    try:
        with disk_in_words(_folder(_config(msg), NodeConfig.from_flat(context.node_config), msg)):
            yield
        return
    except FLSplitError as error:
        kind, text = type(error), f"{name}: {error}"
    except Exception as error:
        logger.exception("the round failed")
        kind = FLSplitError
        text = f"{name}: {type(error).__name__} on the node; its own log says more (data may be private)"
    with suppress(ConfigError, OSError):  # of a node without a folder, or on a full disk, there is nowhere to write
        _ledger(msg, context).note("server", "error", len(text.encode()))
    raise kind(text)


def _config(msg: Message) -> RunConfig:
    """The run's configuration as the server has it: a resumed run's own, not what this start was given."""
    return RunConfig.from_flat(json.loads(str(msg.content.config_records["config"]["run-config"])))


@app.train(mods=[account, conceal, clip])
def train(msg: Message, context: Context) -> Message:
    """Train this node's adapters for one round; the reply holds what `aggregation.share` names, and metrics."""
    instructions = msg.content.config_records["config"]
    received = msg.content.array_records["arrays"].to_torch_state_dict()
    show_log()
    config = _config(msg)
    with _explained(msg, context):
        result = run_round(
            config,
            NodeConfig.from_flat(context.node_config),
            received,
            Instructions(
                server_round=int(instructions["server-round"]),  # type: ignore[arg-type]  # the ServerApp's own
                run_name=str(instructions["run-name"]),
                run_id=str(instructions["run-id"]),
                trunk_address=str(instructions["trunk-address"]),
                share_address=str(instructions.get("share-address", "")),
                proximal_mu=float(instructions.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
            ),
        )
    clipped = config.dp.mode != "off"  # here or on the server
    # What `dp.record-*` comes to is not on every node, and Flower wants the same metrics of all.
    own = {key: value for key, value in result.metrics.items() if key.startswith("record-")}
    metrics = {key: value for key, value in result.metrics.items() if key not in own}
    reply = RecordDict(
        {
            "arrays": ArrayRecord(moved(result.shared, received) if clipped else result.shared),
            "metrics": MetricRecord({**metrics}),
            "node": ConfigRecord({"adapter": result.adapter, "scaling": result.scaling, **own}),
        }
    )
    return Message(reply, reply_to=msg)
