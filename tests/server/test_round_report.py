"""What the operator reads after a round and at the end."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_split.config import UNCOVERED, RunConfig
from fl_split.server.report import final_table, record_round
from fl_split.server.run_folder import RunFolder
from fl_split.server.strategy import FinishedRound


def node(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "round": 1, "node": 900 + number, "name": "", "partition-id": number, "num-examples": 100 * (number + 1),
        "train-loss": 3.0, "heldout-loss-base": 4.0, "heldout-loss-shared": 4.0, "heldout-loss-before": 4.0,
        "heldout-loss-after": 3.0 + number, "bottom-gain": 0.5, "tokens-per-s": 50.0, "activation-bytes": 2_000_000,
        "bad-rows": 2, "train-tokens": 10, "adapter": f"/nodes/{number}", "bottom-trained": 1,
        "bottom-gain-error": 0.1, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(RunConfig.from_flat({"run.dir": str(tmp_path), "run.name": "mine"}), {})


def record(folder: RunFolder, *nodes: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    record_round(folder, sent.extend, FinishedRound(1, 5, {"a": torch.zeros(3)}, list(nodes), {}))
    return sent


def test_a_round_has_gains_sums_and_no_column_of_what_is_not_shared(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    entries = record(folder, node(0), node(1))
    heading, *rows = caplog.messages[0].splitlines()[1:]
    assert caplog.messages[0].startswith("round 1/5\n") and "shared only" not in heading and "name" not in heading
    assert [row.split()[:7] for row in rows] == [
        ["0", "100", "3.000", "4.000", "4.000", "3.000", "+1.000"],
        ["1", "200", "3.000", "4.000", "4.000", "4.000", "+0.000"],
        ["all", "300", "3.000", "4.000", "4.000", "3.667", "+0.333"],
    ]
    together = entries[-1]
    assert (together["bad-rows"], together["activation-bytes"], together["tokens-per-s"]) == (4, 4_000_000, 100.0)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == entries


def test_a_runs_epsilon_stands_beside_what_it_does_not_cover(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    record_round(folder, lambda entries: None, FinishedRound(1, 5, {}, [node(0)], {}, epsilon=1.5))
    assert f"privacy spent: epsilon 1.50; {UNCOVERED}" in caplog.messages[0]


@pytest.mark.parametrize("which", [{0}, {1}, set()])
def test_epsilon_for_one_example_is_in_the_table_of_nodes_that_have_one(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, which: set[int]
) -> None:
    caplog.set_level("INFO")
    record(folder, *(node(i, **({"record-epsilon": 1.864} if i in which else {})) for i in (0, 1)))
    _, heading, *rows = caplog.messages[0].splitlines()
    assert heading.endswith("  epsilon") == bool(which)
    assert {i for i in (0, 1) if rows[i].endswith("  1.86")} == which
    assert (UNCOVERED in caplog.messages[0]) == bool(which)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_only_a_bottom_that_was_tried_has_a_gain(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, error: float
) -> None:
    caplog.set_level("INFO")
    record(folder, node(0, **{"bottom-gain-error": error}))
    assert ("bottom's gain" in caplog.messages[0]) == bool(error)


def test_a_round_of_registered_nodes_that_share_has_their_names_and_what_is_shared(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    record(folder, node(0, name="hospital-a", **{"heldout-loss-shared": 3.5}))
    assert "shared only" in caplog.text and "hospital-a" in caplog.text and "all" not in caplog.messages[0]
    last = final_table(folder, 61)
    assert "node 0 (hospital-a): held-out loss 4.000 -> 3.000, gain +1.000, adapter: /nodes/0" in last
    assert "finished 1 of 3 rounds, 1:01 since this start" in last


def test_what_the_others_are_worth_to_a_node_is_in_the_table_and_in_its_last_line(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    worth = {"gain-over-alone": 0.0321, "gain-over-alone-error": 0.0044}
    record(folder, node(0, **worth), node(1, **worth))
    assert "over alone  its error" in caplog.text and "+0.0321     0.0044" in caplog.text
    assert "gain +1.000, of which the others' +0.0321 (error 0.0044), adapter: /nodes/0" in final_table(folder, 1.0)
    record(folder, node(0, **{"gain-over-alone": 0.0321}))  # the node withholds the error
    assert "gain +1.000, adapter: /nodes/0" in final_table(folder, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_never_raises(
    folder: RunFolder, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    numbers = {key: bad for key, value in node(0).items() if isinstance(value, float)}
    record(folder, node(0), node(1, **numbers, **{"num-examples": 100, "bad-rows": bad}))
    assert "not finite" in caplog.messages[0]
    assert "node 1" in final_table(folder, 1.0)
    assert "NaN" not in folder.metrics.read_text() and "Infinity" not in folder.metrics.read_text()


def test_the_operator_is_warned_of_nodes_that_training_made_worse_and_of_bottoms_that_wait(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    record(folder, node(0), node(1, name="b", **{"heldout-loss-after": 6.16, "bottom-trained": 0}))
    worse, stuck = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert worse.startswith("node 1 (b): the held-out loss after training (6.160) is above the base model's (4.000)")
    assert stuck.startswith(
        "node 1 (b): the bottom was not trained, since a trial of its gradient won too little (0.5000"
    )
    record(folder, node(0), node(1, **{"bottom-trained": 0, "bottom-gain": -math.inf, "bottom-gain-error": math.inf}))
    assert "since a trial of its gradient diverged: see docs/surrogates.md" in caplog.records[-1].message
