"""Rounds around one of Flower's strategies: they are recorded, go on from earlier ones, and never fail in silence."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_split.config import Lora
from fl_split.errors import ConfigError, RoundFailed
from fl_split.server.aggregation import check, check_scaling
from fl_split.server.flower import ProductAveraging, privacy_spent, server_state, updates_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRound:
    """What the server keeps of a round."""

    number: int  # from 1
    shared: dict[str, Tensor]  # what nodes get next
    nodes: list[dict[str, Any]]  # metrics, one dict per node, by partition
    server_state: dict[str, Tensor]  # of the server's own optimizer
    epsilon: float | None = None  # privacy spent so far


class SplitStrategy(Strategy):
    """Rounds around one of Flower's strategies: goes on from an earlier round, refuses rounds with too few nodes.

    Args:
        inner: What combines the shared arrays, from `flower_strategy`.
        lora: The run's adapters.
        min_nodes: Nodes that must be there and finish each round.
        node_wait_s: Seconds to wait for them at the start of a round.
        round_timeout: Seconds that Flower waits for replies, for messages.
        round_offset: Rounds finished before this start.
        on_round: Called with each finished round.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        lora: Lora,
        min_nodes: int,
        node_wait_s: float,
        round_timeout: float,
        round_offset: int,
        on_round: Callable[[FinishedRound], None],
    ) -> None:
        self._inner, self._lora, self._min_nodes, self._node_wait_s = inner, lora, min_nodes, node_wait_s
        self._round_timeout, self._round_offset, self._on_round = round_timeout, round_offset, on_round
        self._asked: list[Metadata] = []  # of this round's messages; Flower gives them their ids in place

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes for the round; Flower's strategies would wait for missing nodes without end."""
        deadline = time.monotonic() + self._node_wait_s
        while len(nodes := list(grid.get_node_ids())) < self._min_nodes:
            if time.monotonic() > deadline:
                raise RoundFailed(
                    f"{len(nodes)} of the {self._min_nodes} nodes that aggregation.min-nodes asks for came within "
                    f"run.node-wait-s={self._node_wait_s:g}: start the missing nodes, or lower aggregation.min-nodes"
                )
            time.sleep(0.5)
        seen = cast(Grid, SimpleNamespace(get_node_ids=lambda: nodes))  # of those one may leave, and Flower would wait
        messages = list(self._inner.configure_train(server_round + self._round_offset, arrays, config, seen))
        self._asked = [message.metadata for message in messages]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine what was shared and record the round.

        Raises:
            RoundFailed: Fewer than `min_nodes` nodes finished; Flower would report success.
            ConfigError: Two nodes have the same number.
            AggregationError: What they share does not belong together.
        """
        number, replies = server_round + self._round_offset, list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        done = [reply for reply in replies if not reply.has_error()]
        missing = self._missing(replies)
        if len(done) < self._min_nodes:
            reasons = "".join(f"\n  node {node}: {reason}" for node, reason in missing.items())
            raise RoundFailed(
                f"round {number}: {len(done)} nodes finished, but aggregation.min-nodes is "
                f"{self._min_nodes}; nothing of earlier rounds is lost, go on with run.resume=true{reasons}"
            )
        for node, reason in missing.items():
            logger.warning("round %d goes on without node %d: %s", number, node, reason)
        done.sort(key=_partition)  # replies come in any order, and sums round differently in another
        nodes = [_node_metrics(number, reply) for reply in done]
        _check_numbers(nodes)
        updates = updates_of(done)
        check_scaling(updates, self._lora.alpha, self._lora.variant == "rslora")
        if not isinstance(self._inner, ProductAveraging) and any(update.arrays for update in updates):
            check(updates, "mean")
        arrays, metrics = self._inner.aggregate_train(number, done + failed)
        if arrays is None:
            raise RoundFailed(
                f"round {number}: {type(self._inner).__name__} combined nothing, because a node failed or too few "
                "finished; nothing of earlier rounds is lost, go on with run.resume=true"
            )
        shared = {name: torch.tensor(arrays[name].numpy(), dtype=torch.float32) for name in sorted(arrays)}
        state, epsilon = server_state(self._inner, list(shared)), privacy_spent(self._inner)
        self._on_round(FinishedRound(number, shared, nodes, state, epsilon))
        return ArrayRecord(shared), metrics

    def _missing(self, replies: list[Message]) -> dict[int, str]:
        """Find the nodes that were asked and have not finished, and why."""
        asked = {metadata.message_id: metadata.dst_node_id for metadata in self._asked}
        reasons = dict.fromkeys(asked.values(), f"did not answer within run.round-timeout={self._round_timeout:g}")
        for reply in replies:  # one that Flower has made up for a node, such as "node unavailable", is not from it
            node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            reasons.pop(node, None)
            if reply.has_error():
                reasons[node] = _last_line(reply.error.reason)
        return dict(sorted(reasons.items()))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: nodes evaluate within train, for one message and one load of the model."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log Flower's own summary."""
        self._inner.summary()


def _partition(reply: Message) -> int:
    return int(next(iter(reply.content.metric_records.values()))["partition-id"])  # type: ignore[arg-type]


def _check_numbers(nodes: Iterable[dict[str, Any]]) -> None:
    """Refuse two nodes of one number: seeds and metrics go by it, and each institution sets its own."""
    seen: dict[int, int] = {}
    for entry in nodes:
        other = seen.setdefault(int(entry["partition-id"]), entry["node"])
        if other != entry["node"]:
            raise ConfigError(
                f"nodes {other} and {entry['node']} both have partition-id={entry['partition-id']}: give each "
                "SuperNode a number of its own in --node-config"
            )


def _node_metrics(number: int, reply: Message) -> dict[str, Any]:
    metrics = next(iter(reply.content.metric_records.values()))
    texts = next(iter(reply.content.config_records.values()))
    return {"round": number, "node": reply.metadata.src_node_id, **dict(metrics), **dict(texts)}


def _last_line(reason: str | None) -> str:
    """Take a node's own words out of the traceback that Ray puts around them."""
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
