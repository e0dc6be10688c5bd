"""Whether a language model's positions see only what comes before them: else it learns to copy."""

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fl_split.errors import SplitError
from fl_split.model.slots import offline

_LENGTH = 8  # random tokens
_ROUNDING = 1e-3  # of the difference at the position that was changed


def check_causal_config(config: PretrainedConfig) -> None:
    """Look at the configuration of a causal language model, without its weights.

    Raises:
        SplitError: It is an encoder, such as BERT.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    says = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    masked = any("MaskedLM" in name for name in config.architectures or ())
    if says == {False} or (not says and masked and not getattr(config, "is_decoder", False)):
        raise _refusal(config)


def check_causal(ends: PreTrainedModel) -> None:
    """Change the last of some random tokens: nothing may change before it; nothing leaves the node.

    Raises:
        SplitError: Earlier positions see later tokens.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ends.config.vocab_size, (1, _LENGTH), generator=generator).to(ends.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % ends.config.vocab_size

    def logits(tokens: Tensor) -> Tensor:
        return offline(ends, lambda: cast(Tensor, ends(input_ids=tokens).logits)[0].float())

    change = (logits(other) - logits(ids)).norm(dim=-1)
    if change[:-1].max() > _ROUNDING * change[-1]:
        raise _refusal(ends.config)


def _refusal(config: PretrainedConfig) -> SplitError:
    return SplitError(
        f"{config.model_type} is an encoder: each position sees the tokens after it, so that as a causal-lm it would "
        "learn to copy what it should predict; take a decoder, or set task='sequence-classification'"
    )
