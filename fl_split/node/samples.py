"""Held-out prompts, answered after a round: texts for whoever owns them, and two numbers.

Data path: held-out examples -> **prompt | reference** -> `generate` across the split -> **texts on the node's own disk;
exact match and ROUGE-L, means over them** -> metrics.

What leaves the node: hidden states of prompts and answers, to the trunk; the two means, to the server. No text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from fl_split.data.batches import pad_left
from fl_split.data.examples import Example
from fl_split.errors import ConfigError, SplitError
from fl_split.files import read_entries, write_atomic
from fl_split.model.loss import IGNORED
from fl_split.model.slots import in_its_place
from fl_split.node.trunk_connection import TrunkConnection

_LONGER = 16  # tokens that an answer may have beyond the longest reference of its batch


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what should be answered, and what is."""

    prompt: str
    reference: str
    answer: str
    exact_match: float  # 1 or 0, blanks at the ends aside
    rouge_l: float  # F1 of the longest common subsequence of words


def check_scorer() -> Any:
    """Find what computes ROUGE-L, before a round rather than after it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "data.samples needs a package that is not installed (rouge-score): pip install 'fl-split[samples]', or set "
            "data.samples=0"
        ) from None
    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """Of any alphabet: the package's own knows a to z only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def answer_heldout(
    model: Any,
    connection: TrunkConnection,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
) -> list[Sample]:
    """Answer the prompts of examples greedily; leaves the model as it is.

    Args:
        model: The node's, with its adapter.
        connection: To the trunk, past any cache of whole sequences.
        tokenizer: Its own.
        examples: Of a conversation the last answer is asked for, of a plain text its second half.
        batch_size: Prompts at the same time.

    Raises:
        TrunkError: As in training.
        ConfigError: See `check_scorer`.
    """
    scorer, remaining, samples = check_scorer(), iter([_parted(example) for example in examples]), list[Sample]()
    model.eval()
    with in_its_place(model, connection):
        while pairs := list(islice(remaining, batch_size)):
            answers = _generate(model, tokenizer, pairs, connection.offers_streams)
            for (prompt_ids, reference_ids), answer_ids in zip(pairs, answers, strict=True):
                prompt, reference, answer = (_text(tokenizer, ids) for ids in (prompt_ids, reference_ids, answer_ids))
                score = float(scorer.score(reference, answer)["rougeL"].fmeasure)
                samples.append(Sample(prompt, reference, answer, float(reference.strip() == answer.strip()), score))
    return samples


def means(samples: Sequence[Sample]) -> dict[str, float]:
    """The numbers that leave the node; none without samples."""
    if not samples:
        return {}
    return {
        "sample-exact-match": sum(sample.exact_match for sample in samples) / len(samples),
        "sample-rouge-l": sum(sample.rouge_l for sample in samples) / len(samples),
    }


def keep(file: Path, server_round: int, samples: Sequence[Sample]) -> None:
    """Add a round's samples to the node's file; those of a round that is done again are dropped."""
    earlier = [entry for entry in read_entries(file) if entry["round"] < server_round]
    entries = [*earlier, *({"round": server_round, **asdict(sample)} for sample in samples)]
    write_atomic(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _parted(example: Example) -> tuple[list[int], list[int]]:
    """Cut an example in two: its tokens up to its last answer, and that answer."""
    ids, labels = example["input_ids"], example["labels"]
    end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
    start = max((i for i in range(end) if labels[i] == IGNORED), default=-1) + 1
    if start <= 1:  # plain text, from its first token or the one after it on
        start = (end + 1) // 2
    return ids[:start], ids[start:end]


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]], cached: bool
) -> list[list[int]]:
    pad = cast(int, tokenizer.pad_token_id)
    prompts = pad_left([prompt for prompt, _ in pairs], pad, model.device)
    longest = prompts["input_ids"].shape[1]

    def generate(cached: bool) -> list[list[int]]:
        most = max(len(reference) for _, reference in pairs) + _LONGER
        room = getattr(model.config, "max_position_embeddings", None) or longest + most
        out = model.generate(
            **prompts,
            max_new_tokens=max(1, min(most, room - longest)),
            do_sample=False,
            num_beams=1,
            use_cache=cached,
            pad_token_id=pad,
        )
        answers: list[list[int]] = out[:, longest:].tolist()
        return answers

    try:
        return generate(cached)
    except SplitError:  # a family whose ends keep more than keys and values
        return generate(False)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
