"""One object that wraps rows: `{"data": [...]}`, parts by name, rows by their number, whole columns.

Data path: the only value of a JSON file -> **rows** -> examples. What is not told apart is refused, never guessed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_split.errors import DataError


@dataclass(frozen=True)
class Wrapped:
    """Rows that were found, and where; the file's own keys are not named, since they may be data."""

    rows: list[Any]
    what: str


def unwrap(file: Path, value: Any, columns: Collection[str], split: str) -> Wrapped | None:
    """Find the rows in an object that is all of a file; None if it is a row itself, or something else.

    Args:
        file: For the error.
        value: The object.
        columns: That are needed.
        split: The part that is meant, where there are several.

    Raises:
        DataError: It holds several lists of rows, and none has the part's name.
    """
    if not isinstance(value, dict):
        return None
    if all(column in value for column in columns):
        return _of_columns(value, columns)
    lists = {key: inner for key, inner in value.items() if _is_rows(inner)}
    if len(lists) == 1:
        return Wrapped(next(iter(lists.values())), "the list in it")
    if split in lists:
        return Wrapped(lists[split], f"those of data.split={split!r}; {len(lists) - 1} other lists are not read")
    if lists:
        raise DataError(
            f"{file} is one object with {len(lists)} lists of rows: let data.split name the one that is meant, or "
            "write it to a file of its own"
        )
    rows = list(value.values())
    if rows and all(isinstance(row, dict) and all(column in row for column in columns) for row in rows):
        return Wrapped(rows, "the objects in it")
    return None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _of_columns(value: dict[str, Any], columns: Collection[str]) -> Wrapped | None:
    """Make rows of whole columns: lists or, by pandas' default, objects from a row's number to its value."""
    found = [value[column] for column in columns]
    if all(isinstance(inner, dict) for inner in found) and len({tuple(inner) for inner in found}) == 1:
        found = [list(inner.values()) for inner in found]
    if not all(isinstance(inner, list) and not _is_rows(inner) for inner in found) or len(set(map(len, found))) > 1:
        return None
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)]
    return Wrapped(rows, "made of the columns in it")
