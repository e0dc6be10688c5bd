"""How much of the truth is in what was read: counts, never the text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fl_split.tools.audit.attack import Outcome
from fl_split.tools.audit.text import Planted

Kinds = dict[str, Tensor]  # name -> which tokens of the vocabulary are of a kind


def kinds_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int, public: Tensor) -> Kinds:
    """Tokens with a digit, those that begin with a capital, and those that are not in the attacker's public text."""
    texts = [str(tokenizer.decode([i])).strip() for i in range(min(vocab_size, len(tokenizer)))]
    texts += [""] * (vocab_size - len(texts))
    rare = torch.ones(vocab_size, dtype=torch.bool)
    rare[public.flatten()] = False
    tests: dict[str, Callable[[str], bool]] = {
        "digits": lambda text: any(c.isdigit() for c in text),
        "capitalised": lambda text: text[:1].isupper(),
    }
    return {name: torch.tensor([test(text) for text in texts]) for name, test in tests.items()} | {"rare": rare}


def share_right(read: Sequence[Tensor], truth: Sequence[Tensor], only: Tensor | None = None) -> float:
    """The part of tokens that were read right; of those of a kind; nan if there is none."""
    right, true = torch.cat([a == b for a, b in zip(read, truth, strict=True)]), torch.cat(list(truth))
    return float((right if only is None else right[only[true]]).float().mean())


def count(outcome: Outcome, truth: Sequence[Tensor], kinds: Kinds) -> dict[str, float]:
    """Figures of one outcome; of the two ways to read, kinds are counted for the better one."""
    one_shot, sequence = share_right(outcome.one_shot, truth), share_right(outcome.ids, truth)
    best = outcome.ids if sequence >= one_shot else outcome.one_shot
    within = [
        (reading.ids[:, :10] == true[:, None]).any(1) for reading, true in zip(outcome.readings, truth, strict=True)
    ]
    return {
        "readable": max(one_shot, sequence),
        "one-shot-top-1": one_shot,
        "one-shot-top-10": float(torch.cat(within).float().mean()),
        "sequence-top-1": sequence,
        "exact-sequences": sum(torch.equal(a, b) for a, b in zip(best, truth, strict=True)) / len(truth),
        **{name: share_right(best, truth, only) for name, only in kinds.items()},
    }


def share_found(read: Sequence[Tensor], planted: Sequence[Planted], tokenizer: PreTrainedTokenizerBase) -> float:
    """The part of planted fields that stand, whole, in what was read of their records; nan if none was planted."""
    found = [
        field in str(tokenizer.decode(ids))
        for ids, record in zip(read, planted, strict=True)
        for field in record.fields
    ]
    return sum(found) / len(found) if found else float("nan")
