"""Split equals whole for every family in `families`, bit for bit in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CLASSIFIERS, DECODERS, LABELS, Family, table
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fl_split.config import Lora
from fl_split.errors import SplitError
from fl_split.model import adapters
from fl_split.model.ends import head_of, load_ends
from fl_split.model.loading import boundaries_of
from fl_split.model.trunk import LocalTrunk, load_trunk

ALL = [*DECODERS, *CLASSIFIERS]
every_family = pytest.mark.parametrize("family", ALL, ids=lambda f: f"{f.name}{'-classifier' if f.classifier else ''}")
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7]),
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2]),
}
BOTTOM, TOP = 1, 2
NOT_STREAMED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "minimax")  # see models.md


@dataclass
class Whole:
    """A family's checkpoint, the full model and the trunk."""

    folder: Path
    full: PreTrainedModel
    trunk: PreTrainedModel

    def client(self, family: Family, **options: Any) -> PreTrainedModel:
        labels = LABELS if family.classifier else ()
        return load_ends(self.folder, BOTTOM, TOP, LocalTrunk(self.trunk), labels=labels, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Whole]:
    made: dict[int, Whole] = {}

    def make(family: Family) -> Whole:
        if id(family) not in made:
            folder = tmp_path_factory.mktemp(family.name)
            family.save(folder)
            full = family.auto.from_pretrained(folder).requires_grad_(False).eval()
            made[id(family)] = Whole(folder, full, load_trunk(folder, BOTTOM, TOP))
        return made[id(family)]

    return make


def logits(model: Any, family: Family, mask: Tensor | None) -> Tensor:
    """Of real tokens, ``[tokens, vocab]``, or of sequences, ``[batch, labels]``."""
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    if mask is not None:
        ids = ids * mask
    options = {} if family.classifier else {"use_cache": False}
    out: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    return out if family.classifier or mask is None else out[mask.bool()]


@every_family
def test_logits_equal_the_full_models_bit_for_bit(whole: Callable[[Family], Whole], family: Family) -> None:
    parts = whole(family)
    client = parts.client(family, surrogate="none")
    with torch.no_grad():
        for mask in MASKS.values():
            expected = logits(parts.full, family, mask)
            assert expected.std() > 1e-3
            assert torch.equal(logits(client, family, mask), expected)


@every_family
@pytest.mark.parametrize("surrogate", ["exact", "streamed"])
def test_gradients_equal_the_full_models(whole: Callable[[Family], Whole], family: Family, surrogate: str) -> None:
    """Of the top and of a classifier's head bit for bit; with a surrogate that is exact also of the bottom."""
    parts = whole(family)
    if surrogate == "streamed" and family.model_type in NOT_STREAMED:
        with pytest.raises(SplitError, match="or keeps it in another form"):
            parts.client(family, surrogate=surrogate)
        return
    client = parts.client(family, surrogate=surrogate)
    cut = boundaries_of(client)
    found: list[dict[str, Tensor]] = []
    for model in (parts.full, client):
        layers = model.base_model.get_submodule(cut.layers_path)
        trained = [layers[i] for i in (*cut.bottom, *cut.top)] + [model.get_submodule(m) for m in head_of(client)]
        for module in trained:
            module.requires_grad_(True)
        out = logits(model, family, MASKS["right"])
        torch.nn.functional.cross_entropy(out.flatten(0, -2), torch.arange(len(out)) % 3).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    whole_grads, split_grads = found
    in_bottom = [name for name in split_grads if f"{cut.layers_name}.0." in name]
    assert len(in_bottom) > 1
    assert all(split_grads[name].abs().max() > 0 for name in in_bottom if name.endswith("weight"))
    for name, gradient in split_grads.items():
        tolerance = 1e-3 * whole_grads[name].abs().max().item() if name in in_bottom else 0
        torch.testing.assert_close(gradient, whole_grads[name], rtol=0, atol=tolerance, msg=name)
    assert {n for n in whole_grads if not any(f"{cut.layers_name}.{i}." in n for i in cut.trunk)} == set(split_grads)


@every_family
def test_export_gives_the_full_model_the_same_logits(
    whole: Callable[[Family], Whole], family: Family, tmp_path: Path
) -> None:
    parts = whole(family)
    model = adapters.attach(parts.client(family, surrogate="identity"), Lora(), train_bottom=True, seed=0).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.export(model, tmp_path, str(parts.folder), "", "a card")
    full = PeftModel.from_pretrained(family.auto.from_pretrained(parts.folder), tmp_path).eval()
    with torch.no_grad():
        expected = logits(full, family, MASKS["right"])
        assert torch.equal(logits(model, family, MASKS["right"]), expected)
        assert not torch.allclose(expected, logits(parts.full, family, MASKS["right"]), atol=1e-3)
    cut = boundaries_of(model.get_base_model())
    adapted = {name for name, _ in full.named_parameters() if "lora_A" in name}
    held = {name for name in adapted if any(f".{cut.layers_name}.{i}." in name for i in (*cut.bottom, *cut.top))}
    assert adapted == held  # none on the layers of the trunk, nor outside the layers
    assert {adapters.part_of(model, name) for name in adapted} == {"bottom", "top"}


@every_family
def test_parties_hold_each_weight_once(whole: Callable[[Family], Whole], family: Family) -> None:
    """Tied weights are one. What a family's layers share with each other, such as a bias of positions, both hold."""
    parts = whole(family)
    client = parts.client(family, surrogate="identity")
    prefix = f"{client.base_model_prefix}."
    full, ends = dict(parts.full.named_parameters()), dict(client.named_parameters())
    middle = {prefix + name: p for name, p in parts.trunk.named_parameters()}
    both = {prefix + name for name in family.in_both}
    assert ends.keys() | middle.keys() == full.keys()
    assert ends.keys() & middle.keys() == both
    sizes = [sum(p.numel() for p in group.values()) for group in (ends, middle, full)]
    assert sizes[0] + sizes[1] - sum(full[name].numel() for name in both) == sizes[2]


def test_docs_show_the_table_of_families() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert table() in docs, "put the output of tests/families.py's table() into docs/models.md"
