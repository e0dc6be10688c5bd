"""An encoder is no language model: its positions see the tokens that they should predict."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BigBirdConfig,
    BloomConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from fl_split.errors import SplitError
from fl_split.model.causal import check_causal, check_causal_config
from fl_split.model.ends import load_ends
from fl_split.model.loading import check_quantized
from fl_split.model.trunk import LocalTrunk, load_trunk

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def ends(folder: Path) -> Any:
    return load_ends(folder, 1, 1, LocalTrunk(load_trunk(folder, 1, 1)), surrogate="identity")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2"])
def test_decoders_pass(checkpoint: Callable[[str], Path], family: str) -> None:
    check_causal(ends(checkpoint(family)))


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, ElectraConfig])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_encoders_are_refused_unless_they_are_decoders(tmp_path: Path, config: Any, is_decoder: bool) -> None:
    torch.manual_seed(0)
    about = config(**SMALL, is_decoder=is_decoder)
    AutoModelForCausalLM.from_config(about).save_pretrained(tmp_path)
    if is_decoder:
        check_causal(ends(tmp_path))
        check_causal_config(about)
        return
    with pytest.raises(SplitError, match="is an encoder: each position sees the tokens after it"):
        check_causal(ends(tmp_path))
    with pytest.raises(SplitError, match="take a decoder, or set task='sequence-classification'"):
        check_causal_config(about)


@pytest.mark.parametrize(
    ("config", "fails"),
    [
        (LlamaConfig(**SMALL), False),
        (GPT2Config(n_layer=1, n_embd=8, n_head=2), False),
        (BloomConfig(n_layer=1, hidden_size=8, n_head=2), False),  # says nothing of it
        (BigBirdConfig(**SMALL, architectures=["BigBirdForMaskedLM"]), True),
    ],
)
def test_a_configuration_tells_before_there_are_weights(config: PretrainedConfig, fails: bool) -> None:
    if not fails:
        check_causal_config(config)
        return
    with pytest.raises(SplitError, match="is an encoder"):
        check_causal_config(config)


def test_a_quantized_checkpoint_without_its_package_is_refused_with_the_remedy() -> None:
    check_quantized(LlamaConfig(**SMALL))
    for how in ({"quant_method": "vptq"}, {"quant_method": "unheard-of"}):
        with pytest.raises(SplitError, match="checkpoint is quantized, and cannot be read here .* install what is"):
            check_quantized(LlamaConfig(**SMALL, quantization_config=how))
