"""Rounds around one of Flower's strategies: they are recorded, go on from earlier ones, and never fail in silence."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_split.config import RunConfig
from fl_split.errors import ConfigError, RoundFailed
from fl_split.log import clock
from fl_split.server.aggregation import check, check_scaling
from fl_split.server.flower import ProductAveraging, privacy_spent, server_state, updates_of
from fl_split.server.progress import Institutions, WatchedGrid
from fl_split.server.secure import collect_keys, unmask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRound:
    """What the server keeps of a round."""

    number: int  # from 1
    num_rounds: int  # of the whole run
    shared: dict[str, Tensor]  # what nodes get next
    nodes: list[dict[str, Any]]  # metrics, one dict per node, by partition
    server_state: dict[str, Tensor]  # of the server's own optimizer
    epsilon: float | None = None  # privacy spent so far


class SplitStrategy(Strategy):
    """Rounds around one of Flower's strategies: goes on from an earlier round, refuses rounds with too few nodes.

    Says who has answered while a round runs.

    Args:
        inner: What combines the shared arrays, from `flower_strategy`.
        config: The run's.
        round_offset: Rounds finished before this start.
        institutions: Names of the nodes.
        on_round: Called with each finished round.
    """

    def __init__(
        self,
        inner: Strategy,
        config: RunConfig,
        round_offset: int,
        institutions: Institutions,
        on_round: Callable[[FinishedRound], None],
    ) -> None:
        self._inner, self._institutions, self._on_round = inner, institutions, on_round
        self._num_rounds, self._round_offset, self._lora = config.num_server_rounds, round_offset, config.lora
        self._min_nodes, self._secure = config.aggregation.min_nodes, config.aggregation.secure
        self._node_wait_s, self._round_timeout = config.run.node_wait_s, config.run.round_timeout
        self._grid: Grid | None = None  # Flower's own
        self._number = round_offset  # of the round that runs
        self._asked: list[Metadata] = []  # of its messages; Flower gives them their ids in place

    def watched(self, grid: Grid) -> Grid:
        """The grid to `start` with."""
        self._grid = grid
        return cast(Grid, WatchedGrid(grid, self._answered, self._silent))

    def _answered(self, reply: Message, num_done: int, num_asked: int, seconds: float) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            asked = {metadata.message_id: metadata.dst_node_id for metadata in self._asked}
            node = asked.get(reply.metadata.reply_to_message_id, node)
            self._institutions.reason(node, reply.error.reason)
        else:
            self._institutions.learn(node, _partition(reply))
        what = f"{self._institutions.name(node)} {'has failed' if reply.has_error() else 'is done'}"
        self._say(num_done, num_asked, seconds, what)

    def _silent(self, num_done: int, num_asked: int, seconds: float) -> None:
        self._say(num_done, num_asked, seconds, "waiting")

    def _say(self, num_done: int, num_asked: int, seconds: float, what: str) -> None:
        text = "round %d/%d: %d of %d nodes, %s: %s"
        logger.info(text, self._number, self._num_rounds, num_done, num_asked, clock(seconds), what)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes for the round; Flower's strategies would wait for missing nodes without end."""
        deadline = time.monotonic() + self._node_wait_s
        self._number = server_round + self._round_offset
        while len(nodes := self._institutions.look(grid)) < self._min_nodes:
            if time.monotonic() > deadline:
                raise RoundFailed(
                    f"{len(nodes)} of the {self._min_nodes} nodes that aggregation.min-nodes asks for came within "
                    f"run.node-wait-s={self._node_wait_s:g}: start the missing nodes, or lower aggregation.min-nodes"
                )
            time.sleep(0.5)
        seen = cast(Grid, SimpleNamespace(get_node_ids=lambda: nodes))  # of those one may leave, and Flower would wait
        messages = list(self._inner.configure_train(self._number, arrays, config, seen))
        if self._secure:
            about = messages[0].content.config_records["config"]
            asked = [message.metadata.dst_node_id for message in messages]
            keys = collect_keys(self._grid or grid, asked, about, self._round_timeout, self._reason)
            for message in messages:
                message.content["keys"] = keys
        self._asked = [message.metadata for message in messages]
        logger.info("round %d/%d: %d nodes are asked", self._number, self._num_rounds, len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine what was shared and record the round.

        Raises:
            RoundFailed: Fewer than `min_nodes` nodes finished; Flower would report success. Or one is missing whose
                masks the sum needs.
            ConfigError: Two nodes have the same number.
            AggregationError: What they share does not belong together.
        """
        number, replies = self._number, list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        done = [reply for reply in replies if not reply.has_error() and _is_finite(reply)]
        missing = self._missing(replies)
        if len(done) < self._min_nodes:
            reasons = "".join(f"\n  {node}: {reason}" for node, reason in missing.items())
            raise RoundFailed(
                f"round {number}: {len(done)} nodes finished, but aggregation.min-nodes is "
                f"{self._min_nodes}; nothing of earlier rounds is lost, go on with run.resume=true{reasons}"
            )
        for node, reason in missing.items():
            logger.warning("round %d goes on without %s: %s", number, node, reason)
        if self._secure:
            _check_all_there(number, missing)
            unmask(done)
        done.sort(key=_partition)  # replies come in any order, and sums round differently in another
        nodes = [self._metrics(reply) for reply in done]
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
        self._on_round(FinishedRound(number, self._num_rounds, shared, nodes, state, epsilon))
        return ArrayRecord(shared), metrics

    def _reason(self, node: int, text: str | None) -> str:
        reason = self._institutions.reason(node, text)  # learns the node's number as well
        return f"{self._institutions.name(node)}: {reason}"

    def _missing(self, replies: list[Message]) -> dict[str, str]:
        """Find the nodes that were asked and have not finished, by name, and why."""
        asked = {metadata.message_id: metadata.dst_node_id for metadata in self._asked}
        reasons = dict.fromkeys(asked.values(), f"did not answer within run.round-timeout={self._round_timeout:g}")
        for reply in replies:  # one that Flower has made up for a node, such as "node unavailable", is not from it
            node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            reasons.pop(node, None)
            if reply.has_error():
                reasons[node] = self._institutions.reason(node, reply.error.reason)
            elif not _is_finite(reply):
                reasons[node] = "sent weights that are not finite: lower train.bottom-lr and train.top-lr"
        return dict(sorted((self._institutions.name(node), reason) for node, reason in reasons.items()))

    def _metrics(self, reply: Message) -> dict[str, Any]:
        metrics = next(iter(reply.content.metric_records.values()))
        texts = next(iter(reply.content.config_records.values()))
        node = reply.metadata.src_node_id
        return {
            "round": self._number,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "node": node,
            "name": self._institutions.registered(node),
            **dict(metrics),
            **dict(texts),
        }

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: nodes evaluate within train, for one message and one load of the model."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Nothing: the run's configuration is in its folder."""


def _partition(reply: Message) -> int:
    return int(next(iter(reply.content.metric_records.values()))["partition-id"])  # type: ignore[arg-type]


def _check_all_there(number: int, missing: Mapping[str, str]) -> None:
    if missing:
        reasons = "".join(f"\n  {node}: {reason}" for node, reason in missing.items())
        raise RoundFailed(
            f"round {number}: with aggregation.secure=true the sum needs every node that has sent a key, as only all "
            f"masks cancel; nothing of earlier rounds is lost, go on with run.resume=true{reasons}"
        )


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


def _is_finite(reply: Message) -> bool:
    """Tell whether what a node shares can be combined: one NaN would make all nodes' weights NaN."""
    arrays = reply.content.array_records["arrays"].to_torch_state_dict()
    return all(bool(torch.isfinite(value).all()) for value in arrays.values())
