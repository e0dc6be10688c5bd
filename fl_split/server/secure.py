"""The server's side of `aggregation.secure`: it passes keys on, and learns the mean of what is shared, no node's part.

Data path: keys of all nodes -> to each of them; masked replies -> **sum, mean** -> strategy, in every node's place.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fl_split.errors import AggregationError, RoundFailed
from fl_split.ring import WEIGHT, Ring, add, from_ring


def collect_keys(
    grid: Grid, nodes: Sequence[int], about: ConfigRecord, timeout: float, reason: Callable[[int, str | None], str]
) -> ConfigRecord:
    """Ask each node for its key of this round.

    Args:
        grid: Flower's own.
        nodes: All that take part.
        about: The round's instructions.
        timeout: Seconds to wait.
        reason: A node's error for people.

    Returns:
        What goes to each node beside its instructions.

    Raises:
        RoundFailed: A node has none.
    """
    messages = [Message(RecordDict({"config": about}), node, "query.keys") for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    wrong = [reply for reply in replies if reply.has_error()]
    if wrong or len(replies) < len(nodes):
        text = "".join(f"\n  {reason(reply.metadata.src_node_id, reply.error.reason)}" for reply in wrong)
        raise RoundFailed(
            f"aggregation.secure=true: {len(replies) - len(wrong)} of {len(nodes)} nodes have sent a key for their "
            f"masks, and all must; nothing of earlier rounds is lost, go on with run.resume=true{text}"
        )
    keys = [reply.content.config_records["key"] for reply in replies]
    return ConfigRecord({name: [bytes(key[name]) for key in keys] for name in ("public", "identity", "signature")})  # type: ignore[arg-type]


def unmask(replies: Iterable[Message]) -> None:
    """Put the mean of all nodes in each one's place: strategies that are linear make the same of it.

    Args:
        replies: Of all nodes whose masks cancel; mutated.

    Raises:
        AggregationError: Masks do not cancel, or nodes share different arrays.
    """
    replies = list(replies)
    parts = [
        {name: value.numpy() for name, value in reply.content.array_records["arrays"].items()} for reply in replies
    ]
    shared = ArrayRecord(mean(parts))
    for reply in replies:
        reply.content["arrays"] = shared


def mean(parts: Sequence[dict[str, Ring]]) -> dict[str, Tensor]:
    """The weighted mean of masked arrays.

    Raises:
        AggregationError: See `unmask`.
    """
    shapes = [{name: value.shape for name, value in part.items()} for part in parts]
    odd = [
        name for other in shapes for name in other.keys() | shapes[0].keys() if other.get(name) != shapes[0].get(name)
    ]
    if odd or WEIGHT not in shapes[0]:
        raise AggregationError(
            f"nodes have masked different arrays, such as {min(odd, default=WEIGHT)}: all need the same lora.rank, and "
            "the same version of fl-split"
        )
    total = {name: add([part[name] for part in parts]) for name in parts[0]}
    steps = int(total.pop(WEIGHT)[0])
    weight = steps >> 32
    if steps != weight << 32 or not len(parts) <= weight:
        raise AggregationError(
            "the masks of this round do not cancel: nodes were told different things, or one has sent a message of "
            "another round; nothing of earlier rounds is lost, go on with run.resume=true"
        )
    return {name: torch.tensor(from_ring(value) / weight, dtype=torch.float32) for name, value in total.items()}
