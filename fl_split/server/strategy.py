"""The Flower strategies: Flower's own for the maths, with rounds that are recorded and never fail in silence."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from torch import Tensor

from fl_split.config import Aggregation, Dp, Lora
from fl_split.errors import ConfigError, RoundFailed
from fl_split.server.aggregation import Combine, Update, check, check_scaling, combine

logger = logging.getLogger(__name__)

_SUMMED = ("num-examples", "train-tokens", "activation-bytes")


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
        updates = _updates(done)
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
        """The nodes that were asked and have not finished, and why."""
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


class ProductAveraging(FedAvg):
    """Combines products B A rather than A and B apart, by `aggregation.combine`; nodes' ranks may differ."""

    def __init__(self, how: Combine, **settings: Any) -> None:
        super().__init__(**settings)
        self._how: Combine = how
        self._arrays = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; remembers the residual that nodes start from."""
        self._arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the nodes' updates.

        Raises:
            AggregationError: They do not belong together.
        """
        replies = [reply for reply in replies if not reply.has_error()]
        combined = combine(_updates(replies), self._how, self._arrays.to_torch_state_dict())
        metrics = self.train_metrics_aggr_fn([reply.content for reply in replies], self.weighted_by_key)
        return ArrayRecord(combined), metrics


# ------------------------------------------------------------------------------------------- Flower's strategies


def flower_strategy(config: Aggregation, dp: Dp) -> Strategy:
    """The strategy that the configuration asks for.

    Raises:
        ConfigError: Epsilon is asked for and Flower's accountant is not installed.
    """
    exactly = dp.mode != "off"  # the noise is made for exactly `min_nodes` nodes, so no more are asked
    settings: dict[str, Any] = {
        "fraction_train": 1e-9 if exactly else config.fraction,
        "fraction_evaluate": 0.0,
        "min_train_nodes": config.min_nodes,
        "min_available_nodes": config.min_nodes,
        "weighted_by_key": "weight",
        "train_metrics_aggr_fn": mean_metrics,
    }
    if config.combine != "mean":
        return ProductAveraging(config.combine, **settings)
    lr = config.server_lr
    extra: dict[str, tuple[type[FedAvg], dict[str, Any]]] = {
        "fedavg": (FedAvg, {}),
        "fedavgm": (FedAvgM, {"server_learning_rate": lr or 1.0, "server_momentum": config.server_momentum}),
        "fedadam": (FedAdam, {"eta": lr or 0.01}),
        "fedprox": (FedProx, {"proximal_mu": config.proximal_mu}),
        "fedmedian": (FedMedian, {}),
        "fedtrimmedavg": (FedTrimmedAvg, {"beta": config.trim}),
        "krum": (Krum, {"num_malicious_nodes": config.malicious_nodes}),
        "multikrum": (
            MultiKrum,
            {
                "num_malicious_nodes": config.malicious_nodes,
                "num_nodes_to_select": config.min_nodes - config.malicious_nodes,
            },
        ),
        "bulyan": (Bulyan, {"num_malicious_nodes": config.malicious_nodes}),
    }
    strategy_class, values = extra[config.strategy]
    strategy = strategy_class(**settings, **values)
    return strategy if dp.mode == "off" else _with_privacy(strategy, config.min_nodes, dp)


def _with_privacy(strategy: FedAvg, num_nodes: int, dp: Dp) -> Strategy:
    side, _, norm = dp.mode.partition("-")
    if norm == "adaptive":
        adaptive = {
            "server": DifferentialPrivacyServerSideAdaptiveClipping,
            "client": DifferentialPrivacyClientSideAdaptiveClipping,
        }[side]
        logger.warning("dp.mode=%r: Flower has no accountant for adaptive clipping, so no epsilon is reported", dp.mode)
        return adaptive(strategy, dp.noise_multiplier, num_nodes, initial_clipping_norm=dp.clipping_norm)
    fixed = {
        "server": DifferentialPrivacyServerSideFixedClipping,
        "client": DifferentialPrivacyClientSideFixedClipping,
    }[side]
    budget = PrivacyConfig(
        target_delta=dp.delta,
        population_size=num_nodes,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
        max_epsilon=dp.max_epsilon or None,
    )
    try:
        accountant = RdpAccountant(budget)
    except ImportError as error:
        raise ConfigError(
            f"dp.mode={dp.mode!r} reports epsilon with dp-accounting: pip install 'fl-split[dp]'"
        ) from error
    return fixed(strategy, dp.noise_multiplier, dp.clipping_norm, num_nodes, accountant=accountant)


def needs_start(config: Aggregation, dp: Dp) -> bool:
    """Whether the server must know the adapters that nodes start from, in order to tell what they changed."""
    return dp.mode != "off" or config.strategy in ("fedavgm", "fedadam")


def privacy_spent(strategy: Strategy) -> float | None:
    """Epsilon spent so far, at `dp.delta`; None without an accountant."""
    spent = strategy.privacy_spent() if hasattr(strategy, "privacy_spent") else None
    return None if spent is None else float(spent.epsilon)


# ------------------------------------------------------------------------------------------------ server's state


def server_state(strategy: Strategy, names: list[str]) -> dict[str, Tensor]:
    """What a strategy remembers from round to round, as named tensors.

    Args:
        strategy: From `flower_strategy`.
        names: Of the shared arrays, sorted: the order in which strategies without names keep them.
    """
    if isinstance(strategy, FedAdam):
        moments = {"m": strategy.m_t or {}, "v": strategy.v_t or {}}
        return {f"{field}|{name}": torch.tensor(x) for field, named in moments.items() for name, x in named.items()}
    if isinstance(strategy, FedAvgM):
        return {f"momentum|{n}": torch.tensor(x) for n, x in zip(names, strategy.momentum_vector or [], strict=False)}
    state = {}
    if hasattr(strategy, "clipping_norm"):
        state["clipping-norm"] = torch.tensor(strategy.clipping_norm, dtype=torch.float64)
    if accountant := getattr(strategy, "accountant", None):
        state["accountant"] = torch.frombuffer(
            bytearray(json.dumps(accountant.state_dict()).encode()), dtype=torch.uint8
        )
    return state


def restore_server_state(strategy: Strategy, state: dict[str, Tensor]) -> None:
    """Inverse of `server_state`; mutates the strategy."""

    def named(field: str) -> dict[str, Any]:
        return {name.partition("|")[2]: state[name].numpy() for name in sorted(state) if name.startswith(f"{field}|")}

    if isinstance(strategy, FedAdam):
        strategy.m_t, strategy.v_t = named("m") or None, named("v") or None
    elif isinstance(strategy, FedAvgM):
        strategy.momentum_vector = list(named("momentum").values()) or None
    if "clipping-norm" in state and "adaptive" in type(strategy).__name__.lower():
        strategy.clipping_norm = float(state["clipping-norm"])  # type: ignore[attr-defined]
    if "accountant" in state:
        strategy.accountant.load_state_dict(json.loads(state["accountant"].numpy().tobytes()))  # type: ignore[attr-defined]


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Metrics of a round: sums of counts, means of all else weighted by the nodes' weights."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    weights = [float(record[weighted_by_key]) for record in records]  # type: ignore[arg-type]
    merged: dict[str, int | float] = {}
    for key in records[0]:
        values = [float(record[key]) for record in records]  # type: ignore[arg-type]
        if key in _SUMMED:
            merged[key] = int(sum(values))
        elif key not in ("partition-id", weighted_by_key):
            merged[key] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return MetricRecord({**merged, "num-nodes": len(records)})


def _updates(replies: Iterable[Message]) -> list[Update]:
    return [
        Update(
            reply.content.array_records["arrays"].to_torch_state_dict(),
            weight=float(reply.content.metric_records["metrics"]["weight"]),  # type: ignore[arg-type]
            scaling=float(reply.content.config_records["node"].get("scaling", math.nan)),  # type: ignore[arg-type]
            node=f"node {reply.metadata.src_node_id}",
        )
        for reply in replies
    ]


def _partition(reply: Message) -> int:
    return int(next(iter(reply.content.metric_records.values()))["partition-id"])  # type: ignore[arg-type]


def _check_numbers(nodes: Iterable[dict[str, Any]]) -> None:
    """Seeds and metrics go by a node's number, and in a deployment each institution sets its own."""
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
    """Ray puts a traceback around a node's own words."""
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
