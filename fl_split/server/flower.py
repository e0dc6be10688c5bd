"""Flower's own strategies: chosen by the configuration, their state kept as named tensors."""

import json
import logging
import math
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
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

from fl_split.config import Aggregation, Combine, Dp
from fl_split.errors import ConfigError
from fl_split.server.aggregation import Update, combine

logger = logging.getLogger(__name__)

SUMMED = (
    "num-examples",
    "bad-rows",
    "truncated-examples",
    "truncated-tokens",
    "train-tokens",
    "activation-bytes",
    "cached-sequences",
)


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
        combined = combine(updates_of(replies), self._how, self._arrays.to_torch_state_dict())
        metrics = self.train_metrics_aggr_fn([reply.content for reply in replies], self.weighted_by_key)
        return ArrayRecord(combined), metrics


def flower_strategy(config: Aggregation, dp: Dp) -> Strategy:
    """The strategy that the configuration asks for.

    Raises:
        ConfigError: Epsilon is asked for and Flower's accountant is not installed.
    """
    exactly = dp.mode != "off"  # the noise is made for exactly `min_nodes` nodes, so no more are asked
    settings: dict[str, Any] = {
        "fraction_train": 1e-9 if exactly else config.fraction,
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
    """Inverse of `server_state`; mutates the strategy.

    Raises:
        ConfigError: This version of Flower keeps it under another name.
    """

    def named(field: str) -> dict[str, Any]:
        return {name.partition("|")[2]: state[name].numpy() for name in sorted(state) if name.startswith(f"{field}|")}

    if isinstance(strategy, FedAdam):
        _put(strategy, "m_t", named("m") or None)
        _put(strategy, "v_t", named("v") or None)
    elif isinstance(strategy, FedAvgM):
        _put(strategy, "momentum_vector", list(named("momentum").values()) or None)
    if "clipping-norm" in state and "adaptive" in type(strategy).__name__.lower():
        _put(strategy, "clipping_norm", float(state["clipping-norm"]))
    if "accountant" in state:
        strategy.accountant.load_state_dict(json.loads(state["accountant"].numpy().tobytes()))  # type: ignore[attr-defined]


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Metrics of a round: sums of counts, means of all else weighted by the nodes' weights."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    weights = [float(record[weighted_by_key]) for record in records]  # type: ignore[arg-type]
    merged: dict[str, int | float] = {}
    for key in records[0]:
        values = [float(record[key]) for record in records]  # type: ignore[arg-type]
        if key in SUMMED:
            merged[key] = sum(values)
        elif key not in ("partition-id", weighted_by_key):
            merged[key] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return MetricRecord({**merged, "num-nodes": len(records)})


def updates_of(replies: Iterable[Message]) -> list[Update]:
    """What each node shares, out of its reply."""
    return [
        Update(
            reply.content.array_records["arrays"].to_torch_state_dict(),
            weight=float(reply.content.metric_records["metrics"]["weight"]),  # type: ignore[arg-type]
            scaling=float(reply.content.config_records["node"].get("scaling", math.nan)),  # type: ignore[arg-type]
            node=f"node {reply.metadata.src_node_id}",
        )
        for reply in replies
    ]


def _put(strategy: Strategy, name: str, value: object) -> None:
    """Set what a strategy remembers; never a new attribute that nobody reads."""
    if not hasattr(strategy, name):
        raise ConfigError(
            f"Flower {version('flwr')} keeps no {name} in {type(strategy).__name__}: go on with the run under the "
            "version in its run.json"
        )
    setattr(strategy, name, value)
