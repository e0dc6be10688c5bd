"""Split equals whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

from fl_split import malloc
from fl_split.config import Lora
from fl_split.errors import ConfigError, SplitError
from fl_split.model import ends
from fl_split.model.adapters import attach
from fl_split.model.ends import checkpoint_activations, load_ends
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries, boundaries_of
from fl_split.model.loss import accumulate
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.train import make_distiller

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7]),
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2]),
}


def batch(mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are real, ``[3, 9]``."""
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones(3, 9, dtype=torch.bool) if mask is None else mask.bool()


def split(folder: Path, bottom: int = 1, top: int = 2, **kwargs: object) -> PreTrainedModel:
    return load_ends(folder, bottom, top, LocalTrunk(load_trunk(folder, bottom, top)), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_full_models_bit_for_bit(checkpoint: Callable[[str], Path], family: str, padding: str) -> None:
    full = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    ids, real = batch(MASKS[padding])
    for bottom, top in ((1, 2), (3, 1), (1, 4)):  # the last: a trunk of one layer
        client = split(checkpoint(family), bottom, top, surrogate_layers=1)
        with torch.no_grad():
            expected = full(ids, attention_mask=MASKS[padding]).logits
            got = client(ids, attention_mask=MASKS[padding]).logits
        assert torch.equal(got[real], expected[real])


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kind", ["none", "identity", "blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_gradients_equal_the_full_models(
    checkpoint: Callable[[str], Path], family: str, kind: str, padding: str
) -> None:
    full = AutoModelForCausalLM.from_pretrained(checkpoint(family)).requires_grad_(False)
    client = split(checkpoint(family), surrogate=kind)
    ids, real = batch(MASKS[padding])
    cut = boundaries_of(client)
    grads = []
    for model in (full, client):
        model.eval()
        layers = model.base_model.get_submodule(cut.layers_path)
        for i in (*cut.bottom, *cut.top):
            layers[i].requires_grad_(True)
        logits = model(ids, attention_mask=MASKS[padding], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[real], ids[real]).backward()
        grads.append([p.grad for i in cut.top for p in layers[i].parameters()])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_parties_hold_each_weight_once(checkpoint: Callable[[str], Path], family: str) -> None:
    full = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    trunk = load_trunk(checkpoint(family), 1, 2)
    client = split(checkpoint(family), surrogate="identity")

    def count(model: PreTrainedModel) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(client) + count(trunk) == count(full)


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_of_a_family(checkpoint: Callable[[str], Path], family: str) -> None:
    client = split(checkpoint(family))
    cut = boundaries_of(client)
    assert (list(cut.bottom), list(cut.trunk), list(cut.top)) == ([0], [1, 2, 3], [4, 5])


def test_boundaries_without_a_trunk_are_refused_with_the_arithmetic() -> None:
    anatomy = examine(AutoConfig.for_model("llama", num_hidden_layers=9, hidden_size=32, num_attention_heads=4))
    with pytest.raises(SplitError, match=r"bottom-layers=7 and split.top-layers=2 .* 9 layers, .* at most 8"):
        Boundaries.of(anatomy, 7, 2)
    with pytest.raises(SplitError, match="split.bottom-layers=0"):
        Boundaries.of(anatomy, 0, 2)


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(d_model=32, num_layers=2), "t5 has an encoder and a decoder"),
        (AutoConfig.for_model("clip"), "clip"),
        (AlbertConfig(hidden_size=32, num_attention_heads=4, vocab_size=99), "albert .* no list of 12 separate layers"),
        (AutoConfig.for_model("xlm", n_layers=2, emb_dim=32, n_words=99), "xlm .* does not work with layers left out"),
        (
            AutoConfig.for_model("longformer", num_hidden_layers=2, attention_window=4, **SMALL),
            "longformer .* left out",
        ),
        (AutoConfig.for_model("falcon_h1", num_hidden_layers=2, **MAMBA, **SMALL), "falcon_h1 .* left out"),
        (AutoConfig.for_model("bart"), "bart has an encoder and a decoder"),
        (AutoConfig.for_model("whisper"), "whisper has an encoder and a decoder"),
        (AutoConfig.for_model("gemma3"), "gemma3 is a multimodal model"),
        (AutoConfig.for_model("llama4"), "llama4 is a multimodal model"),
        (Gemma3nTextConfig(), "gemma3n_text shares keys and values"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_cannot_be_split_are_refused_by_name(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(SplitError, match=reason):
        examine(config, AutoModel)


def test_a_model_that_cannot_be_built_for_the_task_is_refused_by_name() -> None:
    with pytest.raises(SplitError, match="distilbert cannot be built as AutoModelForCausalLM"):
        examine(AutoConfig.for_model("distilbert"), AutoModelForCausalLM)


def test_a_trunk_whose_edges_are_not_neutral_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a family would be whose code scales hidden states outside of any module."""
    forward = LlamaModel.forward

    def scaled(self: LlamaModel, *args: object, inputs_embeds: Tensor | None = None, **kwargs: object) -> object:
        return forward(self, *args, inputs_embeds=None if inputs_embeds is None else inputs_embeds * 2, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    with pytest.raises(SplitError, match="llama cannot be split: something outside its layers changes"):
        load_trunk(checkpoint("llama"), 1, 2)


def test_checkpoint_without_the_needed_weights_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    weights = load_file(checkpoint("llama") / "model.safetensors")
    lost = "model.layers.3.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SplitError, match=lost.removeprefix("model.")):
        load_trunk(tmp_path, 1, 2)
    split_elsewhere = load_ends(tmp_path, 1, 2, LocalTrunk(load_trunk(checkpoint("llama"), 1, 2)), surrogate="none")
    assert split_elsewhere.num_parameters() > 0  # a client does not miss what the trunk holds


def test_folder_without_weights_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    with pytest.raises(SplitError, match="safetensors"):
        load_trunk(tmp_path, 1, 2)


def test_masks_that_cannot_be_sent_are_refused(checkpoint: Callable[[str], Path]) -> None:
    client = split(checkpoint("llama"))
    ids, _ = batch(None)
    with pytest.raises(SplitError, match=r"\[batch, seq\]"):
        client(ids, attention_mask=torch.zeros(3, 1, 9, 9))


def test_generation_without_a_cache_equals_the_full_model(checkpoint: Callable[[str], Path]) -> None:
    full = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    client = split(checkpoint("llama"))
    ids = batch(None)[0][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    assert torch.equal(client.generate(ids, **options), full.generate(ids, **options))


def test_surrogate_with_more_layers_than_the_trunk_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="surrogate.layers=4 .* trunk of 3 layers"):
        split(checkpoint("llama"), surrogate="blocks", surrogate_layers=4)


class CountingTrunk(LocalTrunk):
    """A trunk in this process that counts its calls."""

    calls = 0

    def start(self, *args: object) -> object:  # type: ignore[override]
        self.calls += 1
        return super().start(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["none", "identity", "blocks", "distilled", "streamed", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_gives_equal_gradients_and_calls_the_trunk_once(
    checkpoint: Callable[[str], Path], family: str, kind: str
) -> None:
    found = []
    for again in (False, True):
        trunk = CountingTrunk(load_trunk(checkpoint(family), 1, 2))
        client = load_ends(checkpoint(family), 1, 2, trunk, surrogate=kind)  # type: ignore[arg-type]
        if again:
            checkpoint_activations(client)
        model = attach(client, Lora(), train_bottom=kind != "none", seed=0)
        distiller = make_distiller(model, 1e-3) if kind == "distilled" else None
        ran: list[int] = []
        for i in boundaries_of(client).top:
            mlp = client.base_model.get_submodule(f"{boundaries_of(client).layers_path}.{i}.mlp")
            mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        ids, _ = batch(None)
        model.train()
        accumulate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 2)
        assert trunk.calls == 2
        assert len(ran) == (8 if again else 4)  # top layers times micro-batches: computed again, or not
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*grads, *(distiller._gradients if distiller else [])])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_activation_checkpointing_is_refused_where_layers_do_not_support_it(checkpoint: Callable[[str], Path]) -> None:
    client = split(checkpoint("llama"))
    client.model.layers[0] = torch.nn.Identity()
    with pytest.raises(SplitError, match=r"llama's layers .*train\.activation-checkpointing=false"):
        checkpoint_activations(client)


def test_what_the_layers_freed_is_given_back_before_the_logits_of_a_large_batch(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(ends, "give_back_freed", lambda: given_back.append(True))
    folder = checkpoint("llama")
    client = load_ends(folder, 2, 2, LocalTrunk(load_trunk(folder, 2, 2)))
    model = attach(client, Lora(), train_bottom=True, seed=0).train()
    ids = torch.randint(99, (2, 8))
    model(input_ids=ids)
    assert not given_back
    monkeypatch.setattr(ends, "_LARGE_BYTES", 2 * 8 * 4 * client.config.hidden_size)
    model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(given_back) == 1
    malloc.give_back_freed()
