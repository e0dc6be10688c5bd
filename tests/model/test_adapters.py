"""Adapters: which weights are whose, and an export that the full model takes."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import DECODERS
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fl_split.config import Aggregation, Lora
from fl_split.errors import ConfigError, NodeStateError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.evaluate import base_scores


def client_with_adapter(folder: Path, lora: Lora | None = None, *, train_bottom: bool = True) -> PeftModel:
    """Bottom 1, top 2 of 6 layers; B is not zero."""
    client = load_ends(folder, 1, 2, LocalTrunk(load_trunk(folder, 1, 2)))
    model = adapters.attach(client, lora or Lora(), train_bottom=train_bottom, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_export_gives_the_full_model_the_same_logits(
    checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    model = client_with_adapter(checkpoint(family))
    adapters.export(model, tmp_path / "adapter", str(checkpoint(family)), "", "a card")
    base = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    ids = torch.randint(3, 99, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        plain = base(ids, attention_mask=mask).logits
        full = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        expected = full(input_ids=ids, attention_mask=mask).logits
        got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 0.1  # the adapter does something
    lora_layers = {name.split("lora_A")[0] for name, _ in full.named_parameters() if "lora_A" in name}
    assert not any(f".{i}." in name for name in lora_layers for i in (1, 2, 3))  # none on the trunk's layers
    assert (tmp_path / "adapter" / "README.md").read_text() == "a card"
    assert full.peft_config["default"].layers_to_transform == [0, 4, 5]


@pytest.mark.parametrize("variant", ["rslora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_of_a_variant_gives_the_full_model_the_same_logits(
    checkpoint: Callable[[str], Path], family: str, variant: str, tmp_path: Path
) -> None:
    model = client_with_adapter(checkpoint(family), Lora(variant=variant, rank=4))  # type: ignore[arg-type]
    magnitudes = [name for name in adapters.adapter_state(model) if "magnitude" in name]
    assert bool(magnitudes) == (variant == "dora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    adapters.export(model, tmp_path, str(checkpoint(family)), "", "a card")
    lora, state = adapters.read_export(tmp_path)
    assert (lora.variant, lora.rank, len(state)) == (variant, 4, len(adapters.adapter_state(model)))
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint(family)), tmp_path).eval()
    ids = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        got, expected = model(input_ids=ids).logits, full(input_ids=ids).logits
        plain = client_with_adapter(checkpoint(family), Lora(rank=4))(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - plain).abs().max() > 0.01
    adapted = {name for name, _ in full.named_parameters() if "lora_" in name}
    assert not any(f".{i}." in name for name in adapted for i in (1, 2, 3))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_adapters_are_float32_on_a_base_in_bfloat16_and_both_ends_learn(
    checkpoint: Callable[[str], Path], variant: str
) -> None:
    folder = checkpoint("llama")
    trunk = LocalTrunk(load_trunk(folder, 1, 2, dtype=torch.bfloat16))
    client = load_ends(folder, 1, 2, trunk, dtype=torch.bfloat16)
    lora = Lora(variant=variant)  # type: ignore[arg-type]
    model = adapters.attach(client, lora, train_bottom=True, seed=0)
    ids = torch.randint(3, 99, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {p.dtype for _, p in trained} == {p.grad.dtype for _, p in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    learns = {adapters.part_of(model, name) for name, p in trained if p.grad.abs().max() > 0}
    assert learns == {"bottom", "top"}


def test_names_that_peft_takes_for_all_experts_are_left_out(tmp_path: Path) -> None:
    family = next(f for f in DECODERS if f.name == "deepseek_v3")
    family.save(tmp_path)
    model = client_with_adapter(tmp_path)
    assert all(".self_attn." in name for name in adapters.adapter_state(model))
    with pytest.raises(ConfigError, match="gate_proj is no linear module to be adapted"):
        client_with_adapter(tmp_path, Lora(target_modules="gate_proj,q_b_proj"))


def test_attaching_is_quiet(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    ends = load_ends(folder, 1, 2, LocalTrunk(load_trunk(folder, 1, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.attach(ends, Lora(), train_bottom=True, seed=0)


def test_export_replaces_an_earlier_one(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = client_with_adapter(checkpoint("llama"))
    for card in ("first", "second"):
        adapters.export(model, tmp_path / "adapter", "base", "", card)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "adapter" / "README.md").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("share", "layers"), [("none", set()), ("bottom", {0}), ("top", {4, 5}), ("both", {0, 4, 5})])
def test_shared_state_holds_the_named_part_only(
    checkpoint: Callable[[str], Path], share: str, layers: set[int]
) -> None:
    model = client_with_adapter(checkpoint("llama"))
    shared = adapters.shared_state(model, Aggregation.model_validate({"share": share}))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in shared} == layers
    assert all(".lora_A." in name or ".lora_B." in name for name in shared)


@pytest.mark.parametrize(("tensors", "expected"), [("a-only", ".lora_A."), ("b-only", ".lora_B.")])
def test_one_factor_shared_is_that_factor_and_nothing_else_that_a_variant_has(
    checkpoint: Callable[[str], Path], tensors: str, expected: str
) -> None:
    model = client_with_adapter(checkpoint("llama"), Lora(variant="dora"))
    shared = adapters.shared_state(model, Aggregation.model_validate({"share": "both", "tensors": tensors}))
    assert shared and all(expected in name for name in shared)


def test_what_is_frozen_stays_so_when_the_base_is_measured(checkpoint: Callable[[str], Path]) -> None:
    model = client_with_adapter(checkpoint("llama"))
    residual = {n.replace(".lora_", ".residual_"): value for n, value in adapters.adapter_state(model).items()}
    adapters.add_residual(model, residual)
    adapters.freeze_a(model, "top")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".residual." in name for name in trained)
    base_scores(model, lambda: {"loss": 0.0})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_residual_of_more_rank_than_its_modules_are_wide_is_whole(checkpoint: Callable[[str], Path]) -> None:
    """As a node's own product beside a full one is, where all adapted modules are square."""
    generator, logits = torch.Generator().manual_seed(0), []
    wide = torch.randn(40, 32, generator=generator), torch.randn(32, 40, generator=generator)
    for a, b in (wide, (torch.eye(32), wide[1] @ wide[0])):
        model = client_with_adapter(checkpoint("llama"), Lora(target_modules="q_proj"))
        modules = {name.split(".lora_")[0] for name in adapters.adapter_state(model)}
        both = {"residual_A": a, "residual_B": 0.01 * b}
        adapters.add_residual(model, {f"{module}.{name}.weight": x for module in modules for name, x in both.items()})
        logits.append(model.eval()(input_ids=torch.arange(3, 12)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)


def test_without_a_surrogate_the_bottom_has_no_adapter(checkpoint: Callable[[str], Path]) -> None:
    model = client_with_adapter(checkpoint("llama"), train_bottom=False)
    assert {adapters.part_of(model, name) for name in adapters.adapter_state(model)} == {"top"}
    assert [group["name"] for group in adapters.parameter_groups(model, 1e-3, 1e-3)] == ["top"]


def test_adapters_start_equal_on_every_node_and_leave_the_random_state_alone(
    checkpoint: Callable[[str], Path],
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = []
    for _ in range(2):
        client = load_ends(checkpoint("llama"), 1, 2, LocalTrunk(load_trunk(checkpoint("llama"), 1, 2)))
        torch.manual_seed(5)
        states.append(adapters.adapter_state(adapters.attach(client, Lora(), train_bottom=True, seed=3)))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_round_trips_and_a_misfit_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = client_with_adapter(checkpoint("llama"))
    other = client_with_adapter(checkpoint("llama"))
    state = {name: value + 1 for name, value in adapters.adapter_state(model).items()}
    adapters.load_adapter_state(other, state)
    assert all(torch.equal(value, state[name]) for name, value in adapters.adapter_state(other).items())
    smaller = client_with_adapter(checkpoint("llama"), Lora(rank=4))
    with pytest.raises(NodeStateError, match=r"do not fit this run's adapter .*lora"):
        adapters.load_adapter_state(smaller, state)


def test_target_modules_can_be_named_and_a_wrong_name_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = client_with_adapter(checkpoint("llama"), Lora.model_validate({"target-modules": "q_proj, v_proj"}))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapters.adapter_state(model)} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(ConfigError, match="c_attn is no linear module .* q_proj"):
        client_with_adapter(checkpoint("llama"), Lora.model_validate({"target-modules": "c_attn"}))
