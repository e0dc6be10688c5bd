"""One file, saved folder or dataset of the hub -> rows; no error quotes one.

Data path: **place -> rows** -> examples. Nothing is copied: a reader that caches would leave private data elsewhere on
the disk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fl_split.config import Data
from fl_split.data.csv_rows import read_csv
from fl_split.data.json_rows import read_json
from fl_split.data.lines import DAMAGED, PACKED, endings
from fl_split.data.rows import MALFORMED, Row, Say
from fl_split.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BATCH = 1000  # rows of a parquet file in memory
_ALL_LACK = 100  # rows without a column, from the first on: it is not there


def can_read(file: Path) -> bool:
    """Whether a file's name ends in a format, and perhaps a compression, that is read; in any case of letters."""
    form, packed = endings(file)
    return form in FORMATS and not (form == ".parquet" and packed)


def known_endings() -> str:
    """For an error: what `can_read` takes."""
    return f"{', '.join(FORMATS)}, all but the last also with {', '.join(PACKED)}"


def read_file(file: Path, config: Data, say: Say) -> Iterator[Row]:
    """Rows of a file that `can_read` takes.

    Raises:
        DataError: It is damaged, or lacks a column.
    """
    form, last = endings(file)[0], "its beginning"
    columns = needed_columns(config)
    if form == ".parquet":
        rows = _read_parquet(file, columns)
    elif form in (".csv", ".tsv"):
        rows = read_csv(file, say, columns)
    else:
        rows = read_json(file, say, columns.values(), config.split)
    try:
        for row in _check_columns(str(file), rows, columns):
            last = row.place
            yield row
    except PermissionError:
        raise DataError(f"{file} may not be read by this account: give it the right to (chmod, chown)") from None
    except DAMAGED as error:  # its text may quote a row
        raise DataError(
            f"{file} cannot be read beyond {last} ({type(error).__name__}): it is damaged, not complete, or not what "
            "its name says; write it anew"
        ) from None


def _read_parquet(file: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(file) as table:
        for key, column in columns.items():
            if table.schema_arrow.names.count(column) > 1:
                raise DataError(f"{file} has more than one column {key}={column!r}: keep one of them")
        for batch in table.iter_batches(_BATCH):
            for i in range(batch.num_rows):
                number += 1
                yield Row(f"{file.name} row {number}", _values(batch, i))


def _values(batch: Any, row: int) -> dict[str, Any] | None:
    try:
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except (ValueError, OverflowError, pa.ArrowException):  # text that is no UTF-8, a date that there is not
        return None


def read_saved(folder: Path, config: Data) -> Iterator[Row]:
    """Rows of a folder that `datasets.save_to_disk` wrote.

    Raises:
        DataError: It is damaged, or lacks the split or a column.
    """
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # readers raise anything, with the offending text in the message
        raise DataError(
            f"{folder} cannot be read as a saved dataset ({type(error).__name__}): save it again with "
            "datasets.save_to_disk"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise DataError(f"{folder} has no data.split={config.split!r}: it has {', '.join(sorted(saved))}")
        saved = saved[config.split]
    plain = saved.with_format("arrow")

    def rows() -> Iterator[Row]:
        for start in range(0, len(plain), _BATCH):
            table = plain[start : start + _BATCH].combine_chunks()
            for batch in table.to_batches():
                for i in range(batch.num_rows):
                    yield Row(f"{folder.name} row {start + i + 1}", _values(batch, i))

    yield from _check_columns(str(folder), rows(), needed_columns(config))


def read_hub(key: str, name: str, config: Data) -> Iterator[Row]:
    """Rows of a dataset on the Hugging Face hub, streamed.

    Raises:
        DataError: It cannot be read, or lacks a column.
    """

    def rows() -> Iterator[Row]:
        try:
            stream = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
            for number, values in enumerate(stream, 1):
                yield Row(f"{name} row {number}", dict(values))
        except Exception as error:
            raise DataError(
                f"{key}={name!r} (data.subset={config.subset!r}, data.split={config.split!r}) could not be read "
                f"from the Hugging Face hub: {type(error).__name__}; check the names and the network; a local path "
                "begins with / or ~"
            ) from None

    yield from _check_columns(name, rows(), needed_columns(config))


def needed_columns(config: Data) -> dict[str, str]:
    """Configuration key -> name of each column that is read."""
    if config.messages:
        return {"data.messages": config.messages}
    if config.text:
        text = {"data.text": config.text}
        return {**text, "data.label": config.label} if config.labels else text
    return {"data.prompt": config.prompt, "data.response": config.response}


def _check_columns(where: str, rows: Iterable[Row], columns: dict[str, str]) -> Iterator[Row]:
    """Pass rows on; a few may lack a column, but not all, nor all of the first."""
    lacking: DataError | None = None
    checked, num_lacking = False, 0
    for row in rows:
        values = row.values
        key = next((key for key, column in columns.items() if values is not None and column not in values), "")
        if key and not checked:
            lacking = lacking or _no_column(where, key, columns[key], sorted(map(str, values or ())))
            num_lacking += 1
            if num_lacking == _ALL_LACK:
                raise lacking
        checked |= values is not None and not key
        yield Row(row.place, None, f"{MALFORMED}: nothing in {key}") if key else row
    if lacking and not checked:
        raise lacking


def _no_column(where: str, key: str, column: str, columns: Sequence[str]) -> DataError:
    """Make the error for a missing column: it goes to the server, and its note, if any, only to `fl-split doctor`.

    Names of columns are of a schema, but for a CSV without a header (its first row would be taken for them) and for
    JSON (its keys may be data, such as a person's name).
    """
    text, form = f"{where} has no column {key}={column!r}", endings(Path(where))[0]
    alike = [name for name in columns if name.strip().lower() == column.strip().lower()]
    if alike:
        return DataError(f"{text}: it has {alike[0]!r}, and letters and spaces count")
    if form not in (".jsonl", ".ndjson", ".json"):
        return DataError(f"{text}: it has {', '.join(columns)}")
    error = DataError(f"{text}: its first row has {len(columns)} others, which 'fl-split doctor' names on the node")
    error.add_note(", ".join(columns))
    return error
