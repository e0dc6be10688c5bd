"""Private examples -> batches of tokens. Nothing in here leaves the node, and no error quotes a row.

Data path: rows (`rows.py`) -> examples (`examples.py`) -> **held-out and training part -> batches** -> bottom.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.examples import IGNORED, MALFORMED, UNKNOWN_LABEL, Example, Unusable, example_maker
from fl_split.data.readers import find_rows
from fl_split.data.store import Prepared, Store, in_memory
from fl_split.errors import DataError

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "Examples",
    "Report",
    "heldout_batches",
    "load_examples",
    "prepare_tokenizer",
    "training_batches",
]

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]  # "input_ids", "attention_mask": [batch, seq]; "labels": [batch, seq], or [batch]

_PLACES = 5  # bad rows that are named, of each kind
_SORTED = 50  # batches that are sorted by length together


@dataclass
class Report:
    """What became of a node's rows: numbers and places, never content."""

    num_rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # reason -> rows that were left out
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first of them
    num_truncated: int = 0  # examples that data.max-length cut
    num_cut: int = 0  # tokens that it cut off

    @property
    def num_bad(self) -> int:
        """Rows that were left out."""
        return sum(self.bad.values())

    def explain(self, reasons: Iterable[str]) -> str:
        """Such as ``2 malformed (a.jsonl line 7, a.jsonl line 9)``."""
        parts = []
        for reason in reasons:
            more = ", ..." if self.bad[reason] > _PLACES else ""
            parts.append(f"{self.bad[reason]} {reason} ({', '.join(self.places[reason])}{more})")
        return "; ".join(parts)


@dataclass(frozen=True)
class Examples:
    """One node's examples: a part to train on, and a part that is never trained on."""

    train: Prepared
    heldout: Prepared
    report: Report


def load_examples(
    config: Data,
    node: NodeConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    store: Path | None = None,
    max_rows: int | None = None,
) -> Examples:
    """Read, tokenize and divide one node's examples; with `data.labels` they are texts of a class each.

    Args:
        config: Where they are, and what to make of them.
        node: Its own path, or its number.
        tokenizer: Of the base model.
        seed: Of the held-out part, and of a node's share of what all read.
        store: Folder for the prepared examples, found there by later calls; without it, they are held in memory.
        max_rows: Look at the first of them only.

    Raises:
        DataError: Missing files or columns, labels that are not of the run, bad rows that are not to be skipped, or
            too few usable rows; names the key, file and line, never a row's content.
    """
    source = find_rows(config, node, seed)
    make = example_maker(config, tokenizer)
    report = Report()
    kept = Store(store, (source.identity, max_rows, _fields(config), _digest(tokenizer))) if store else None
    found = kept.load() if kept else None
    if found:
        examples, report = found[0], Report(**found[1])
    else:
        made = _make_all(islice(source.rows, max_rows), make, report)
        examples = kept.save(made) if kept else in_memory(made)
        _check(report, len(examples), config)
        if kept:
            kept.finish(asdict(report))
    _log(report, config)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).numpy()
    num_heldout = min(max(1, round(config.holdout * len(examples))), len(examples) - 1)
    return Examples(examples.take(order[num_heldout:]), examples.take(order[:num_heldout]), report)


def _fields(config: Data) -> dict[str, Any]:
    """What of the configuration decides on the examples themselves."""
    return config.model_dump(exclude={"holdout", "packing", "group_by_length"})


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(f"{whole}{tokenizer.chat_template}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _make_all(rows: Iterable[Any], make: Callable[[dict[str, Any]], Any], report: Report) -> Iterator[Example]:
    """Examples of the rows that can be used; fills `report` on the way."""
    bad: Counter[str] = Counter()
    for row in rows:
        report.num_rows += 1
        try:
            if row.values is None:
                raise Unusable(MALFORMED)
            made = make(row.values)
        except Unusable as error:
            bad[error.reason] += 1
            places = report.places.setdefault(error.reason, [])
            if len(places) < _PLACES:
                places.append(row.place)
            continue
        report.num_truncated += made.num_cut > 0
        report.num_cut += made.num_cut
        yield made.example
    report.bad = dict(bad)


def _check(report: Report, num_usable: int, config: Data) -> None:
    if UNKNOWN_LABEL in report.bad:
        raise DataError(
            f"of {report.num_rows} rows, {report.explain([UNKNOWN_LABEL])}: correct these rows in the column "
            f"data.label={config.label!r}, or let the run's data.labels name every label"
        )
    if config.bad_rows == "refuse" and report.bad:
        raise DataError(
            f"of {report.num_rows} rows, {report.explain(report.bad)}: correct these rows, or set data.bad-rows='skip' "
            "to leave them out"
        )
    if num_usable < 2:
        seen = f"; found {report.explain(report.bad)}" if report.bad else ""
        raise DataError(
            f"{num_usable} usable examples of {report.num_rows} rows: at least 2 are needed, one to train on and one "
            f"to hold out{seen}; look for empty columns, or raise data.max-length"
        )


def _log(report: Report, config: Data) -> None:
    if report.bad:
        logger.warning("skipped %d of %d rows: %s", report.num_bad, report.num_rows, report.explain(report.bad))
    if report.num_truncated:
        logger.warning(
            "cut %d of %d examples to data.max-length=%d: %d tokens are lost",
            report.num_truncated,
            report.num_rows - report.num_bad,
            config.max_length,
            report.num_cut,
        )


# ------------------------------------------------------------------------------------------------------- batches


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
        return _pack
    per_token = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
    per_sequence = DataCollatorWithPadding(tokenizer)
    return lambda examples: (per_sequence if isinstance(examples[0]["labels"], int) else per_token)(examples)


def _pack(examples: list[Example]) -> Batch:
    """Lay examples end to end in one row, without padding; each position counts from 0, which keeps them apart."""
    ids = [token for example in examples for token in example["input_ids"]]
    positions = [i for example in examples for i in range(len(example["input_ids"]))]
    # The first token of an example would be predicted from the last of another.
    labels = [label for example in examples for label in (IGNORED, *example["labels"][1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Pad on the right, with the end token where a tokenizer has no pad token (both are masked)."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
