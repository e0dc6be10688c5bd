"""Whether a language model's positions see only what comes before them; one that sees what follows learns to copy it."""

from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fl_split.errors import SplitError
from fl_split.model.packing import offline

_LENGTH = 8  # random tokens
_ROUNDING = 1e-3  # of the difference at the position that was changed


def check_causal_config(config: PretrainedConfig, model: torch.nn.Module) -> None:
    """Look at a checkpoint's configuration, before there are weights.

    Args:
        config: The checkpoint's.
        model: Built from it as a causal language model, on any device.

    Raises:
        SplitError: It is an encoder, such as BERT.
    """
    says = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    masked = any("MaskedLM" in name for name in config.architectures or ())
    if says == {False} or (not says and masked and not getattr(config, "is_decoder", False)):
        raise _refusal(config)


def check_causal(client: PreTrainedModel) -> None:
    """Change the last of some random tokens: nothing may change before it; nothing leaves the node.

    Raises:
        SplitError: Earlier positions see later tokens.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(client.config.vocab_size, (1, _LENGTH), generator=generator).to(client.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % client.config.vocab_size

    def logits(tokens: Tensor) -> Tensor:
        return offline(client, lambda: cast(Tensor, client(input_ids=tokens).logits)[0].float())

    change = (logits(other) - logits(ids)).norm(dim=-1)
    if change[:-1].max() > _ROUNDING * change[-1]:
        raise _refusal(client.config)


def _refusal(config: PretrainedConfig) -> SplitError:
    return SplitError(
        f"{config.model_type} is an encoder: each position sees the tokens after it, so that as a causal-lm it would "
        "learn to copy what it should predict; take a decoder, or set task='sequence-classification'"
    )
