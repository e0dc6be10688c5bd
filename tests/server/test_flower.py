"""Flower's strategies as they are configured, without an app around them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_split.config import Aggregation, Dp, RunConfig
from fl_split.errors import ConfigError
from fl_split.server import flower
from fl_split.server.flower import flower_strategy


def replies_of(*values: float) -> list[Message]:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    messages = []
    for i, value in enumerate(values):
        asked = Message(RecordDict(), dst_node_id=i + 1, message_type="train")
        asked.metadata.__dict__["_message_id"] = str(i)
        content = RecordDict(
            {
                "arrays": ArrayRecord({"x": Array(np.full(3, value, dtype=np.float32))}),
                "metrics": MetricRecord({"weight": 1, "partition-id": i, "num-examples": 1}),
                "node": ConfigRecord({"scaling": 2.0}),
            }
        )
        messages.append(Message(content, reply_to=asked))
    return messages


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("fedmedian", [0, 1, 2, 3, 100], 2.0),
        ("fedtrimmedavg", [0, 1, 2, 3, 100], 2.0),
        ("krum", [0, 1, 1, 1, 100], 1.0),
        ("multikrum", [1, 1, 1, 1, 100], 1.0),
        ("bulyan", [1, 1, 1, 1, 1, 1, 100], 1.0),
    ],
)
def test_robust_strategies_are_not_moved_by_a_node_that_lies(name: str, values: list[float], expected: float) -> None:
    liars = 0 if name in ("fedmedian", "fedtrimmedavg") else 1
    config = RunConfig.from_flat(
        {"aggregation.share": "top", "aggregation.strategy": name, "aggregation.min-nodes": len(values),
         "aggregation.malicious-nodes": liars}
    ).aggregation  # fmt: skip
    arrays, _ = flower_strategy(config, Dp()).aggregate_train(1, replies_of(*values))
    assert arrays is not None and arrays["x"].numpy().tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregation.combine": "svd"}, "shares nothing"),
        ({"aggregation.share": "top", "aggregation.combine": "svd", "aggregation.tensors": "a-only"}, "tensors='both'"),
        ({"aggregation.share": "top", "aggregation.combine": "exact", "aggregation.strategy": "fedadam"}, "'fedavg'"),
        ({"aggregation.share": "top", "aggregation.combine": "stack", "dp.mode": "client-fixed",
          "aggregation.weighting": "equal"}, "dp.mode='off'"),
        ({"aggregation.share": "top", "aggregation.combine": "stack", "lora.variant": "dora"}, "'dora' needs"),
        ({"aggregation.share": "top", "aggregation.tensors": "a-only", "lora.variant": "dora"}, "and 'a-only': its"),
        ({"aggregation.share": "top", "dp.mode": "client-fixed"}, "aggregation.weighting='equal'"),
        ({"aggregation.share": "top", "dp.mode": "client-adaptive", "aggregation.weighting": "equal"}, "below 0.2"),
        ({"aggregation.share": "top", "aggregation.strategy": "krum", "aggregation.malicious-nodes": 1}, "at least 5"),
        ({"aggregation.share": "top", "aggregation.strategy": "bulyan"}, "at least 3"),
        ({"aggregation.share": "top", "aggregation.strategy": "fedtrimmedavg"}, "cuts off nobody"),
    ],
)  # fmt: skip
def test_combinations_without_sense_are_refused_at_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat(changes)


@pytest.mark.parametrize(("mode", "asked"), [("off", 5), ("client-fixed", 2), ("server-adaptive", 2)])
def test_noise_that_is_made_for_so_many_nodes_is_shared_by_no_more(mode: str, asked: int) -> None:
    if mode.endswith("fixed"):
        pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    config = RunConfig.from_flat({"aggregation.share": "top", "aggregation.weighting": "equal", "dp.mode": mode,
                                  "dp.noise-multiplier": 0.1})  # fmt: skip
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    grid = SimpleNamespace(get_node_ids=lambda: [1, 2, 3, 4, 5])
    strategy = flower_strategy(config.aggregation, config.dp)
    messages = strategy.configure_train(1, ArrayRecord({"x": Array(np.zeros(3))}), ConfigRecord(), grid)  # type: ignore[arg-type]
    assert len(list(messages)) == asked


def test_epsilon_without_its_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(config: object) -> None:
        raise ImportError("dp-accounting")

    monkeypatch.setattr(flower, "RdpAccountant", absent)
    with pytest.raises(ConfigError, match=r"pip install 'fl-split\[dp\]'"):
        flower_strategy(Aggregation(share="top", weighting="equal"), Dp(mode="client-fixed"))
