import sys
from collections import Counter
from typing import Any

import pytest

from fl_split.config import Data
from fl_split.data.partition import owners
from fl_split.errors import ConfigError, DataError

ROWS = [{"clinic": f"clinic-{i % 4}"} for i in range(400)]


def dealt(partitioner: str, nodes: int = 4, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> list[Counter[str]]:
    """The values that each node got."""
    config = Data(partitioner=partitioner, partition_by="clinic", **changes)  # type: ignore[arg-type]
    found = owners(rows, config, nodes, seed=3)
    assert found == owners(iter(rows), config, nodes, seed=3)
    parts = [Counter[str]() for _ in range(nodes)]
    for row, owner in zip(rows, found, strict=True):
        parts[owner][row["clinic"]] += 1
    return parts


@pytest.mark.parametrize("partitioner", ["", "iid"])
def test_equal_parts_are_mixed(partitioner: str) -> None:
    for node in dealt(partitioner):
        assert node.total() == 100 and len(node) == 4 and min(node.values()) > 10


def test_column_gives_each_node_one_value() -> None:
    assert dealt("column") == [Counter({f"clinic-{i}": 100}) for i in range(4)]


def test_dirichlet_is_the_more_uneven_the_smaller_alpha_is() -> None:
    def largest_part(alpha: float) -> float:
        nodes = dealt("dirichlet", partition_alpha=alpha)
        return sum(max(node.values()) / node.total() for node in nodes) / len(nodes)

    assert largest_part(100.0) < 0.4 < 0.6 < largest_part(0.1)


def test_pathological_gives_each_node_few_values() -> None:
    assert {len(node) for node in dealt("pathological", partition_classes=2)} == {2}


@pytest.mark.parametrize("partitioner", ["linear", "exponential"])
def test_sizes_grow_with_the_number_of_the_node(partitioner: str) -> None:
    sizes = [node.total() for node in dealt(partitioner)]
    assert sizes == sorted(sizes) and sizes[-1] > 3 * sizes[0]


def test_what_cannot_be_dealt_out_is_said_without_quoting_a_value() -> None:
    with pytest.raises(DataError, match="has 4 values, but the run has 3 nodes") as refused:
        dealt("column", nodes=3)
    assert "clinic-" not in str(refused.value)
    with pytest.raises(DataError, match="data.partition-by='clinic': 1 of 2 rows have no such value"):
        dealt("column", rows=[{"clinic": "a"}, {}])
    with pytest.raises(DataError, match="data.partitioner='pathological' cannot deal 400 rows to 4 nodes") as refused:
        dealt("pathological", partition_classes=9)
    assert "clinic-" not in str(refused.value)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ConfigError, match="needs flwr-datasets: pip install"):
        dealt("column")
