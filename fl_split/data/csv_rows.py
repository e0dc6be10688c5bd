"""CSV -> rows: names in the first line, fields between commas, semicolons, tabs or bars.

Data path: text (`lines`) -> **rows** -> examples. A quote that is never closed would take all lines after it into one
field; where these look like records of their own, they are read as such.
"""

import csv
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

from fl_split.data.lines import HEAD, endings, open_text, tell_encoding, undecoded
from fl_split.data.rows import MALFORMED, NOT_UTF8, Row, Say
from fl_split.errors import DataError

_MAX_FIELD = 2**31 - 1  # characters of a field; Python's own limit is 128 KiB
_MOST_LINES = 10_000  # of one record: beyond, a quote has not been closed
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_HALF, _MOST = 0.5, 0.8  # of a record's further lines that would be records by themselves
_MANY_LINES = 4  # of a record that is suspected
_ESCAPED = re.compile(r'(?<!\\)\\"')  # a quote in a text, by Spark and MySQL
_SHOWS_ESCAPED = re.compile(r'\\"[^,;\t|\r\n]')  # before a delimiter, the backslash may be a path's last letter
_DOUBLED = re.compile(r'\w""')  # by all others
_AGAIN = f"{MALFORMED}: the line that names the columns, again"
_UNCLOSED = f"{MALFORMED}: a quote that is not closed"

Numbered = tuple[int, str]  # a line and its number


class _Lines:
    """A file's lines, with those that the record being read has taken, which can be given back."""

    def __init__(self, text: TextIO, escaped: bool) -> None:
        self._text, self._again = enumerate(text, 1), deque[Numbered]()
        self._escaped = escaped
        self.taken: list[Numbered] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = self._again.popleft() if self._again else next(self._text)
        self.taken.append((number, line))
        if len(self.taken) > _MOST_LINES:
            raise csv.Error("a record of too many lines")
        line = line.removeprefix("\ufeff")
        return _ESCAPED.sub('""', line) if self._escaped else line

    def back(self, lines: Sequence[Numbered]) -> None:
        """Read these again, as other records."""
        self._again.extendleft(reversed(lines))


def read_csv(file: Path, say: Say, columns: Mapping[str, str]) -> Iterator[Row]:
    """Read rows of a .csv or .tsv file.

    Args:
        file: It.
        say: Is told of what is unusual.
        columns: That are needed, by their configuration keys; by them the delimiter is found.

    Raises:
        DataError: Its first line cannot be read, or does not name each needed column once.
    """
    csv.field_size_limit(_MAX_FIELD)
    with open_text(file, say, newline="") as text:
        head = text.read(HEAD)
    if not head.strip("\ufeff \r\n"):  # as Spark writes a part without rows
        return
    delimiter = _delimiter(file, head, columns.values(), say)
    escaped = bool(_SHOWS_ESCAPED.search(head)) and not _DOUBLED.search(head)
    if escaped:
        say(f'{file.name} is read with \\" for a quote in a text')
    spaced = head.count(f'{delimiter} "') > head.count(f'{delimiter}"')
    with open_text(file, say, newline="") as text:
        lines = _Lines(text, escaped)
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
        header = _header(file, reader, columns)
        told = False
        for fields in _read_records(reader, lines):
            number, following = lines.taken[0][0], lines.taken[1:]
            place = f"{file.name} line {number}"
            wrong = undecoded("".join(fields or ()))
            if wrong and not told:
                told = True
                tell_encoding(file, wrong, say)
            alike = _part_like_records(following, len(header), delimiter)
            if fields is None or len(fields) != len(header):
                if alike >= _HALF:
                    lines.back(following)
                yield Row(place, None, _UNCLOSED if alike >= _HALF else _fault(fields, len(header)))
            elif wrong:
                yield Row(place, None, NOT_UTF8)
            elif _names(fields) == header:
                yield Row(place, None, _AGAIN)
            else:
                if len(following) >= _MANY_LINES and alike > _MOST:
                    say(f"{place} to {following[-1][0]} are read as one row: if they are several, a quote is missing")
                yield Row(place, dict(zip(header, fields, strict=True)))


def _read_records(reader: Iterator[list[str]], lines: _Lines) -> Iterator[list[str] | None]:
    """Pass records on, without blank lines; None for one whose quotes do not fit. `lines` tells what each has taken."""
    while True:
        lines.taken = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None
            continue
        if fields:
            yield fields


def _fault(fields: list[str] | None, width: int) -> str:
    if fields is None:
        return f"{MALFORMED}: quotes that do not fit"
    return f"{MALFORMED}: {'more' if len(fields) > width else 'fewer'} fields than the first line names"


def _delimiter(file: Path, head: str, columns: Collection[str], say: Say) -> str:
    """Find what separates fields: that by which the first line names the columns."""
    lines = head.splitlines()
    usual = "\t" if endings(file)[0] == ".tsv" else ","
    for delimiter in (usual, *_DELIMITERS):
        names = _names(next(_records(lines, delimiter), []))
        if set(columns) <= set(names):
            if delimiter != usual:
                say(f"{file.name} is read with {_DELIMITERS[delimiter]} between its fields")
            return delimiter
    return usual


def _records(lines: Sequence[str], delimiter: str) -> Iterator[list[str]]:
    reader = csv.reader((line.removeprefix("\ufeff") for line in lines), delimiter=delimiter)
    return (fields for fields in reader if _is_header(fields))


def _is_header(fields: list[str]) -> bool:
    """Tell whether a line names columns: neither a blank one does nor the one by which Excel tells its delimiter."""
    return any(name.strip() for name in fields) and not fields[0].lower().startswith("sep=")


def _names(fields: list[str]) -> list[str]:
    return [name.strip() for name in fields]


def _header(file: Path, reader: "Iterator[list[str]]", columns: Mapping[str, str]) -> list[str]:
    try:
        names = _names(next((fields for fields in reader if _is_header(fields)), []))
    except csv.Error:
        raise DataError(
            f"{file}: its first line must name the columns, and has quotes that do not fit: mend that line"
        ) from None
    for key, column in columns.items():
        if names.count(column) > 1:
            raise DataError(f"{file}: its first line names the column {column!r} more than once: keep one of them")
        if column not in names:  # what it has instead may be a row, where no line names the columns
            alike = [name for name in names if name.lower() == column.lower()]
            found = f"{alike[0]!r}, and letters count" if alike else f"{len(names)} others"
            found += "" if alike or all(names) else ", some of them blank"
            raise DataError(
                f"{file} has no column {key}={column!r}: it has {found}; the first line that is not blank must name "
                "the columns, with commas, semicolons, tabs or bars between"
            )
    return names


def _part_like_records(lines: Sequence[Numbered], width: int, delimiter: str) -> float:
    """Say what part of a record's further lines would be records by themselves, 0 to 1."""
    if width < 2 or not lines:
        return 0.0
    looked = list(islice(lines, 1000))
    return sum(_is_record(line, width, delimiter) for _, line in looked) / len(looked)


def _is_record(line: str, width: int, delimiter: str) -> bool:
    if line.count('"') % 2:
        return False
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True), [])) == width
    except csv.Error:
        return False
