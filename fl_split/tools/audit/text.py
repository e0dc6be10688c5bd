"""Texts of an audit: public ones to attack with, a sample of the node's own, and planted ones with known fields."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.load import load_examples
from fl_split.tools.fit.text import read_text

_PUBLIC = 256  # sequences
_SYLLABLES = ("ba", "do", "fe", "ga", "hu", "ki", "lo", "mi", "nu", "pe", "ro", "sa", "te", "vi", "wo", "zu")


@dataclass(frozen=True)
class Planted:
    """An invented record, and what of it an audit looks for."""

    text: str
    fields: tuple[str, ...]


def public_ids(files: Sequence[Path], folder: Path, length: int, seed: int) -> Tensor:
    """Public text as token ids ``[sequences, length]``: the files given, or what Python says of its own language.

    Raises:
        DataError: Files that are no text, or too short.
    """
    if files:
        ids = read_text(files, folder, length)
    else:
        encode = AutoTokenizer.from_pretrained(folder).encode
        lines = chain.from_iterable(text.splitlines(keepends=True) for text in topics.values())
        tokens = [token for line in lines for token in encode(line, add_special_tokens=False)]
        ids = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:_PUBLIC]]


def own_ids(
    config: Data, node: NodeConfig, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> list[list[int]]:
    """The beginnings of some of the node's examples, as they go through the bottom.

    Raises:
        DataError: The data cannot be used.
    """
    found = load_examples(config, node, tokenizer, seed, max_rows=64 * count).train
    order = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [ids for i in order if len(ids := list(found[i]["input_ids"][:length])) > 1]


def plant(count: int, seed: int) -> list[Planted]:
    """Invented patients: no person's data, and nothing that a model may have seen."""
    draw, planted = random.Random(seed), []
    for _ in range(count):
        first, last = ("".join(draw.choices(_SYLLABLES, k=n)).capitalize() for n in (2, 3))
        born = f"{draw.randint(1, 28):02}.{draw.randint(1, 12):02}.{draw.randint(1930, 2010)}"
        record = f"{draw.randint(10, 99)}-{draw.randint(1000, 9999)}-{draw.randint(10, 99)}"
        mail = f"{first.lower()}.{last.lower()}@example.org"
        text = f"Patient {first} {last}, born {born}, record number {record}, e-mail {mail}, was seen on Monday."
        planted.append(Planted(text, (f"{first} {last}", born, record, mail)))
    return planted
