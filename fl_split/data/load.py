"""Private examples, prepared once, and divided into a part to train on and a part that is held out.

Data path: rows (`readers`) -> examples (`examples`) -> **two parts of them** -> batches (`batches`). Nothing in here
leaves the node, and no error quotes a row.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.examples import MALFORMED, UNKNOWN_LABEL, Example, Unusable, example_maker
from fl_split.data.readers import find_rows
from fl_split.data.store import Prepared, Store, in_memory
from fl_split.errors import DataError

logger = logging.getLogger(__name__)


_PLACES = 5  # bad rows that are named, of each kind


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
    """Pick what of the configuration decides on the examples themselves."""
    return config.model_dump(exclude={"holdout", "packing", "group_by_length"})


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(f"{whole}{tokenizer.chat_template}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _make_all(rows: Iterable[Any], make: Callable[[dict[str, Any]], Any], report: Report) -> Iterator[Example]:
    """Make examples of the rows that can be used; fills `report` on the way."""
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
