"""Examples -> batches of tokens.

Data path: examples -> **order, padding or packing -> batches** -> bottom.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from fl_split.config import Data
from fl_split.data.examples import Example
from fl_split.data.store import Prepared
from fl_split.errors import ConfigError
from fl_split.model.loss import IGNORED, Batch

_SORTED = 50  # batches that are sorted by length together


def training_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    first_example: int,
    config: Data | None = None,
) -> Iterator[Batch]:
    """Batches without end, each epoch in an order of its own, beginning with the `first_example`-th example drawn.

    The order depends on nothing but the arguments, so that a resumed round sees what it would have seen.

    Args:
        examples: What to train on.
        tokenizer: Pads.
        batch_size: Examples of a batch.
        seed: Of the order.
        first_example: A multiple of `batch_size`.
        config: `data.group-by-length` and `data.packing`; by default neither.
    """
    grouped = config is not None and config.group_by_length

    def draw() -> Iterator[Example]:
        epoch, start = divmod(first_example, len(examples))
        while True:
            generator = torch.Generator().manual_seed(hash((seed, epoch)))
            order = torch.randperm(len(examples), generator=generator)
            if grouped:  # a batch that has begun with the epoch before is filled up first
                begun = min(-epoch * len(examples) % batch_size, len(examples))
                order = torch.cat([order[:begun], _grouped(order[begun:], examples, batch_size, generator)])
            yield from (examples[i] for i in order[start:].tolist())
            epoch, start = epoch + 1, 0

    drawn = draw()
    collate = _collator(tokenizer, config is not None and config.packing)
    while True:
        yield collate([next(drawn) for _ in range(batch_size)])


def _grouped(
    order: torch.Tensor, examples: Sequence[Example], batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Put examples of similar length into the same batch: sort within a stretch of batches, then mix the batches."""
    lengths = torch.from_numpy(_lengths(examples))
    stretches = order.split(_SORTED * batch_size)
    batches = torch.cat([stretch[lengths[stretch].argsort(stable=True)] for stretch in stretches]).split(batch_size)
    full = [batch for batch in batches if len(batch) == batch_size]
    mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return torch.cat([*mixed, *batches[len(full) :]])


def heldout_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    config: Data | None = None,
) -> Iterable[Batch]:
    """All examples once, those of similar length together."""
    by_length = torch.from_numpy(_lengths(examples)).argsort(stable=True).tolist()
    collate = _collator(tokenizer, config is not None and config.packing)
    for i in range(0, len(by_length), batch_size):
        yield collate([examples[j] for j in by_length[i : i + batch_size]])


def _lengths(examples: Sequence[Example]) -> Any:
    if isinstance(examples, Prepared):
        return examples.lengths
    return torch.tensor([len(example["input_ids"]) for example in examples]).numpy()


def _collator(tokenizer: PreTrainedTokenizerBase, packing: bool) -> Callable[[list[Example]], Batch]:
    if packing:
        return DataCollatorWithFlattening()  # positions count from 0 in each, and no first token is a target
    per_token = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
    per_sequence = DataCollatorWithPadding(tokenizer)
    return lambda examples: (per_sequence if isinstance(examples[0]["labels"], int) else per_token)(examples)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Batch:
    """Prompts as `generate` takes several: ids and mask, [batch, seq], so that all go on at the same place."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Pad on the right, with the end token where a tokenizer has no pad token (both are masked).

    Raises:
        ConfigError: It has neither.
    """
    tokenizer.padding_side = "right"
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # said: it is cut
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            "this model's tokenizer has neither a pad token nor an end token, so that answers would have no end: name "
            'the end token that the model was trained with in its tokenizer_config.json, as "eos_token"'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
