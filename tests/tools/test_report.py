"""The report of runs: one page, by itself, with the right numbers and nothing that could run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.config import UNCOVERED, RunConfig
from fl_split.errors import ConfigError, NodeStateError
from fl_split.server.run_folder import RunFolder
from fl_split.tools.charts import Chart, draw
from fl_split.tools.report import report

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")


def make_run(tmp_path: Path, name: str, extra: dict[str, float] | None = None, **changes: Any) -> Path:
    """A finished run of two rounds and two nodes, with extra numbers of each."""
    run = RunFolder.open(
        RunConfig.from_flat({"run.dir": str(tmp_path), "run.name": name, "num-server-rounds": 2, **changes}),
        {"torch": "2.13.0"},
    )
    for number in (1, 2):
        nodes = [
            {
                "round": number, "node": 900 + i, "name": "<b>a</b>" if i == 0 else "", "partition-id": i,
                "num-examples": 1234, "train-loss": 3.0, "heldout-loss-base": 4.0, "heldout-loss-shared": 3.75,
                "heldout-loss-before": 3.5, "heldout-loss-after": 2.875 if i == 0 else math.nan, "bottom-gain": 0.5,
                "activation-bytes": 1_500_000, "train-tokens": 500, "train-s": 2.0, "trunk-forward-s": 1.0,
                "exported-round": 1, "bad-rows": 7, **(extra or {}),
            }
            for i in (0, 1)
        ]  # fmt: skip
        summary = {"round": number, "heldout-loss-base": 4.0, "heldout-loss-after": 2.875, "shared-bytes": 250_000}
        run.finish_round(number, [*nodes, summary | {"epsilon": 1.5 * number}], {"a": torch.zeros(1)})
    return run.root


class Page(HTMLParser):
    """Tags, what they refer to, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.cells += [""] if tag == "td" else []

    def handle_data(self, data: str) -> None:
        if self.cells and self.lasttag == "td":
            self.cells[-1] += data


def test_the_page_stands_by_itself_and_has_the_numbers(tmp_path: Path) -> None:
    roots = [make_run(tmp_path, "one", **{"aggregation.share": "top"}), make_run(tmp_path, "two")]
    own = roots[0] / "nodes" / "0"
    own.mkdir(parents=True)
    (own / "metrics.jsonl").write_text(json.dumps({"round": 1, "step": 1, "loss": 3.25}) + "\n" + '{"cut')
    text = report(roots)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "b"}) and {"svg", "table", "details"} <= page.tags
    assert all(reference.startswith("#") for reference in page.references)
    assert {"node 0 (<b>a</b>)", "node 1", "1,234", "+1.125", "not finite", "3.750", "round 1", "3.00"} <= set(
        page.cells
    )
    assert "The server gave each node 0.50 MB" in text
    assert text.count("shared alone") == 1  # the other run shares nothing
    assert "Training loss by step" in text and "Privacy spent" in text and "Mean held-out loss of each run" in text
    assert "prefers-color-scheme: dark" in text and "#010203" not in text


def test_epsilon_for_one_example_stands_beside_what_it_does_not_cover(tmp_path: Path) -> None:
    text = report([make_run(tmp_path, "one", {"record-epsilon": 1.864, "record-delta": 1e-6})])
    assert "1.86 at delta 1e-06" in Page(text).cells and "Privacy of single examples spent" in text
    assert text.count(UNCOVERED) == 2  # beside either table, for the run's own epsilon as well
    assert "Privacy of single examples" not in report([make_run(tmp_path, "two")])


def test_an_institution_reads_what_sharing_was_worth_to_it(tmp_path: Path) -> None:
    personal = {"aggregation.personal": True, "aggregation.share": "both", "aggregation.min-nodes": 3}
    worth = {"gain-over-alone": 0.0321, "gain-over-alone-error": 0.0044}
    weights = {"shared-weight-bottom": 0.0, "shared-weight-top": 0.5}
    text = report([make_run(tmp_path, "one", worth | weights, **personal)])
    assert {"+0.0321 ± 0.0044", "0 bottom, 0.5 top"} <= set(Page(text).cells)
    silent = make_run(tmp_path, "silent", worth | weights | {"gain-over-alone-error": math.nan}, **personal)
    assert "withheld" in Page(report([silent])).cells
    title = "What the others&#x27; adapters won beyond training alone"
    assert text.count(title) == 1 and title not in report([make_run(tmp_path, "two")])


def test_the_command_writes_the_page_and_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    root, out = make_run(tmp_path, "one"), tmp_path / "r.html"
    done = CliRunner().invoke(app, ["report", str(root), "--out", str(out)])
    assert done.exit_code == 0 and done.output.strip() == str(out)
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(
        NodeStateError, match=r"no run with a finished round in .*nowhere: give a run's folder.*<out-dir>/<run.name>"
    ):
        report([tmp_path / "nowhere"])


def test_a_report_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_run(tmp_path, "one")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'fl-split\[report\]'"):
        report([root])


def test_sample_outputs_are_shown_if_there_are_any(tmp_path: Path) -> None:
    root = make_run(tmp_path, "one")
    assert "Sample outputs" not in report([root])
    (root / "samples.jsonl").write_text('{"prompt": "1 < 2?", "output": "yes"}\n')
    assert "1 &lt; 2?" in report([root])
    kept = root / "nodes" / "0" / "samples.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text('{"round": 1, "answer": "old"}\n{"round": 2, "answer": "newest"}\n')
    page = report([root])
    assert "Sample outputs of node 0" in page and "newest" in page and ">old<" not in page


def test_a_node_has_a_page_of_its_own_with_its_answers(tmp_path: Path) -> None:
    """As a deployed node has it: no run.json, no checkpoints of the server."""
    run = make_run(tmp_path, "mine")
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [entry for entry in rounds if entry.get("partition-id") == 0]
    steps = [{"round": entry["round"], "step": entry["round"], "loss": 3.25} for entry in own]
    node = tmp_path / "out" / "mine"
    node.mkdir(parents=True)
    (node / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*steps, *own]))
    samples = [{"round": i, "prompt": f"<i>asked {i}", "rouge_l": 0.123456, "answer": f"said {i}"} for i in (1, 2)]
    (node / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = report([node])
    assert {"4.000", "2.875", "0.12", "+1.125", "3.00", "<i>asked 2", "said 2"} <= {
        cell.strip() for cell in Page(text).cells
    }
    assert "said 1" not in text and "Training loss by step" in text and "Configuration" not in text
    assert "MB of shared weights" not in text and "No weights were shared" not in text
    both = report([node, run])
    assert "said 2" in both and "Configuration" in both


def test_a_single_round_is_one_whole_number() -> None:
    svg = draw(Chart("losses", "round", "loss", {"a": {3: 4.1}, "b": {3: 4.2}}))
    assert ">3</text>" in svg and "3.0" not in re.sub(r'="[^"]*"', "", svg)
