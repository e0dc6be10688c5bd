"""Deal out one data set to simulated nodes, unevenly if asked: `flwr-datasets` decides which row goes to which node.

Only for simulations: in a deployment each institution's rows are its own files. The partitioner sees row numbers and
the column it goes by, nothing else, and no error quotes a value.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fl_split.config import Data
from fl_split.errors import ConfigError, DataError

Values = dict[str, Any]  # of a row, by column


def owners(rows: Iterable[Values], config: Data, num_partitions: int, seed: int) -> list[int]:
    """Which node each row belongs to; the same on each node that asks with the same arguments.

    Args:
        rows: Of all nodes, in order; read once, and nothing of them is kept.
        config: `data.partitioner` and its parameters; without one, equal parts.
        num_partitions: How many nodes there are.
        seed: Of the order of rows, and of what a partitioner draws.

    Raises:
        ConfigError: `flwr-datasets` is not installed.
        DataError: The rows cannot be dealt out like this to that many nodes.
    """
    values = _values(rows, config)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    if config.partitioner in ("", "iid"):
        parts = [range(i, len(values), num_partitions) for i in range(num_partitions)]
    else:
        parts = _partition([values[i] for i in order], config, num_partitions, seed)
    found = [0] * len(values)
    for node, part in enumerate(parts):
        for i in part:
            found[order[i]] = node
    return found


def _values(rows: Iterable[Values], config: Data) -> list[str]:
    """Pick what to go by, as text; empty for those that go by number of rows alone."""
    if config.partitioner not in ("column", "dirichlet", "pathological"):
        return ["" for _ in rows]
    values = [row.get(config.partition_by) for row in rows]
    missing = sum(value is None for value in values)
    if missing:
        raise DataError(
            f"data.partition-by={config.partition_by!r}: {missing} of {len(values)} rows have no such value; name a "
            "column that every row fills"
        )
    return [str(value) for value in values]


def _partition(values: Sequence[str], config: Data, num_partitions: int, seed: int) -> list[Any]:
    """Deal row numbers out to the nodes."""
    partitioner = _make(config, num_partitions, seed)
    import datasets  # flwr-datasets has imported it already

    partitioner.dataset = datasets.Dataset.from_dict({"row": list(range(len(values))), "value": list(values)})
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Dirichlet draws again when a part is too small, and says so
            parts = partitioner.num_partitions
            dealt = [list(partitioner.load_partition(i)["row"]) for i in range(min(parts, num_partitions))]
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:  # the text may quote a value
        raise DataError(
            f"data.partitioner={config.partitioner!r} cannot deal {len(values)} rows to {num_partitions} nodes "
            f"({type(error).__name__}): use fewer nodes, a larger data.partition-alpha or more data.partition-classes"
        ) from None
    if parts != num_partitions:
        raise DataError(
            f"data.partition-by={config.partition_by!r} has {parts} values, but the run has {num_partitions} nodes: "
            f'use one node per value (flwr run ... --federation-config "num-supernodes={parts}"), or another one'
        )
    return dealt


def _make(config: Data, num_partitions: int, seed: int) -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError:
        raise ConfigError(
            f"data.partitioner={config.partitioner!r} needs flwr-datasets: pip install 'flwr-datasets>=0.6,<0.7'"
        ) from None
    match config.partitioner:
        case "column":
            return partitioner.NaturalIdPartitioner(partition_by="value")
        case "dirichlet":
            return partitioner.DirichletPartitioner(
                num_partitions, "value", config.partition_alpha, min_partition_size=2, seed=seed
            )
        case "pathological":
            return partitioner.PathologicalPartitioner(
                num_partitions, "value", config.partition_classes, class_assignment_mode="deterministic", seed=seed
            )
        case "linear":
            return partitioner.LinearPartitioner(num_partitions)
        case _:
            return partitioner.ExponentialPartitioner(num_partitions)
