"""How much of what is shared a node takes: weights, the mixture of two adapters, and its export."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fl_split.config import Lora
from fl_split.data.store import Prepared
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import personal
from fl_split.node.trial import Losses


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> PeftModel:
    """A client of 2 + 2 + 2 layers whose adapter does something."""
    folder = checkpoint("llama")
    client = load_ends(folder, 2, 2, LocalTrunk(load_trunk(folder, 2, 2)))
    model = adapters.attach(client, Lora(rank=4), train_bottom=True, seed=0)
    adapters.load_adapter_state(model, some(adapters.adapter_state(model), 1))
    return model.eval()


def some(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random arrays of these names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in like.items()}


@pytest.fixture
def others(model: PeftModel) -> dict[str, Tensor]:
    """Whole products of the names of the model's adapter."""
    return {name.replace(".lora_", ".residual_"): x for name, x in some(adapters.adapter_state(model), 2).items()}


IDS = torch.arange(3, 12)[None]


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


def test_export_of_a_mixture_gives_the_full_model_the_same_logits(
    model: PeftModel, others: dict[str, Tensor], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    own = adapters.adapter_state(model)
    alone = logits(model)
    adapters.add_residual(model, others)
    adapters.mix(model, {"bottom": 0.25, "top": 1.0})
    mixed = logits(model)
    adapters.export(model, tmp_path / "adapter", str(checkpoint("llama")))
    full = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint("llama")), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(logits(full), mixed, rtol=0, atol=1e-4)
    assert full.peft_config["default"].r == 8 and (mixed - alone).abs().max() > 0.1
    products = {
        name: (1 - w) * 4.0 * own[name.replace("_A", "_B")] @ own[name]
        + w * others[name.replace("lora_A", "residual_B")] @ others[name.replace("lora_A", "residual_A")]
        for name in own
        if ".lora_A." in name
        for w in [0.25 if adapters.part_of(model, name) == "bottom" else 1.0]
    }
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, expected in products.items():
        torch.testing.assert_close(written[name.replace("_A", "_B")] @ written[name], expected, rtol=1e-4, atol=1e-6)
    assert adapters.scaling_of(model) == 4.0  # of the node's own, which is what it says of what it shares


def test_without_others_the_model_is_what_it_was(model: PeftModel, others: dict[str, Tensor]) -> None:
    before = logits(model)
    assert personal.weigh(model, others, ["bottom", "top"], losses(1.0), lambda: losses(1.0))[0] == {}
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]


def losses(mean: float, spread: float = 0.0) -> Losses:
    """Of 20 examples of one target each."""
    values = mean + spread * torch.linspace(-1, 1, 20, dtype=torch.float64)
    return values, torch.ones(20, dtype=torch.float64)


def test_weights_are_the_best_of_the_grid_first_for_all_then_for_the_bottom(
    model: PeftModel, others: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, float]] = [{}]
    monkeypatch.setattr(adapters, "mix", lambda model, weights: tried.append(dict(weights)))

    def measure() -> Losses:
        now = tried[-1]
        return losses(1 + abs(now.get("bottom", 0) - 0.25) + 2 * abs(now.get("top", 0) - 0.75))

    weights, (left, _) = personal.weigh(model, others, ["bottom", "top"], measure(), measure)
    assert weights == {"bottom": 0.25, "top": 0.75} and left.mean() == 1.0
    assert tried[-1] == {"bottom": 0.25, "top": 0.75} and len(tried) < 12  # and is left so


def test_a_gain_within_one_standard_error_is_none(model: PeftModel, others: dict[str, Tensor]) -> None:
    answers: Iterator[Losses] = iter([losses(0.99, spread=0.5) for _ in range(4)])
    assert personal.weigh(model, others, ["top"], losses(1.0), lambda: next(answers))[0] == {}
    answers = iter([losses(0.7, spread=0.5) for _ in range(4)])
    assert personal.weigh(model, others, ["top"], losses(1.0), lambda: next(answers))[0] == {"top": 0.25}


def heldout(keys: list[int]) -> Prepared:
    return Prepared([], {"key": np.array(keys, dtype=np.uint64)}, np.arange(len(keys)))


def test_what_chooses_is_not_what_is_reported_and_each_row_keeps_its_side() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, 100).tolist()
    first, second = personal.halves(heldout([*keys, keys[0]]))
    assert not set(first.keys.tolist()) & set(second.keys.tolist())
    assert len(first) + len(second) == 101 and min(len(first), len(second)) > 30
    more, _ = personal.halves(heldout([*keys, *rng.integers(0, 2**63, 50).tolist()]))
    assert set(first.keys.tolist()) <= set(more.keys.tolist())


def test_too_few_to_choose_by_means_alone() -> None:
    chooses, reported = personal.halves(heldout([*range(0, 40, 2), *range(1, 15, 2)]))
    assert len(chooses) == 0 and len(reported) == 27
