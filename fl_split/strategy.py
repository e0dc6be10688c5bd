"""The Flower strategy: FedAvg over what nodes share, with rounds that are recorded and never fail in silence."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fl_split.errors import RoundFailed

logger = logging.getLogger(__name__)

_SUMMED = ("num-examples", "train-tokens", "activation-bytes")
OnRound = Callable[[int, ArrayRecord, list[dict[str, Any]]], None]


class SplitFedAvg(FedAvg):
    """FedAvg that goes on from an earlier round and refuses rounds with too few nodes.

    Args:
        min_nodes: Nodes that must be there and finish each round.
        node_wait_s: Seconds to wait for them at the start of a round.
        round_offset: Rounds finished before this start.
        on_round: Called with each finished round: its number, the shared arrays and one dict of metrics per node.
    """

    def __init__(self, *, min_nodes: int, node_wait_s: float, round_offset: int, on_round: OnRound) -> None:
        super().__init__(
            fraction_evaluate=0.0,  # nodes evaluate within train: one message, one model load
            min_train_nodes=min_nodes,
            min_available_nodes=min_nodes,
            train_metrics_aggr_fn=mean_metrics,
        )
        self._min_nodes, self._node_wait_s = min_nodes, node_wait_s
        self._round_offset, self._on_round = round_offset, on_round
        self._arrays = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all nodes for the round; FedAvg would wait for missing nodes without end."""
        self._arrays = arrays
        deadline = time.monotonic() + self._node_wait_s
        while (num_nodes := len(list(grid.get_node_ids()))) < self._min_nodes:
            if time.monotonic() > deadline:
                raise RoundFailed(
                    f"{num_nodes} of the {self._min_nodes} nodes that aggregation.min-nodes asks for came within "
                    f"run.node-wait-s={self._node_wait_s:g}: start the missing nodes, or lower aggregation.min-nodes"
                )
            time.sleep(0.5)
        return super().configure_train(server_round + self._round_offset, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what was shared and record the round.

        Raises:
            RoundFailed: Fewer than `min_nodes` nodes finished; Flower would report success.
        """
        number, replies = server_round + self._round_offset, list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        if len(replies) - len(failed) < self._min_nodes:
            reasons = "".join(f"\n  node {r.metadata.src_node_id}: {_last_line(r.error.reason)}" for r in failed)
            raise RoundFailed(
                f"round {number}: {len(replies) - len(failed)} nodes finished, but aggregation.min-nodes is "
                f"{self._min_nodes}; nothing of earlier rounds is lost, go on with run.resume=true{reasons}"
            )
        nodes = [_node_metrics(number, reply) for reply in replies if not reply.has_error()]
        arrays, metrics = super().aggregate_train(server_round, replies)
        arrays = arrays or self._arrays
        self._on_round(number, arrays, sorted(nodes, key=lambda entry: int(entry["partition-id"])))
        return arrays, metrics


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Metrics of a round: sums of counts, means of all else weighted by the nodes' examples."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    weights = [float(record[weighted_by_key]) for record in records]  # type: ignore[arg-type]
    merged: dict[str, int | float] = {}
    for key in records[0]:
        values = [float(record[key]) for record in records]  # type: ignore[arg-type]
        if key in _SUMMED:
            merged[key] = int(sum(values))
        elif key != "partition-id":
            merged[key] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return MetricRecord({**merged, "num-nodes": len(records)})


def _node_metrics(number: int, reply: Message) -> dict[str, Any]:
    metrics = next(iter(reply.content.metric_records.values()))
    texts = next(iter(reply.content.config_records.values()))
    return {"round": number, "node": reply.metadata.src_node_id, **dict(metrics), **dict(texts)}


def _last_line(reason: str | None) -> str:
    """Ray puts a traceback around a node's own words."""
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
