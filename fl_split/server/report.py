"""What a person sees of a run: a table after each round and one at the end; the same numbers go to metrics.jsonl."""

import logging
import statistics
from typing import Any

from fl_split.server.run_folder import RunFolder
from fl_split.server.strategy import FinishedRound

logger = logging.getLogger(__name__)

# heading, metric, format
_COLUMNS = (
    ("node", "partition-id", "d"),
    ("examples", "num-examples", "d"),
    ("train loss", "train-loss", ".3f"),
    ("held-out base", "heldout-loss-base", ".3f"),
    ("shared only", "heldout-loss-shared", ".3f"),
    ("before", "heldout-loss-before", ".3f"),
    ("after", "heldout-loss-after", ".3f"),
    ("accuracy", "heldout-accuracy-after", ".3f"),  # of classifiers only
    ("macro-F1", "heldout-macro-f1-after", ".3f"),
    ("bottom's gain", "bottom-gain", ".3f"),
    ("tokens/s", "tokens-per-s", ".0f"),
    ("MB to trunk", "activation-bytes", "mb"),
)

_ACCURACY = "heldout-accuracy-after"
_AVERAGED = ("heldout-loss-after", _ACCURACY, "heldout-macro-f1-after")  # weighted by examples


def record_round(run: RunFolder, finished: FinishedRound) -> None:
    """Finish a round: one metrics entry per node, one for the round, what is shared, and a table in the log."""
    nodes = finished.nodes
    losses = [node["heldout-loss-after"] for node in nodes]
    weights = [node["num-examples"] for node in nodes]
    averaged = [key for key in _AVERAGED if key in nodes[0]]
    summary = {
        "round": finished.number,
        "num-nodes": len(nodes),
        **{key: sum(n[key] * w for n, w in zip(nodes, weights, strict=True)) / sum(weights) for key in averaged},
        "heldout-loss-min": min(losses),
        "heldout-loss-max": max(losses),
        "heldout-loss-sd": statistics.pstdev(losses),
        "activation-bytes": sum(node["activation-bytes"] for node in nodes),
        "shared-arrays": len(finished.shared),
        "shared-bytes": sum(value.nbytes for value in finished.shared.values()),
        **({} if finished.epsilon is None else {"epsilon": finished.epsilon}),
    }
    run.finish_round(finished.number, [*nodes, summary], finished.shared, finished.server_state)
    privacy = "" if finished.epsilon is None else f", privacy spent: epsilon {finished.epsilon:.2f}"
    logger.info("round %d%s\n%s", finished.number, privacy, _table(nodes))


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
        accuracy = f", accuracy {entry[_ACCURACY]:.3f}" if _ACCURACY in entry else ""
        lines.append(f"  node {node}: held-out loss {before:.3f} -> {after:.3f}{accuracy}, adapter: {entry['adapter']}")
    return "\n".join(lines)


def _table(nodes: list[dict[str, Any]]) -> str:
    columns = [column for column in _COLUMNS if column[1] in nodes[0]]
    rows = [[heading for heading, _, _ in columns]]
    rows += [[_cell(node[key], form) for _, key, form in columns] for node in nodes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _cell(value: float, form: str) -> str:
    return f"{value / 1e6:.2f}" if form == "mb" else format(int(value) if form == "d" else value, form)
