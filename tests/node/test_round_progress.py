"""What an institution sees of its rounds, and what it keeps when one goes wrong."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import client_app
import server_app
from fl_split.config import NodeConfig, RunConfig, Train
from fl_split.errors import ConfigError, RoundFailed, TrainingError
from fl_split.node import progress, round, train
from fl_split.node.progress import Progress
from fl_split.node.train import Step

METRICS: dict[str, int | float] = {"heldout-loss-base": 2.0, "heldout-loss-after": 1.5, "exported-round": 2}
Run = Callable[..., InProcessGrid]


@pytest.fixture
def run(demo_model: Path, tmp_path: Path) -> Run:
    """Run the app in this process on the demo, with few short steps."""

    def run(**changes: Any) -> InProcessGrid:
        config = {
            **RunConfig().to_flat(), "num-server-rounds": 2, "train.steps": 2, "train.batch-size": 4,
            "data.max-length": 32, "data.holdout": 0.02, "surrogate.kind": "identity", "run.dir": str(tmp_path),
            "run.name": "x", **changes,
        }  # fmt: skip
        grid = InProcessGrid(client_app.app, 2, config)
        server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
        return grid

    return run


def test_a_round_is_told_and_kept_step_by_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "step": 2}\n{"round": 2, "step": 3}\n{"round": 2, "st')
    monkeypatch.setattr(progress, "_EVERY_S", 3600.0)
    own = Progress(tmp_path, "node 0, run x, round 2/5", 2, 3)
    own.start("81 examples")
    for number in (4, 5, 6):
        own.step(Step(number, 1.25, 100 * (number - 3), 2.0 * (number - 3)))
    own.finish(METRICS, 61.0, tmp_path / "adapter")
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry.get("step") for entry in entries] == [2, 4, 5, 6, None]
    assert entries[1]["time"].endswith("+00:00") and entries[1]["loss"] == 1.25
    assert entries[-1]["heldout-loss-after"] == 1.5 and entries[-1]["seconds"] == 61.0
    assert caplog.messages == [
        "node 0, run x, round 2/5: 81 examples",
        "node 0, run x, round 2/5: step 1/3, loss 1.250, 50 tokens/s, 0:04 left",
        "node 0, run x, round 2/5: step 3/3, loss 1.250, 50 tokens/s, 0:00 left",
        "node 0, run x, round 2/5 is done in 1:01: held-out loss 2.000 (base) -> 1.500, gain +0.500; adapter of round "
        f"2: {tmp_path / 'adapter'}",
    ]


def test_training_that_made_it_worse_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Progress(tmp_path, "node 0", 1, 3).finish({**METRICS, "heldout-loss-after": 6.16}, 1.0, tmp_path)
    assert "the held-out loss after training (6.160) is above the base model's (2.000)" in caplog.text


def test_tensorboard_on_the_node_has_each_steps_loss(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    own = Progress(tmp_path, "node 0", 1, 2, to="tensorboard")
    own.step(Step(1, 1.5, 10, 1.0))
    own.finish(METRICS, 1.0, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 1.5)]
    assert events.Scalars("round/heldout-loss-after")[0].value == 1.5


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"report\.to='tensorboard' .* pip install tensorboard"):
        Progress(tmp_path, "node 0", 1, 2, to="tensorboard")


@pytest.mark.parametrize(("name", "rates"), [("demo", (8e-3, 1.6e-2)), ("/m", (1e-3, 2e-3))])
def test_rates_that_are_not_given_suit_the_model(name: str, rates: tuple[float, float]) -> None:
    assert RunConfig.from_flat({"model.name": name}).with_rates().train.rates == rates
    given = RunConfig.from_flat({"model.name": name, "train.top-lr": 0.5}).with_rates()
    assert given.train.rates == (0.25, 0.5)
    given = RunConfig.from_flat({"model.name": name, "train.bottom-lr": 0.5}).with_rates()
    assert given.train.rates == (0.5, rates[1])
    with pytest.raises(ConfigError, match=r"train\.top-lr: expected a number of at least 0, or 'auto'"):
        RunConfig.from_flat({"train.top-lr": "high"})
    assert NodeConfig.from_flat({"partition-id": 0, "report.to": "tensorboard"}).report_to == "tensorboard"


def test_numbers_that_are_not_finite_stop_a_round_with_its_rates() -> None:
    config = Train.model_validate({"bottom-lr": 3.0, "top-lr": 5.0})
    for what in ("loss", "gradient", "weights"):
        with pytest.raises(TrainingError, match=rf"the {what} is not finite at step 7: .*bottom-lr=3 and .*top-lr=5"):
            train._check_finite(config, 7, **{what: float("nan")})
    train._check_finite(config, 7, loss=1.0, gradient=2.0)


def test_a_node_whose_numbers_are_not_finite_keeps_its_last_good_round_and_the_run_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: dict[str, torch.Tensor] = {}
    accumulate, restore, bad = train.accumulate, round.Round.restore, [False]

    def diverge_later(self: round.Round) -> None:
        bad[0] = self.instructions.run_name == "y" or (self.node.partition_id, self.instructions.server_round) == (1, 2)
        if bad[0] and self.folder.adapter.exists():
            kept.update(load_file(self.folder.adapter / "adapter_model.safetensors"))
        restore(self)

    monkeypatch.setattr(round.Round, "restore", diverge_later)
    monkeypatch.setattr(train, "accumulate", lambda *args: float("nan") if bad[0] else accumulate(*args))
    with caplog.at_level(logging.INFO):
        run(**{"aggregation.min-nodes": 1, "surrogate.check": False})
    entries = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [(e["round"], e.get("partition-id")) for e in entries] == [(1, 0), (1, 1), (1, None), (2, 0), (2, None)]
    assert "round 2 goes on without node 1: the loss is not finite at step 3" in caplog.text
    now = load_file(tmp_path / "x" / "nodes" / "1" / "adapter" / "adapter_model.safetensors")
    assert kept and all(torch.equal(now[name], kept[name]) for name in kept)
    with pytest.raises(RoundFailed, match=r"(?s)0 nodes finished.*node 0: the loss is not finite"):
        run(**{"run.name": "y", "aggregation.min-nodes": 1, "surrogate.check": False})


@pytest.mark.parametrize(("when", "message"), [(0, "base model's held-out loss"), (1, "held-out loss after training")])
def test_scores_that_are_not_finite_stop_the_round(
    run: Run, when: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: round.Round) -> dict[str, float]:
        calls.append(1)
        return {"loss": float("nan") if when == 0 or len(calls) > 2 else 1.0}

    calls: list[int] = []
    monkeypatch.setattr(round.Round, "measure", measure)
    with pytest.raises(RoundFailed, match=rf"{message}.* is not finite"):
        run()


@pytest.mark.parametrize(("keep", "exported"), [("best", [1, 1, 3]), ("last", [1, 2, 3])])
def test_the_adapter_exported_is_of_the_best_round_or_the_last(
    run: Run, tmp_path: Path, keep: str, exported: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {1: 2.0, 2: 2.5, 3: 1.5}

    def measure(self: round.Round) -> dict[str, float]:
        return {"loss": losses[self.instructions.server_round]}

    monkeypatch.setattr(round.Round, "measure", measure)
    run(**{"train.keep": keep, "num-server-rounds": 2})
    card = (tmp_path / "x" / "nodes" / "0" / "adapter" / "README.md").read_text()
    assert f"| rounds | {exported[1]} of 2" in card
    run(**{"train.keep": keep, "num-server-rounds": 3, "run.resume": True})
    entries = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [e["exported-round"] for e in entries if e.get("partition-id") == 0] == exported
