"""Whether the bottom's gradient is tried before it is followed, and what the trial can tell."""

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from flwr.app import Context, RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import client_app
import server_app
from fl_split import demo
from fl_split.config import Data, Lora, NodeConfig, RunConfig, Train
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.model import adapters, slots
from fl_split.model.loss import Batch, count_targets, example_losses, forward
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import trial
from fl_split.node.train import (
    RoundSettings,
    Trained,
    make_distiller,
    make_optimizer,
    optimizer_state,
    train_round,
)
from fl_split.node.trial import STEPS, Gain, Losses, explain, gain, is_due, passes, try_bottom
from fl_split.tools.gradcheck import Candidate, build

Made = tuple[list[Batch], list[Batch]]


@pytest.fixture(scope="module")
def make_batches(demo_model: Path) -> Callable[[], Made]:
    """Batches to try on, and others to measure with."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    node = NodeConfig(data_path=str(demo.data_folder() / "hospital-south.jsonl"))
    train = load_examples(Data.model_validate({"max-length": 48}), node, tokenizer, 0).train

    def make() -> Made:
        measured = list(heldout_batches([train[i] for i in range(32)], tokenizer, 8))
        others = [train[i] for i in range(32, 112)]
        return list(islice(training_batches(others, tokenizer, 8, 0, 0), STEPS)), measured

    return make


def make_model(demo_model: Path, kind: str) -> PeftModel:
    return build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate(kind, 2), Lora())  # type: ignore[arg-type]


class _Value(torch.autograd.Function):
    """The trunk's value; its gradient is another matter."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, trunk: Tensor) -> Tensor:
        return trunk.view_as(trunk)


class _Random(_Value):
    """As its gradient noise of the size of the real one."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        noise = torch.randn(grads[0].shape, generator=_Random.generator)
        return noise * grads[0].norm() / noise.norm(), None

    generator = torch.Generator()


class _Opposite(_Value):
    """As its gradient the one that leads away."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -grads[0], None


class _Nothing(_Value):
    """A gradient that is no number, as of a surrogate that has diverged."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * float("nan"), None


CONFIG = Train.model_validate({"steps": 10, "bottom-lr": 8e-3, "top-lr": 1.6e-2})


def try_kind(model: PeftModel, made: Made, config: Train = CONFIG) -> Gain:
    return try_bottom(model, make_optimizer(model, config), *made, config, RoundSettings())


@pytest.mark.parametrize(
    ("steps", "scheduler", "in_trial", "share"),
    [
        (3, "linear", "linear", 0.75),
        (20, "constant", "constant", 1.0),
        (500, "cosine", "linear", (1 + 0.5**0.5) / 2),
    ],
)
def test_trial_is_the_rest_of_the_run_in_fewer_steps_with_the_moments_of_now(
    demo_model: Path,
    make_batches: Callable[[], Made],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    scheduler: str,
    in_trial: str,
    share: float,
) -> None:
    config = CONFIG.model_copy(update={"steps": steps, "scheduler": scheduler})
    model, (batches, measured) = make_model(demo_model, "exact"), make_batches()
    optimizer = make_optimizer(model, config)
    train_round(model, optimizer, iter(batches), config.model_copy(update={"steps": 3}), RoundSettings(0, 900))
    begun = {name: value.clone() for name, value in optimizer_state(model, optimizer).items()}
    seen: list[tuple[Train, RoundSettings]] = []

    def watched(model: PeftModel, used: Any, batches: Any, config: Train, settings: RoundSettings) -> Trained:
        moments = optimizer_state(model, used)
        assert moments.keys() == begun.keys() and all(torch.equal(moments[name], begun[name]) for name in begun)
        seen.append((config, settings))
        return train_round(model, used, batches, config.model_copy(update={"steps": 3}), settings)

    monkeypatch.setattr(trial, "train_round", watched)
    try_bottom(model, optimizer, batches, measured, config, RoundSettings(225, 900, proximal_mu=0.1))
    assert [settings.trains_bottom for _, settings in seen] == [False, True]
    for used, settings in seen:
        assert (used.steps, used.scheduler) == (STEPS, in_trial)
        assert used.rates == pytest.approx([rate * share for rate in CONFIG.rates])
        assert (settings.first_step, settings.total_steps, settings.proximal_mu) == (0, None, 0.1)
    after = optimizer_state(model, optimizer)
    assert after.keys() == begun.keys() and all(torch.equal(after[name], begun[name]) for name in begun)


def test_exact_gradient_is_a_sure_gain_and_model_and_gradients_stay_as_they_were(
    demo_model: Path, make_batches: Callable[[], Made]
) -> None:
    model = make_model(demo_model, "exact")
    before = adapters.adapter_state(model)
    result = try_kind(model, make_batches())
    assert result.is_sure
    assert all(torch.equal(value, before[name]) for name, value in adapters.adapter_state(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_gradient_is_not_followed(
    demo_model: Path, make_batches: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "join", _Random.apply)
    model = make_model(demo_model, "identity")
    batches, measured = make_batches()
    # the demo's base model is so sure of the wrong that almost any change helps: let the top learn first
    train_round(model, make_optimizer(model, CONFIG), iter(batches * 3), CONFIG, RoundSettings(trains_bottom=False))
    for seed in range(5):
        _Random.generator.manual_seed(seed)
        assert not try_kind(model, (batches, measured)).is_sure


def test_dropout_alone_is_no_gain(demo_model: Path, make_batches: Callable[[], Made]) -> None:
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("identity"), Lora(dropout=0.2))
    still = CONFIG.model_copy(update={"bottom_lr": 1e-30, "max_grad_norm": 1e9})  # so that clipping adds nothing either
    result = try_kind(model, make_batches(), still)
    assert result.mean == 0.0 and result.top > 0


def test_trial_in_which_the_loss_alone_is_no_longer_finite_is_no_gain(
    demo_model: Path, make_batches: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(demo_model, "identity")
    measured = iter([0.0, 0.0, float("nan")])
    monkeypatch.setattr(trial, "train_round", lambda *_: None)
    monkeypatch.setattr(trial, "measure", lambda *_: (torch.full((8,), next(measured)), torch.ones(8)))
    assert try_kind(model, make_batches()) == Gain(float("-inf"), float("inf"))


def test_trial_teaches_a_surrogate_nothing(demo_model: Path, make_batches: Callable[[], Made]) -> None:
    model = make_model(demo_model, "distilled")
    distiller = make_distiller(model, 1e-3)
    try_kind(model, make_batches())
    assert not distiller._gradients
    assert slots.trunk_calls_of(model.get_base_model()).distiller is distiller


def test_losses_of_examples_add_up_to_the_batches(demo_model: Path, make_batches: Callable[[], Made]) -> None:
    model = make_model(demo_model, "identity").eval()
    for batch in make_batches()[1][:2]:
        with torch.no_grad():
            sums, counts = example_losses(model, batch)
            whole, _ = forward(model, batch, 1)
        assert counts.sum() == count_targets(batch)
        torch.testing.assert_close(sums.sum(), whole)


def test_error_covers_the_truth_in_nine_of_ten_trials() -> None:
    """Against 5,000 examples of which a trial sees 64; lengths and falls as uneven as in real text."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, 200, (5000,), generator=generator).double()
    falls = (0.02 + 0.2 * torch.randn(5000, generator=generator).exp() * 0.3) * targets
    falls -= 0.3 * targets * (torch.rand(5000, generator=generator) < 0.3)
    truth = (falls.sum() / targets.sum()).item()
    covered = 0
    for _ in range(100):
        some = torch.randperm(5000, generator=generator)[:64]
        before: Losses = (falls[some], targets[some])
        found = gain(before, (torch.zeros(64), targets[some]))
        covered += abs(found.mean - truth) <= 2 * found.error
    assert 90 <= covered < 100  # and is not merely wide


def test_trials_become_rarer() -> None:
    assert [n for n in range(1, 40) if is_due(n, n - 1)] == [1, 2, 4, 8, 16, 32]


def test_node_that_missed_a_trial_has_it_when_it_comes_back() -> None:
    assert is_due(3, 0) and is_due(3, 1) and is_due(5, 3) and is_due(13, 7) and is_due(16, 3)
    assert not is_due(3, 2) and not is_due(7, 4) and not is_due(15, 8)


def test_gain_has_to_be_sure() -> None:
    assert not Gain().is_sure and not Gain(0.019, 0.01).is_sure and not Gain(-1.0, 0.01).is_sure
    assert Gain(0.021, 0.01).is_sure


def test_to_go_on_a_bottom_must_not_lose() -> None:
    assert passes(Gain(0.021, 0.01), is_training=False) and passes(Gain(0.021, 0.01), is_training=True)
    assert not passes(Gain(0.005, 0.01), is_training=False) and passes(Gain(0.005, 0.01), is_training=True)
    assert not passes(Gain(-0.001, 0.01), is_training=True)
    assert not passes(Gain(float("-inf"), float("inf")), is_training=True) and not passes(Gain(), is_training=True)


def test_explanation_says_what_was_measured_and_what_would_help() -> None:
    text = explain(Gain(-0.01, 0.02, 0.3), "identity")
    assert (
        "raised the loss on other examples by 0.0100 (standard error 0.0200), the top alone lowered it by 0.3000"
        in text
        and "in a trial of 30 steps" in text
        and "exact gradient" in text
    )
    assert "lowered" in explain(Gain(0.01, 0.02), "blocks")
    assert "with the gradient of surrogate.kind='blocks' numbers were no longer finite. Lower rates would help" in (
        explain(Gain(float("-inf"), float("inf")), "blocks")
    )


# -------------------------------------------------------------------------------------------------- whole rounds


def run(tmp_path: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """One node's rounds on the demo, in this process; the metrics of each."""
    config = {
        **RunConfig().to_flat(),
        "surrogate.kind": "blocks",
        "num-server-rounds": 2,
        "train.steps": 3,
        "train.bottom-lr": 4e-3,
        "train.top-lr": 4e-3,
        "data.max-length": 48,
        "data.holdout": 0.05,
        "aggregation.min-nodes": 1,
        "data.path": str(demo.data_folder() / "hospital-south.jsonl"),
        "run.dir": str(tmp_path),
        "run.name": name,
        **changes,
    }
    grid = InProcessGrid(client_app.app, 1, config)
    server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "partition-id" in entry]


def exported(tmp_path: Path, name: str) -> dict[str, Tensor]:
    return load_file(tmp_path / name / "nodes" / "0" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("join", "why"), [(_Opposite, "raised the loss on other examples"), (_Nothing, "numbers were no longer finite")]
)
def test_bottom_that_fails_its_trial_leaves_the_run_that_never_had_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, join: Any, why: str
) -> None:
    run(tmp_path, "none", **{"surrogate.kind": "none"})
    monkeypatch.setattr(slots, "join", join.apply)
    rounds = run(tmp_path, "opposite", **{"surrogate.kind": "identity"})
    assert [entry["bottom-trained"] for entry in rounds] == [0, 0]
    assert "the bottom is not trained: in a trial of 30 steps" in caplog.text and why in caplog.text
    none, opposite = exported(tmp_path, "none"), exported(tmp_path, "opposite")
    tops = {name for name in opposite if ".layers.0." not in name and ".layers.1." not in name}
    assert tops == none.keys()
    assert all(torch.equal(none[name], opposite[name]) for name in tops)  # bit for bit
    assert all(not opposite[name].any() for name in opposite.keys() - tops if ".lora_B." in name)


@pytest.mark.parametrize("kind", ["blocks", "distilled"])
def test_useful_bottom_trains_without_another_trial(tmp_path: Path, kind: str) -> None:
    rounds = run(tmp_path, "x", **{"surrogate.kind": kind, "train.steps": 10, "num-server-rounds": 3})
    assert rounds[0]["bottom-trained"] == 1
    assert rounds[0]["bottom-gain"] > 2 * rounds[0]["bottom-gain-error"] > 0
    assert rounds[2]["bottom-gain"] == rounds[1]["bottom-gain"] != rounds[0]["bottom-gain"]  # the third has no trial
    assert any(value.any() for name, value in exported(tmp_path, "x").items() if ".layers.0." in name and "_B." in name)


@pytest.mark.parametrize("kind", ["blocks", "distilled"])
def test_trial_that_is_passed_leaves_the_run_that_was_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run(tmp_path, "untried", **{"surrogate.kind": kind, "surrogate.check": False})
    monkeypatch.setattr("fl_split.node.steps.passes", lambda *_: True)
    rounds = run(tmp_path, "tried", **{"surrogate.kind": kind})
    assert all(entry["bottom-trained"] == 1 and entry["bottom-gain-error"] > 0 for entry in rounds)
    untried, tried = (
        {
            file.name: load_file(file)
            for file in (tmp_path / name / "nodes" / "0").glob("state/*/round-0002/*.safetensors")
        }
        for name in ("untried", "tried")
    )
    del untried["numbers.safetensors"], tried["numbers.safetensors"]  # losses: evaluation's calls meet in other batches
    assert tried.keys() == untried.keys() >= {"adapter.safetensors", "optimizer.safetensors"}
    for file, values in untried.items():
        assert tried[file].keys() == values.keys()
        assert all(torch.equal(tried[file][name], value) for name, value in values.items()), file  # bit for bit


def test_bottom_that_trains_goes_on_until_a_trial_shows_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = iter([Gain(0.01, 0.01), Gain(0.03, 0.01), Gain(0.01, 0.01), Gain(-0.01, 0.01)])
    monkeypatch.setattr("fl_split.node.steps.try_bottom", lambda *_: next(gains))
    rounds = run(tmp_path, "x", **{"num-server-rounds": 9, "train.steps": 1})
    assert [entry["bottom-trained"] for entry in rounds] == [0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_surrogate_that_learns_goes_on_learning_while_the_bottom_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_split.node.trial._SURE", 1e9)
    rounds = run(tmp_path, "x", **{"surrogate.kind": "distilled"})
    assert [entry["bottom-trained"] for entry in rounds] == [0, 0]
    state = next((tmp_path / "x" / "nodes" / "0" / "state").glob("*/round-0002/surrogate-optimizer.safetensors"))
    assert any(value.any() for value in load_file(state).values())
    assert all(not v.any() for name, v in exported(tmp_path, "x").items() if ".layers.0." in name and "_B." in name)


def test_too_few_examples_to_try_train_no_bottom_unless_told_to(
    tmp_path: Path, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"How many tablets on day {i}?", "answer": f"{i} tablets."} for i in range(20)]
    few = {"model.name": str(demo.model_folder()), "data.path": str(jsonl(rows)), "num-server-rounds": 1}
    assert run(tmp_path, "few", **few)[0]["bottom-trained"] == 0
    assert "are too few to try whether surrogate.kind='blocks' gives it a useful gradient" in caplog.text
    assert run(tmp_path, "told", **few, **{"surrogate.check": False})[0]["bottom-trained"] == 1


# ---------------------------------------------------------------------------------------------------- a real model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identity", "blocks"])
def test_on_a_real_model_the_heldout_loss_does_not_rise_because_of_the_bottom(tmp_path: Path, kind: str) -> None:
    """FL_SPLIT_MODEL: a pretrained decoder's folder; FL_SPLIT_DATA: a file of questions and answers."""
    model, data = os.environ.get("FL_SPLIT_MODEL"), os.environ.get("FL_SPLIT_DATA")
    if not model or not data:
        pytest.skip("needs a pretrained model and data: set FL_SPLIT_MODEL and FL_SPLIT_DATA")
    setting = {
        "model.name": model,
        "data.path": data,
        "data.max-length": 80,
        "data.holdout": 0.05,
        "train.steps": 10,
        "train.bottom-lr": 4e-3,  # what `auto` finds on SmolLM2-135M
        "train.top-lr": 8e-3,
        "trunk.wire-dtype": "float32",
    }
    none, tried = (run(tmp_path, kind, **setting, **{"surrogate.kind": kind}) for kind in ("none", kind))
    losses = [rounds[-1]["heldout-loss-after"] for rounds in (none, tried)]
    if any(entry["bottom-trained"] for entry in tried):
        assert losses[1] <= losses[0]
    else:
        assert losses[1] == losses[0]
