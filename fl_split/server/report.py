"""What a person sees of a run: a table after each round and one at the end; the same numbers go to metrics.jsonl."""

import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fl_split.config import UNCOVERED
from fl_split.log import clock
from fl_split.server.flower import SUMMED
from fl_split.server.run_folder import RunFolder
from fl_split.server.strategy import FinishedRound

logger = logging.getLogger(__name__)

# heading, metric, format
_COLUMNS = (
    ("node", "partition-id", "d"),
    ("name", "name", "s"),
    ("examples", "num-examples", "d"),
    ("train loss", "train-loss", ".3f"),
    ("held-out base", "heldout-loss-base", ".3f"),
    ("shared only", "heldout-loss-shared", ".3f"),
    ("before", "heldout-loss-before", ".3f"),
    ("after", "heldout-loss-after", ".3f"),
    ("gain", "gain", "+.3f"),
    ("over alone", "gain-over-alone", "+.4f"),  # of aggregation.personal
    ("its error", "gain-over-alone-error", ".4f"),
    ("accuracy", "heldout-accuracy-after", ".3f"),  # of classifiers only
    ("macro-F1", "heldout-macro-f1-after", ".3f"),
    ("bottom's gain", "bottom-gain", ".3f"),
    ("tokens/s", "tokens-per-s", ".0f"),
    ("MB to trunk", "activation-bytes", "mb"),
    ("epsilon", "record-epsilon", ".2f"),  # of dp.record-*
)

_ACCURACY = "heldout-accuracy-after"
_AVERAGED = ("train-loss", "heldout-loss-base", "heldout-loss-before", "heldout-loss-after", _ACCURACY,
             "heldout-macro-f1-after")  # weighted by examples  # fmt: skip
_ADDED = (*SUMMED, "tokens-per-s")


def record_round(run: RunFolder, send: Callable[[list[dict[str, Any]]], None], finished: FinishedRound) -> None:
    """Finish a round: one metrics entry per node, one for the round, what is shared, and a table in the log.

    Args:
        run: Where it is kept.
        send: Gets the entries as well: `server.trackers`.
        finished: The round.
    """
    nodes = finished.nodes
    losses = [float(node["heldout-loss-after"]) for node in nodes]
    mean = sum(losses) / len(losses)
    summary = {
        "round": finished.number,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "num-nodes": len(nodes),
        **_together(nodes),
        "heldout-loss-min": min(losses),
        "heldout-loss-max": max(losses),
        "heldout-loss-sd": math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses)),
        "shared-arrays": len(finished.shared),
        "shared-bytes": sum(value.nbytes for value in finished.shared.values()),
        **({} if finished.epsilon is None else {"epsilon": finished.epsilon}),
    }
    run.finish_round(finished.number, [*nodes, summary], finished.shared, finished.server_state)
    privacy = "" if finished.epsilon is None else f", privacy spent: epsilon {finished.epsilon:.2f}; {UNCOVERED}"
    logger.info("round %d/%d%s\n%s", finished.number, finished.num_rounds, privacy, _table(nodes))
    for node in nodes:
        _warn(node)
    send([*nodes, summary])


def _together(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum counts over the nodes, and take the means of losses, weighted by examples."""
    weights = [node["num-examples"] for node in nodes]
    everywhere = set(nodes[0]).intersection(*nodes)
    means = {
        key: sum(node[key] * weight for node, weight in zip(nodes, weights, strict=True)) / sum(weights)
        for key in _AVERAGED
        if key in everywhere
    }
    return {**means, **{key: sum(node[key] for node in nodes) for key in _ADDED if key in everywhere}}


def _warn(node: dict[str, Any]) -> None:
    """Say to the operator what the node's own log says of a round that went wrong."""
    name = _name(node)
    if gain(node) < 0:
        logger.warning(
            "%s: the held-out loss after training (%.3f) is above the base model's (%.3f): lower train.bottom-lr and "
            "train.top-lr, or train on more examples",
            name,
            node["heldout-loss-after"],
            node["heldout-loss-base"],
        )
    if node["bottom-gain-error"] > 0 and not node["bottom-trained"]:  # nan, if the node does not say
        won, error = node["bottom-gain"], node["bottom-gain-error"]
        logger.warning(
            "%s: the bottom was not trained, since a trial of its gradient %s: see docs/surrogates.md for what would "
            "help",
            name,
            f"won too little ({won:.4f}, standard error {error:.4f})" if math.isfinite(won) else "diverged",
        )


def gain(node: dict[str, Any]) -> float:
    """By how much a node's held-out loss is below the base model's."""
    return float(node["heldout-loss-base"]) - float(node["heldout-loss-after"])


def worth(node: dict[str, Any]) -> str:
    """What the others' adapters brought a node beyond training alone, where that is known."""
    if not {"gain-over-alone", "gain-over-alone-error"} <= node.keys():  # or a node withholds one
        return ""
    return f", of which the others' {node['gain-over-alone']:+.4f} (error {node['gain-over-alone-error']:.4f})"


def final_table(run: RunFolder, seconds: float) -> str:
    """A line for each node: from the base model's held-out loss to the last, and where its adapter is."""
    last = {entry["partition-id"]: entry for entry in run.read_metrics() if "partition-id" in entry}
    lines = [
        f"finished {run.num_finished} of {run.config.num_server_rounds} rounds, {clock(seconds)} since this start",
        f"  metrics: {run.metrics}",
    ]
    for _, entry in sorted(last.items()):
        base, after = entry["heldout-loss-base"], entry["heldout-loss-after"]
        accuracy = f", accuracy {entry[_ACCURACY]:.3f}" if _ACCURACY in entry else ""
        missed = "" if entry["round"] == run.num_finished else f" (last seen in round {entry['round']})"
        lines.append(
            f"  {_name(entry)}{missed}: held-out loss {base:.3f} -> {after:.3f}, gain {gain(entry):+.3f}"
            f"{worth(entry)}{accuracy}, adapter: {entry['adapter']}"
        )
    return "\n".join(lines)


def _name(node: dict[str, Any]) -> str:
    name = f"node {node['partition-id']}"
    return f"{name} ({node['name']})" if node.get("name") else name


def _table(nodes: list[dict[str, Any]]) -> str:
    shown = [{**node, "gain": gain(node)} for node in nodes]
    every = _together(nodes)
    if len(nodes) > 1:
        shown.append({**every, "partition-id": "all", "gain": gain(every)})
    columns = [column for column in _COLUMNS if any(column[1] in node for node in nodes) or column[1] == "gain"]
    if not any(node["name"] for node in nodes):
        columns = [column for column in columns if column[1] != "name"]
    if all(node["heldout-loss-shared"] == node["heldout-loss-base"] for node in nodes):  # nothing is shared
        columns = [column for column in columns if column[1] != "heldout-loss-shared"]
    if all(node["bottom-gain-error"] == 0 for node in nodes):  # no bottom was tried: an exact gradient, or none
        columns = [column for column in columns if column[1] != "bottom-gain"]
    rows = [[heading for heading, _, _ in columns]]
    rows += [[_cell(node.get(key, ""), form) for _, key, form in columns] for node in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any("record-epsilon" in node for node in nodes):
        lines.append(f"  epsilon of an adapter for one training example of its node; {UNCOVERED}")
    return "\n".join(lines)


def _cell(value: float | str, form: str) -> str:
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    return f"{value / 1e6:.2f}" if form == "mb" else format(int(value) if form == "d" else value, form)
