"""The bottom's gradient: nonzero, and that of the formula."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_split.config import Lora
from fl_split.errors import TrainingError
from fl_split.model.adapters import adapter_shapes, attach, fresh_state, load_adapter_state, part_of
from fl_split.model.distill import Distiller
from fl_split.model.ends import load_ends
from fl_split.model.surrogate import join, kept_layers
from fl_split.model.trunk import LocalTrunk, load_trunk


def test_join_has_the_trunks_value_and_the_surrogates_gradient() -> None:
    torch.manual_seed(0)
    h1, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 4)
    surrogate, trunk, g = torch.tanh(h1 @ weight), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    joined = join(surrogate, trunk)
    assert torch.equal(joined, trunk)
    (got,) = torch.autograd.grad((joined * g).sum(), h1, retain_graph=True)
    formula = surrogate + (trunk - surrogate).detach()
    (expected,) = torch.autograd.grad((formula * g).sum(), h1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("count", "first", "end", "kept"),
    [(1, 2, 10, (2,)), (2, 2, 10, (2, 3)), (8, 2, 10, tuple(range(2, 10))), (3, 1, 4, (1, 2, 3)), (1, 5, 6, (5,))],
)
def test_kept_layers_are_the_trunks_first(count: int, first: int, end: int, kept: tuple[int, ...]) -> None:
    assert kept_layers("blocks", count, first, end) == kept
    assert kept_layers("auto", count, first, end) == kept_layers("auto", count + end, first, first + count) == kept
    assert kept_layers("identity", count, first, end) == kept_layers("none", count, first, end) == ()


def bottom_gradients(model_folder: Path, kind: str, layers: int) -> list[Tensor | None]:
    """Of a loss through the real trunk, for adapters whose B is not zero."""
    trunk = LocalTrunk(load_trunk(model_folder, 2, 2))
    client = load_ends(model_folder, 2, 2, trunk, surrogate=kind, surrogate_layers=layers)  # type: ignore[arg-type]
    model = attach(client, Lora(), train_bottom=True, seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(3, client.config.vocab_size, (4, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for name, p in model.named_parameters() if p.requires_grad and part_of(model, name) == "bottom"]


def cosine(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    def flat(grads: list[Tensor | None]) -> Tensor:
        return torch.cat([g.flatten() for g in grads if g is not None])

    return torch.cosine_similarity(flat(a), flat(b), dim=0).item()


def test_bottom_learns_with_a_surrogate_and_has_no_gradient_without(demo_model: Path) -> None:
    for kind in ("identity", "blocks"):
        grads = bottom_gradients(demo_model, kind, 2)
        assert len(grads) == 2 * 7 * 2  # layers, linears, A and B
        assert all(g is not None and g.abs().max() > 0 for g in grads)
    assert all(g is None for g in bottom_gradients(demo_model, "none", 2))


def test_more_kept_layers_come_closer_and_all_of_them_are_exact_on_a_trained_model(demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    exact = bottom_gradients(demo_model, "blocks", 4)
    full = AutoModelForCausalLM.from_pretrained(demo_model).requires_grad_(False)
    whole = bottom_gradients_of_full_model(full)
    for some in (exact, bottom_gradients(demo_model, "streamed", 1)):
        for got, expected in zip(some, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    identity = cosine(bottom_gradients(demo_model, "identity", 1), exact)
    blocks = cosine(bottom_gradients(demo_model, "blocks", 2), exact)
    assert identity < 0.9  # a trained trunk is not the identity
    assert identity < blocks < 0.999


def test_a_surrogate_that_diverges_names_its_own_rate() -> None:
    weight, h1 = torch.nn.Parameter(torch.ones(1)), torch.ones(1, 2, 3)
    distiller = Distiller({"weight": weight}, 0.5)
    with pytest.raises(TrainingError, match=r"not finite: this round is dropped.* lower surrogate\.distill-lr=0\.5"):
        distiller.observe(h1, h1 * weight * float("inf"), h1 + 1, None)


def bottom_gradients_of_full_model(full: torch.nn.Module) -> list[Tensor | None]:
    from peft import LoraConfig, get_peft_model

    layers = [0, 1, full.config.num_hidden_layers - 2, full.config.num_hidden_layers - 1]
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, layers_to_transform=layers, layers_pattern="layers")
    model = get_peft_model(full, config)
    load_adapter_state(model, fresh_state(adapter_shapes(model), 0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(3, full.config.vocab_size, (4, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    return [
        p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and any(f".layers.{i}." in name for i in (0, 1))
    ]
