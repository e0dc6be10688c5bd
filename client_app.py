"""The ClientApp: one message is one local round on one institution's data. Wiring only.

What leaves the node: to the trunk, hidden states (`fl_split.wire`); to the server, the reply built at the end of
`train`: shared adapter weights by name, numbers, and the path of the adapter on the node's own disk.
"""

import json
import logging
import os
import sys
from pathlib import Path

# Ray's workers put the folder that Flower's SuperLink was started in before the app's own: if that is a checkout of
# fl-split, they would run its code instead of the code that was submitted.
if Path(sys.argv[0]).name == "flwr-simulation":
    os.chdir(Path(__file__).resolve().parent)

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod  # noqa: E402
from flwr.clientapp.typing import ClientAppCallable  # noqa: E402

from fl_split.config import NodeConfig, RunConfig  # noqa: E402
from fl_split.errors import FLSplitError  # noqa: E402
from fl_split.files import disk_in_words  # noqa: E402
from fl_split.log import show_log  # noqa: E402
from fl_split.node.received import moved  # noqa: E402
from fl_split.node.round import Instructions, run_round  # noqa: E402

app = ClientApp()
logger = logging.getLogger("fl_split")


def clip(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip the update before it leaves the node, if the run asks for that (``dp.mode = "client-..."``)."""
    mode = _config(msg).dp.mode
    mods = {"client-fixed": fixedclipping_mod, "client-adaptive": adaptiveclipping_mod}
    return mods[mode](msg, context, call_next) if mode in mods else call_next(msg, context)


def _config(msg: Message) -> RunConfig:
    """The run's configuration as the server has it: a resumed run's own, not what this start was given."""
    return RunConfig.from_flat(json.loads(str(msg.content.config_records["config"]["run-config"])))


@app.train(mods=[clip])
def train(msg: Message, context: Context) -> Message:
    """Train this node's adapters for one round; the reply holds what `aggregation.share` names, and metrics."""
    instructions = msg.content.config_records["config"]
    received = msg.content.array_records["arrays"].to_torch_state_dict()
    show_log()
    config, name = _config(msg), f"node {context.node_config.get('partition-id', '?')}"
    told = Instructions(
        server_round=int(instructions["server-round"]),  # type: ignore[arg-type]  # the ServerApp's own
        run_name=str(instructions["run-name"]),
        run_id=str(instructions["run-id"]),
        trunk_address=str(instructions["trunk-address"]),
        share_address=str(instructions.get("share-address", "")),
        proximal_mu=float(instructions.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    try:
        own = NodeConfig.from_flat(context.node_config)
        with disk_in_words(own.folder(config, told.run_name)):
            result = run_round(config, own, received, told)
    except FLSplitError as error:
        raise type(error)(f"{name}: {error}") from None  # the text goes to the server; what led to it stays here
    except Exception as error:
        logger.exception("the round failed")
        raise FLSplitError(
            f"{name}: {type(error).__name__} on the node; its own log says more (data may be private)"
        ) from None
    clipped = config.dp.mode != "off"  # here or on the server
    reply = RecordDict(
        {
            "arrays": ArrayRecord(moved(result.shared, received) if clipped else result.shared),
            "metrics": MetricRecord({**result.metrics}),
            "node": ConfigRecord({"adapter": str(result.adapter), "scaling": result.scaling}),
        }
    )
    return Message(reply, reply_to=msg)
