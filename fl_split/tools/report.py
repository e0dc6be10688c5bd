"""`fl-split report`: what one or several runs came to, as one HTML page that needs no server and no script.

It reads what the server keeps of a run, and of simulated nodes their own losses by step and their samples
(`data.samples`); or, on a node, what that node keeps of its own. No weight.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fl_split.config import UNCOVERED, RunConfig
from fl_split.files import read_entries
from fl_split.server.run_folder import read_run
from fl_split.tools.charts import Chart, Line, draw, look, steps_of
from fl_split.tools.html import document, heading

Entry = Mapping[str, Any]

_NOT_COVERED = f"<p class='faint'>Of every epsilon: {UNCOVERED}.</p>"
_WORTH = {"gain-over-alone", "gain-over-alone-error", "shared-weight-bottom", "shared-weight-top"}


@dataclass(frozen=True)
class Record:
    """What is known of a run."""

    name: str
    root: Path
    about: Mapping[str, Any]  # run.json
    nodes: Mapping[int, Sequence[Entry]]  # by partition-id, a round each
    rounds: Sequence[Entry]  # of all nodes together
    steps: Mapping[int, Line]  # loss by step of nodes that have left theirs here

    @classmethod
    def read(cls, root: Path) -> "Record":
        """Read a run's folder, or on a node that node's own.

        Raises:
            NodeStateError: There is no run with a finished round.
        """
        kept = [] if (root / "run.json").exists() else read_entries(root / "metrics.jsonl")
        if rounds := [entry for entry in kept if "partition-id" in entry]:
            number = rounds[-1]["partition-id"]
            return cls(root.name, root, {}, {number: rounds}, [], {number: steps_of(kept)})
        about, entries = read_run(root)
        numbers = sorted({entry["partition-id"] for entry in entries if "partition-id" in entry})
        own = {i: steps_of(read_entries(root / "nodes" / str(i) / "metrics.jsonl")) for i in numbers}
        return cls(
            name=root.name,
            root=root,
            about=about,
            nodes={i: [entry for entry in entries if entry.get("partition-id") == i] for i in numbers},
            rounds=[entry for entry in entries if "partition-id" not in entry],
            steps={i: line for i, line in own.items() if line},
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration, flat."""
        config: Mapping[str, Any] = self.about.get("config", {})  # a node does not keep it
        return config

    def label(self, number: int) -> str:
        """A node by its number, and its registered name if it has one."""
        name = self.nodes[number][-1].get("name")
        return f"node {number} ({name})" if name else f"node {number}"

    def total(self, key: str) -> float:
        """A number summed over nodes and rounds."""
        return sum(float(entry.get(key, 0)) for entries in self.nodes.values() for entry in entries)

    def by_round(self, key: str, only: Callable[[float], bool] = math.isfinite) -> dict[str, Line]:
        """A number of each node by round; what is not finite is left out."""
        return {
            self.label(i): {e["round"]: e[key] for e in entries if key in e and only(e[key])}
            for i, entries in self.nodes.items()
        }


def report(roots: Iterable[Path]) -> str:
    """Make the page.

    Raises:
        NodeStateError: A folder holds no run with a finished round.
        ConfigError: matplotlib is not installed.
    """
    runs = [Record.read(root) for root in roots]
    title = "fl-split: " + ", ".join(run.name for run in runs)
    of_servers = [run for run in runs if run.rounds]
    note = "; losses are per response token, or per text of a classifier, on each node's own held-out examples"
    parts = [heading(title, note), _overview(of_servers) if of_servers else "", *(_run(run) for run in runs)]
    return document(title, "".join(parts))


def _overview(runs: Sequence[Record]) -> str:
    """A line for each run, and their means in one picture."""
    rows = []
    for run in runs:
        first, last = run.rounds[0], run.rounds[-1]
        base, after = last.get("heldout-loss-base", math.nan), last["heldout-loss-after"]
        rows.append(
            {
                "run": run.name,
                "model": run.config["model.name"],
                "rounds": f"{last['round']} of {run.config['num-server-rounds']}",
                "nodes": len(run.nodes),
                "surrogate": run.config["surrogate.kind"],
                "shared": run.config["aggregation.share"],
                "base": _loss(base),
                "after": _loss(after),
                "gain": _gain(base - after),
                "MB to trunk": f"{run.total('activation-bytes') / 1e6:,.1f}",
                "epsilon": f"{last['epsilon']:.2f}" if "epsilon" in last else "none",
                "from": str(first.get("time", ""))[:16].replace("T", " "),
            }
        )
    means = {run.name: {entry["round"]: entry["heldout-loss-after"] for entry in run.rounds} for run in runs}
    picture = _figures([Chart("Mean held-out loss of each run", "round", "loss", means)]) if len(runs) > 1 else ""
    privacy = _NOT_COVERED if any(row["epsilon"] != "none" for row in rows) else ""
    return f"<section>{_table(rows)}{privacy}{picture}</section>"


def _run(run: Record) -> str:
    """All about one run."""
    base = {run.label(i): float(entries[-1]["heldout-loss-base"]) for i, entries in run.nodes.items()}
    steps = {run.label(i): line for i, line in run.steps.items()}
    trials = [Chart("What a bottom that trains won in its newest trial", "round", "nats", run.by_round("bottom-gain"))]
    if not any(any(line.values()) for line in run.by_round("bottom-gain-error").values()):  # no bottom was tried
        trials = []
    charts = [
        Chart("Held-out loss after each round; dashed: the base model", "round", "loss",
              run.by_round("heldout-loss-after"), base),
        Chart("Training loss by step", "step", "loss", steps, whole=False)
        if steps
        else Chart("Training loss", "round", "loss", run.by_round("train-loss")),
        *trials,
        Chart("Sent to the trunk", "round", "MB",
              {name: {x: y / 1e6 for x, y in line.items()} for name, line in run.by_round("activation-bytes").items()}),
    ]  # fmt: skip
    size = sum(entry["shared-bytes"] for entry in run.rounds) / 1e6
    shared = (
        f"The server gave each node {size:,.2f} MB of shared weights in all." if size else "No weights were shared."
    )
    about = f"<p>{shared}</p>" if run.rounds else ""
    worth = run.by_round("gain-over-alone")
    if any(worth.values()):
        charts.append(Chart("What the others' adapters won beyond training alone", "round", "nats", worth))
    of_one = run.by_round("record-epsilon")
    if any(of_one.values()):
        charts.append(Chart("Privacy of single examples spent", "round", "epsilon", of_one))
    spent = {entry["round"]: entry["epsilon"] for entry in run.rounds if "epsilon" in entry}
    if spent:
        charts.append(Chart("Privacy spent", "round", "epsilon", {"epsilon": spent}))
    return (
        f"<section><h2>{escape(run.name)}</h2><h3>What each node gained</h3>{_table(_quality(run))}{_figures(charts)}"
        f"{_NOT_COVERED if any(of_one.values()) or spent else ''}"
        f"<h3>What it took</h3>{_table(_cost(run))}{about}{_samples(run)}{_configuration(run)}</section>"
    )


def _quality(run: Record) -> list[dict[str, Any]]:
    rows = []
    for i, entries in run.nodes.items():
        last = entries[-1]
        base, after = last["heldout-loss-base"], last["heldout-loss-after"]
        row = {
            "node": run.label(i),
            "examples": f"{last['num-examples']:,}",
            "base": _loss(base),
            "shared alone": _loss(last["heldout-loss-shared"]),
            "before": _loss(entries[0]["heldout-loss-before"]),
            "after": _loss(after),
            "gain": _gain(base - after),
            "exported": f"round {last['exported-round']}" if "exported-round" in last else "",
        }
        if _WORTH <= last.keys():
            weights = ", ".join(f"{last[f'shared-weight-{part}']:g} {part}" for part in ("bottom", "top"))
            worth, error = last["gain-over-alone"], last["gain-over-alone-error"]
            row["over training alone"] = f"{worth:+.4f} ± {error:.4f}" if math.isfinite(worth + error) else "withheld"
            row["weight of what is shared"] = weights
        if any(run.by_round("record-epsilon").values()):
            known = "record-epsilon" in last
            row["epsilon for one example"] = (
                f"{last['record-epsilon']:.2f} at delta {last['record-delta']:g}" if known else "none"
            )
        nothing_shared = last["heldout-loss-shared"] == base  # what a node, which has no configuration, sees of it
        if run.config.get("aggregation.share", "none" if nothing_shared else "") == "none":
            del row["shared alone"]
        if "heldout-accuracy-after" in last:
            row["accuracy"] = f"{last['heldout-accuracy-after']:.3f}"
        rows.append(row)
    return rows


def _cost(run: Record) -> list[dict[str, Any]]:
    """Bytes and seconds of each node over all rounds."""
    rows = []
    for i, entries in run.nodes.items():

        def total(key: str, entries: Sequence[Entry] = entries) -> float:
            return sum(float(entry.get(key, 0)) for entry in entries)

        rows.append(
            {
                "party": run.label(i),
                "rounds": len(entries),
                "MB to trunk": f"{total('activation-bytes') / 1e6:,.2f}",
                "tokens": f"{total('train-tokens'):,.0f}",
                "tokens/s": f"{total('train-tokens') / max(total('train-s'), 1e-9):,.0f}",
                "training": f"{total('train-s'):,.1f} s",
                "trunk calls, summed": f"{total('trunk-forward-s'):,.1f} s",
                "rows left out": f"{entries[-1].get('bad-rows', 0):,}",
            }
        )
    return rows


def _samples(run: Record) -> str:
    """Sample outputs, if somebody has put any into the run's folder, and the newest ones of nodes that are here."""
    parts = []
    for name, folder in {
        "": run.root,
        **{f" of {run.label(i)}": run.root / "nodes" / str(i) for i in run.nodes},
    }.items():
        samples = read_entries(folder / "samples.jsonl")
        newest = [entry for entry in samples if entry.get("round") == samples[-1].get("round")]
        rows = [{key: f"{x:.2f}" if isinstance(x, float) else x for key, x in sample.items()} for sample in newest]
        parts += [f"<h3>Sample outputs{escape(name)}</h3>{_table(rows, 'texts')}"] if rows else []
    return "".join(parts)


def _configuration(run: Record) -> str:
    if not run.config:
        return ""
    default = RunConfig().to_flat()
    changed = [{"key": k, "value": v} for k, v in run.config.items() if v != default.get(k)]
    rest = [{"key": k, "value": v} for k, v in run.config.items() if v == default.get(k)]
    versions = [{"package": name, "version": value} for name, value in run.about["versions"].items()]
    return (
        f"<h3>Configuration</h3>{_table(changed, 'pairs')}<details><summary>as by default, and versions</summary>"
        f"{_table(rest, 'pairs')}{_table(versions)}</details>"
    )


def _table(rows: Sequence[Mapping[str, Any]], kind: str = "") -> str:
    if not rows:
        return "<p class='faint'>nothing</p>"
    head = "".join(f"<th>{escape(str(key))}</th>" for key in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<div class='wide'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figures(charts: Sequence[Chart]) -> str:
    each = (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{draw(chart)}{_legend(chart)}</figure>"
        for chart in charts
    )
    return f"<div class='figures'>{''.join(each)}</div>"


def _legend(chart: Chart) -> str:
    """In HTML, not in the picture: the page knows how wide its letters are."""
    if len(chart.lines) < 2:
        return ""
    styles = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}
    items = []
    for place, name in enumerate(chart.lines):
        colour, dash = look(place)
        items.append(f"<li><i style='border-top: 3px {styles[dash]} {colour}'></i>{escape(name)}</li>")
    return f"<ul class='legend'>{''.join(items)}</ul>"


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _gain(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "not finite"
