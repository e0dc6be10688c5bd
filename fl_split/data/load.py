"""Private examples, prepared once, and divided into a part to train on and a part that is held out.

Data path: rows (`readers`) -> examples (`examples`) -> **two parts of them** -> batches (`batches`). Nothing in here
leaves the node, and no error quotes a row.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.examples import NO_ROOM, UNKNOWN_LABEL, Example, Made, describe_template, example_maker, template_of
from fl_split.data.readers import needed_columns
from fl_split.data.redact import Redactor, columns_of, redactor
from fl_split.data.report import PLACES, Report
from fl_split.data.rows import MALFORMED, NOT_UTF8, Row
from fl_split.data.sources import find_rows
from fl_split.data.store import Array, Prepared, Store, in_memory
from fl_split.data.unusable import EMPTY, Unusable
from fl_split.errors import DataError, FLSplitError

logger = logging.getLogger(__name__)


GROWN = "the data has changed since it was last read: %d rows, %d before; each row that was there keeps its side"
COPIES = "%d of %d examples are copies of others; equal ones are on one side, trained on or held out"
_VERSION = 4  # of how examples are prepared and divided: raise it, and nothing prepared before is used again
_OTHER_ENCODING = 0.1  # of the rows not in UTF-8: that is no accident


@dataclass(frozen=True)
class Examples:
    """One node's examples: a part to train on, and a part that is never trained on."""

    train: Prepared
    heldout: Prepared  # of those held out, the ones that are evaluated
    report: Report
    num_heldout: int  # all that are held out

    @property
    def heldout_id(self) -> bytes:
        """Changes whenever other rows are evaluated: then numbers cannot be compared."""
        return hashlib.sha256(self.heldout.keys.tobytes()).digest()[:8]


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

    A row's side is decided by a hash of the seed and of what is read of the row: equal rows are on one side, and rows
    that are added move no other.

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
    make, redact = example_maker(config, tokenizer), redactor(config, node)
    about: tuple[object, ...] = (_VERSION, max_rows, _fields(config), seed, _digest(tokenizer))
    about += (redact.identity,) if redact else ()
    kept = Store(store, (source.identity, *about)) if store else None
    found = kept.load() if kept else None
    if found:
        examples, report = found[0], Report(**found[1])
    else:
        template = template_of(config, tokenizer)
        report = Report(source.path, describe_template(template, tokenizer) if template else "")
        earlier = kept.earlier() if kept else {}
        rows = _note_unread(islice(source.rows, max_rows), report, needed_columns(config).values())
        rows = _redacted(rows, redact, columns_of(config)) if redact else rows
        made = _make_all(rows, make, seed, report)
        examples = kept.save(made) if kept else in_memory(made)
        report.notes = list(source.notes)
        report.redacted = dict(redact.counts) if redact else {}
        _check(report, examples.keys, config)
        report.forced = _force(examples.keys, config.holdout, earlier.get("forced", {}))
        if earlier and earlier["num_rows"] != report.num_rows:
            logger.warning(GROWN, report.num_rows, earlier["num_rows"])
        if kept:
            kept.finish(asdict(report))
    parts = _divide(examples, report, config)
    _log(parts, config)
    return parts


def _redacted(rows: Iterable[Row], redact: Redactor, columns: frozenset[str]) -> Iterator[Row]:
    for row in rows:
        yield row if row.values is None else replace(row, values=redact.row(row.values, columns))


# --------------------------------------------------------------------------------------------------------- sides


def _divide(examples: Prepared, report: Report, config: Data) -> Examples:
    heldout = _is_heldout(examples.keys, config.holdout, report.forced)
    train, held = np.flatnonzero(~heldout), np.flatnonzero(heldout)
    evaluated = held[np.argsort(examples.keys[held], kind="stable")][: config.holdout_max]
    return Examples(examples.take(train), examples.take(evaluated), report, len(held))


def _key(seed: int, content: str) -> int:
    """Draw the 64 bits that decide a row's side."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{content}".encode()).digest()[:8], "big")


def _is_heldout(keys: Array, part: float, forced: dict[str, bool]) -> Array:
    heldout: Array = (keys >> np.uint64(11)) < part * 2.0**53
    for key, side in forced.items():
        heldout[keys == np.uint64(int(key))] = side
    return heldout


def _force(keys: Array, part: float, earlier: dict[str, bool]) -> dict[str, bool]:
    """Choose a side for rows where hashes leave one empty: a row once put there stays there."""
    forced = {key: side for key, side in earlier.items() if (keys == np.uint64(int(key))).any()}
    heldout = _is_heldout(keys, part, forced)
    if not heldout.any():
        forced[str(keys.min())] = True
    elif heldout.all():
        forced[str(keys.max())] = False
    return forced


# ------------------------------------------------------------------------------------------------------ examples


def _fields(config: Data) -> dict[str, Any]:
    """Pick what of the configuration decides on the examples themselves."""
    return config.model_dump(exclude={"holdout_max", "samples", "packing", "group_by_length"})


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(f"{whole}{tokenizer.chat_template}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _note_unread(rows: Iterable[Row], report: Report, read: Collection[str]) -> Iterator[Row]:
    """Pass rows on; the first one that has columns tells which are not read, such as a context that was forgotten."""
    for row in rows:
        if row.values and not report.unread:
            report.unread = [str(column) for column, value in row.values.items() if value and column not in read]
        yield row


def _make_all(
    rows: Iterable[Row], make: Callable[[dict[str, Any]], Made], seed: int, report: Report
) -> Iterator[Example]:
    """Make examples of the rows that can be used; fills `report` on the way."""
    bad, remarks, classes = Counter[str](), Counter[str](), set[int]()
    for row in rows:
        report.num_rows += 1
        try:
            made = _make(row, make)
        except Unusable as error:
            bad[error.reason] += 1
            places = report.places.setdefault(error.reason, [])
            if len(places) < PLACES:
                places.append(row.place)
            continue
        report.num_truncated += made.num_cut > 0
        report.num_cut += made.num_cut
        remarks.update(made.remarks)
        if isinstance(made.example["labels"], int):
            classes.add(made.example["labels"])
        yield {**made.example, "key": _key(seed, made.content), "cut": made.num_cut}
    report.bad, report.remarks, report.num_classes = dict(bad), dict(remarks), len(classes)


def _make(row: Row, make: Callable[[dict[str, Any]], Made]) -> Made:
    if row.values is None:
        raise Unusable(row.fault)
    try:
        return make(row.values)
    except (Unusable, FLSplitError, MemoryError):
        raise
    except Exception as error:  # templates and tokenizers raise anything: one row's fault is that row's alone
        raise Unusable(f"{MALFORMED} ({type(error).__name__})") from None


def _check(report: Report, keys: Array, config: Data) -> None:
    notes = "".join(f"; {note}" for note in report.notes)
    if report.bad.get(NOT_UTF8, 0) > max(1, _OTHER_ENCODING * report.num_rows):
        raise DataError(f"of {report.num_rows} rows, {report.explain([NOT_UTF8])}{notes}")
    if UNKNOWN_LABEL in report.bad:
        raise DataError(
            f"of {report.num_rows} rows, {report.explain([UNKNOWN_LABEL])}: correct these rows in the column "
            f"data.label={config.label!r}, or let the run's data.labels name every label; labels are compared as text, "
            "whole numbers with or without .0, and true and false also as 1 and 0"
        )
    if config.bad_rows == "refuse" and report.bad:
        raise DataError(
            f"of {report.num_rows} rows, {report.explain(report.bad)}: correct these rows, or set data.bad-rows='skip' "
            f"to leave them out{notes}"
        )
    if len(keys) < 2:
        seen = f"; found {report.explain(report.bad)}" if report.bad else ""
        raise DataError(
            f"{len(keys)} usable examples of {report.num_rows} rows of {report.path}: at least 2 are needed, one to "
            f"train on and one to hold out{seen}{notes}{_remedy(report)}"
        )
    report.num_copies = len(keys) - len(np.unique(keys))
    if report.num_copies == len(keys) - 1:
        raise DataError(
            f"all {len(keys)} usable examples are of equal rows: at least 2 different ones are needed, one to train on "
            "and one to hold out"
        )


def _remedy(report: Report) -> str:
    remedies = {EMPTY: "look for empty columns", NO_ROOM: "raise data.max-length"}
    found = [remedy for reason, remedy in remedies.items() if reason in report.bad]
    return f"; {', '.join(found)}" if found else ""


def _log(examples: Examples, config: Data) -> None:
    report, num_train, num_heldout = examples.report, len(examples.train), examples.num_heldout
    logger.info(
        "%d rows of %s: %d examples to train on, %d held out", report.num_rows, report.path, num_train, num_heldout
    )
    if report.template:
        logger.info("prompt and response are written as %s", report.template)
    if report.unread:
        logger.info("%s", report.unread_columns())
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
    for note in report.all_notes():
        logger.warning("%s", note)
    if report.redacted:
        logger.info("replaced by pseudonyms: %s", report.say_redacted())
    if report.num_copies:
        logger.info(COPIES, report.num_copies, report.num_rows - report.num_bad)
