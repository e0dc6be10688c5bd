"""What a person sees of a run: a table after each round and one at the end; the same numbers go to metrics.jsonl."""

import logging
from typing import Any

from torch import Tensor

from fl_split.runs import RunFolder

logger = logging.getLogger(__name__)

# heading, metric, format
_COLUMNS = (
    ("node", "partition-id", "d"),
    ("examples", "num-examples", "d"),
    ("train loss", "train-loss", ".3f"),
    ("held-out before", "heldout-loss-before", ".3f"),
    ("held-out after", "heldout-loss-after", ".3f"),
    ("descent ratio", "descent-ratio", ".2f"),
    ("tokens/s", "tokens-per-s", ".0f"),
    ("MB to trunk", "activation-bytes", "mb"),
)


def record_round(run: RunFolder, number: int, shared: dict[str, Tensor], nodes: list[dict[str, Any]]) -> None:
    """Finish a round: one metrics entry per node, one for the round, the shared arrays, and a table in the log."""
    losses = [node["heldout-loss-after"] for node in nodes]
    weights = [node["num-examples"] for node in nodes]
    summary = {
        "round": number,
        "num-nodes": len(nodes),
        "heldout-loss-after": sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights),
        "heldout-loss-min": min(losses),
        "heldout-loss-max": max(losses),
        "activation-bytes": sum(node["activation-bytes"] for node in nodes),
        "shared-arrays": len(shared),
    }
    run.finish_round(number, [*nodes, summary], shared)
    logger.info("round %d\n%s", number, _table(nodes))


def final_table(run: RunFolder) -> str:
    """Nodes with the first and the last held-out loss, and where their adapters are."""
    first: dict[int, dict[str, Any]] = {}
    last: dict[int, dict[str, Any]] = {}
    for entry in run.read_metrics():
        if "partition-id" in entry:
            first.setdefault(entry["partition-id"], entry)
            last[entry["partition-id"]] = entry
    lines = [f"finished {run.num_finished} rounds; metrics: {run.metrics}"]
    for node, entry in sorted(last.items()):
        before, after = first[node]["heldout-loss-before"], entry["heldout-loss-after"]
        lines.append(f"  node {node}: held-out loss {before:.3f} -> {after:.3f}, adapter: {entry['adapter']}")
    return "\n".join(lines)


def _table(nodes: list[dict[str, Any]]) -> str:
    rows = [[heading for heading, _, _ in _COLUMNS]]
    rows += [[_cell(node[key], form) for _, key, form in _COLUMNS] for node in nodes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _cell(value: float, form: str) -> str:
    return f"{value / 1e6:.2f}" if form == "mb" else format(int(value) if form == "d" else value, form)
