"""Whether a model can take what its tokenizer and the configuration make of the data: asked before the first step."""

from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from fl_split.config import Data
from fl_split.data.load import Examples
from fl_split.errors import DataError
from fl_split.model.family import skeleton


def check_fits(
    model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples, config: Data
) -> list[str]:
    """Compare tokens with embeddings, and lengths with positions.

    Returns:
        What a person should know, though it works.

    Raises:
        DataError: A token has no embedding, or a position could have none.
    """
    of_tokens = _check_tokens(model.vocab_size, tokenizer, examples)
    return [*of_tokens, *_check_positions(model, tokenizer, examples, config)]


def _check_tokens(num_embeddings: int, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> list[str]:
    text = f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {num_embeddings}"
    if max(examples.train.largest_id(), tokenizer.pad_token_id) >= num_embeddings:
        raise DataError(
            f"{text}, and the examples use others (or padding does): take the tokenizer that belongs to the model, or "
            "save the model again after model.resize_token_embeddings(len(tokenizer))"
        )
    return [f"{text}; the examples use no others"] if len(tokenizer) > num_embeddings else []


def _check_positions(
    model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples, config: Data
) -> list[str]:
    positions = getattr(model, "max_position_embeddings", None)
    if positions is None:
        return []
    if (learned := learned_positions(model)) is None:  # goes on beyond, but was not trained to
        longest = max(examples.train.lengths.max(), examples.heldout.lengths.max())
        beyond = f"the longest example has {longest} tokens, more than the {positions} positions of this model"
        return [f"{beyond}: set data.max-length to that"] if longest > positions else []
    positions = min(learned, tokenizer.model_max_length)
    if config.max_length > positions:
        raise DataError(
            f"data.max-length={config.max_length} is beyond the {positions} positions that this model has: set "
            f"data.max-length to {positions} or less"
        )
    return []


def learned_positions(model: PretrainedConfig) -> int | None:
    """Say for how many tokens a model has a position's embedding; None where positions are computed, and go on."""
    count: int | None = getattr(model, "max_position_embeddings", None)
    if count is None or getattr(model, "rope_parameters", None):
        return None
    whole = skeleton(model, AutoModel)
    tables = {m for m in whole.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == count}
    tables -= {whole.get_input_embeddings()}  # of tokens, which may be as many
    padded = [table.padding_idx for table in tables if table.padding_idx is not None]  # as of RoBERTa, from there on
    return count - padded[0] - 1 if padded else count
