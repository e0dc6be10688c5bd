"""`train.top-lr = "auto"`: the rule, and that a test of rates leaves nothing behind but the rate."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_app
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from fl_split import demo
from fl_split.config import CAREFUL_RATE, Lora, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import load_examples
from fl_split.errors import TrunkError
from fl_split.model import adapters
from fl_split.model.slots import Nowhere, trunk_calls_of
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import rate_search, round
from fl_split.node.rate_search import choose, find, search
from fl_split.node.trial import Gain, draw
from fl_split.tools.gradcheck import Candidate, build

SOUTH = str(demo.data_folder() / "hospital-south.jsonl")


# ------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("won", "tried", "taken"),
    [
        ({4e-3: 0.10, 8e-3: 0.13, 1.6e-2: 0.12}, 3, 8e-3),
        ({4e-3: 0.10, 8e-3: 0.13, 1.6e-2: 0.15}, 3, 1.6e-2),  # no higher, however good it is
        ({4e-3: 0.12, 8e-3: 0.13, 1.6e-2: 0.12, 2e-3: 0.11}, 4, 4e-3),  # enough, so the next one down is tried
        ({4e-3: 0.14, 8e-3: 0.13, 2e-3: 0.10}, 3, 4e-3),
        ({4e-3: 0.05, 8e-3: -1.0, 2e-3: 0.09, 1e-3: 0.1, 5e-4: 0.05}, 5, 1e-3),
        ({4e-3: -inf, 2e-3: -1.0, 1e-3: 0.1, 5e-4: 0.08}, 4, 1e-3),  # nothing is higher than what is not finite
        ({4e-3: 0.01, 8e-3: 0.0, 2e-3: 0.01, 1e-3: 0.01, 5e-4: 0.0, 2.5e-4: 0.0}, 6, CAREFUL_RATE),  # not for sure
        ({4e-3: -inf, 2e-3: -inf, 1e-3: -inf, 5e-4: -inf, 2.5e-4: -inf}, 5, CAREFUL_RATE),
    ],
)
def test_smallest_rate_is_taken_that_wins_nearly_as_much_as_the_best(
    won: dict[float, float], tried: int, taken: float
) -> None:
    asked = search(lambda rate: Gain(won[rate], 0.01))
    assert asked.keys() == won.keys() and len(asked) == tried
    found = choose(asked)
    assert found.rate == taken
    assert ("none of it for sure" in found.why) == (taken == CAREFUL_RATE)


def test_sentence_says_what_and_why() -> None:
    found = choose({8e-3: Gain(0.13, 0.01), 4e-3: Gain(0.1, 0.01)})
    assert str(found) == (
        "train.top-lr='auto' is 0.008 here: 10 steps of the top alone lower the loss on other examples by 0.100 at "
        "0.004, 0.130 at 0.008; this is the smallest that is enough"
    )


PRIVATE = {"dp.record-noise-multiplier": 1.0, "surrogate.kind": "none", "train.keep": "last"}


def no_draw() -> None:
    return None


@pytest.mark.parametrize(
    ("changes", "late", "why"),
    [
        ({"num-server-rounds": 2, "train.steps": 14}, False, "not worth it for 28 steps in all, fewer than 30"),
        ({}, False, "the examples to train on are too few"),
        ({}, True, "what the rounds before were trained with"),
        (PRIVATE, False, "dp.record-* lets nothing be chosen"),
    ],
)
def test_without_a_test_the_rate_is_the_careful_one(
    changes: dict[str, Any], late: bool, why: str, tmp_path: Path
) -> None:
    config = RunConfig.from_flat({"model.name": "/m", **changes})
    found = find(config, None, no_draw, tmp_path, late)  # type: ignore[arg-type]
    assert found.rate == CAREFUL_RATE
    assert why in found.why


# ------------------------------------------------------------------------------------------------------- one model


class Counting:
    """A trunk that notes the sequences it is asked for."""

    def __init__(self, trunk: Any) -> None:
        self.trunk, self.seen = trunk, list[bytes]()

    def start(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Any:
        assert attention_mask is not None
        self.seen += [
            rows[mask.bool()].numpy().tobytes() for rows, mask in zip(hidden_states, attention_mask, strict=True)
        ]
        return self.trunk.start(hidden_states, attention_mask, position_ids)


Setting = tuple[RunConfig, PeftModel, Callable[[], Any]]


@pytest.fixture
def make(demo_model: Path) -> Callable[..., Setting]:
    def make(kind: str, **changes: Any) -> Setting:
        keys = {"model.name": "/m", "data.max-length": 48, "surrogate.kind": kind, "trunk.exact-gradient": True}
        config = RunConfig.from_flat({**keys, **changes})
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
        examples = load_examples(config.data, NodeConfig(data_path=SOUTH), tokenizer, 0).train
        trunk = Counting(LocalTrunk(load_trunk(demo_model, 2, 2)))
        model = build(demo_model, 2, 2, trunk, Candidate(kind, 2), Lora(dropout=0.1))  # type: ignore[arg-type]
        return config, model, partial(draw, examples, tokenizer, config, 0, rate_search.STEPS, rate_search.MEASURED)

    return make


@pytest.mark.parametrize("kind", ["none", "blocks", "exact"])
def test_trunk_gets_each_sequence_once_and_all_is_as_before(
    make: Callable[..., Setting], kind: str, tmp_path: Path
) -> None:
    config, model, drawn = make(kind)
    before, random, grads = adapters.adapter_state(model), torch.get_rng_state(), trainable(model)
    found = find(config, model, drawn, tmp_path / "answers", late=False)
    assert "this is the smallest that is enough" in found.why
    seen = trunk_calls_of(model.get_base_model()).trunk.seen  # type: ignore[attr-defined]
    assert len(set(seen)) == len(seen) == 64 + 80
    assert not (tmp_path / "answers").exists()
    assert all(torch.equal(value, before[name]) for name, value in adapters.adapter_state(model).items())
    assert torch.equal(torch.get_rng_state(), random) and trainable(model) == grads
    assert all(parameter.grad is None for parameter in model.parameters())


def trainable(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_trunk_that_fails_leaves_nothing_behind(make: Callable[..., Setting], tmp_path: Path) -> None:
    config, model, drawn = make("none")

    class Failing(Nowhere):
        def start(self, *args: Any) -> Any:
            raise TrunkError("gone")

    trunk_calls_of(model.get_base_model()).trunk = Failing()
    with pytest.raises(TrunkError, match="gone"):
        find(config, model, drawn, tmp_path / "answers", late=False)
    assert not (tmp_path / "answers").exists()
    assert isinstance(trunk_calls_of(model.get_base_model()).trunk, Failing)


# -------------------------------------------------------------------------------------------------- whole rounds


class Killed(BaseException):
    """As if the process had ended."""


@pytest.fixture
def run(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A short run of which the test is worth it, on the demo's model under another name; the run's folder."""
    for module, name, value in (
        (rate_search, "LEAST_STEPS", 1),
        (rate_search, "_LOWEST", 4e-3),
        (rate_search, "_HIGHEST", 8e-3),
        (rate_search, "STEPS", 2),
        (rate_search, "MEASURED", 16),
    ):
        monkeypatch.setattr(module, name, value)
    common = {
        "model.name": str(demo_model),
        "data.path": SOUTH,
        "data.max-length": 32,
        "aggregation.min-nodes": 1,
        "train.batch-size": 2,
        "train.keep": "last",
    }

    def run(name: str, nodes: int = 1, **changes: Any) -> Path:
        run_app(tmp_path, name, nodes=nodes, **common, **changes)
        return tmp_path / name

    return run


def rates(folder: Path, node: int = 0) -> list[float]:
    files = (folder / "nodes" / str(node) / "state").glob("*/rates.json")
    return [json.loads(file.read_text())["rate"] for file in files]


def exported(folder: Path, node: int = 0) -> dict[str, Tensor]:
    return load_file(folder / "nodes" / str(node) / "adapter" / "adapter_model.safetensors")


def test_run_tests_once_and_is_that_of_the_rates_in_numbers_bit_for_bit(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()
    monkeypatch.setattr(rate_search, "find", lambda *a, **k: asked.append(True) or find(*a, **k))
    caplog.set_level("INFO")
    found = run("auto")
    assert len(asked) == 1 and caplog.text.count("train.top-lr='auto' is ") == 1
    assert "each node settles its own before its first round" in caplog.text
    (rate,) = rates(found)
    assert f"rates {rate / 2:g} and {rate:g}" in caplog.text
    given = run("given", **{"train.top-lr": rate, "train.bottom-lr": rate / 2})
    assert len(asked) == 1 and not rates(given)
    one, other = exported(found), exported(given)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("when", ["in the test", "in the second round"])
def test_after_a_kill_the_rates_are_the_same(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    asked = list[bool]()
    monkeypatch.setattr(rate_search, "find", lambda *a, **k: asked.append(True) or find(*a, **k))
    whole = run("whole")

    save = round.Round.save

    def kill(*args: Any) -> Any:
        if isinstance(args[0], round.Round) and args[0].instructions.server_round == 1:
            return save(*args)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        if when == "in the test":
            patched.setattr(rate_search, "choose", kill)
        else:
            patched.setattr(round.Round, "save", kill)
        run("killed")
    again = run("killed", **{"run.resume": True})
    assert len(asked) == (3 if when == "in the test" else 2)
    assert rates(again) == rates(whole)
    one, other = exported(whole), exported(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_others_share_does_not_change_the_rates(run: Callable[..., Path]) -> None:
    """A node that has lost its disk tests where it tested first, whatever the server sends by now."""
    folder = run("shared", nodes=2, **{"aggregation.share": "both"})
    (before,) = (folder / "nodes" / "1" / "state").glob("*/rates.json")
    found = before.read_text()  # with what each rate has won
    shutil.rmtree(folder / "nodes" / "1" / "state")
    run("shared", nodes=2, **{"aggregation.share": "both", "run.resume": True, "num-server-rounds": 3})
    assert before.read_text() == found


def test_run_that_began_without_a_test_keeps_its_rates(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_search, "LEAST_STEPS", 5)
    folder = run("x")
    assert rates(folder) == [CAREFUL_RATE]
    run("x", **{"run.resume": True, "num-server-rounds": 4})
    assert rates(folder) == [CAREFUL_RATE]


def test_demo_has_rates_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run_app(tmp_path, nodes=1, **{"data.path": SOUTH, "aggregation.min-nodes": 1, "num-server-rounds": 1})
    assert "rates 0.008 and 0.016" in caplog.text and not rates(tmp_path / "x")
