"""JSON -> rows: an object a line, or a list of objects, or objects one after another; each value as it stands.

Data path: text (`lines`) -> **rows** -> examples. A line that is no JSON is one bad row; a list that breaks off ends
the file, since nothing tells where its next row begins. One object alone may wrap the rows (`wrapped`).
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fl_split.data.lines import HEAD, open_text, tell_encoding, undecoded
from fl_split.data.rows import MALFORMED, NOT_UTF8, Row, Say, kind_of
from fl_split.data.wrapped import unwrap
from fl_split.errors import DataError

_BLANK = re.compile(r"[\s\ufeff]*")
_LIST_OF_ROWS = re.compile(r"\[\s*(\{|$)")
_OBJECTS = re.compile(r"\{.*\}\s*\{")  # one after another in a line
_NEAR_END = 16  # characters: an error so near to the end of what is read may be that it goes on
_NO_JSON = object()


def _whole_number(digits: str) -> int | float:
    with suppress(ValueError):  # Python refuses more than some thousand digits
        return int(digits)
    return float(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def read_json(file: Path, say: Say, columns: Collection[str], split: str) -> Iterator[Row]:
    """Rows of a .json or .jsonl file; what is in it decides, not its name.

    Args:
        file: It.
        say: Is told of what is unusual.
        columns: That are needed.
        split: The part of the data that is meant, where the file names several.

    Raises:
        DataError: It breaks off in the middle of a list, or is one object with several lists of rows.
    """
    with open_text(file, say) as text:
        by_line = _is_by_line(text.read(HEAD))
    with open_text(file, say) as text:
        found = _by_line(file, text) if by_line else _in_stream(file, text)
        found = _unwrapped(file, found, say, columns, split)
        told = False
        for place, raw, value in found:
            wrong = undecoded(raw)
            if wrong and not told:
                told = True
                tell_encoding(file, wrong, say)
            if isinstance(value, dict) and not wrong:
                yield Row(place, value)
            else:
                yield Row(place, None, NOT_UTF8 if wrong else _fault(value))


def _unwrapped(
    file: Path, found: Iterator[tuple[str, str, Any]], say: Say, columns: Collection[str], split: str
) -> Iterator[tuple[str, str, Any]]:
    """Pass on what is found; of a file that is one object alone, the rows in it."""
    first = list(islice(found, 2))
    inner = unwrap(file, first[0][2], columns, split) if len(first) == 1 else None
    if inner is None:
        yield from first
        yield from found
        return
    say(f"{file.name} is one object; its rows are {inner.what}")
    for number, value in enumerate(inner.rows, 1):
        yield f"{file.name} row {number}", json.dumps(value, ensure_ascii=False), value


def _fault(value: Any) -> str:
    return f"{MALFORMED}: {'no JSON' if value is _NO_JSON else f'{kind_of(value)} instead of an object with columns'}"


def _is_by_line(head: str) -> bool:
    """Tell whether each line is a row, by a file's beginning."""
    lines = (stripped for line in head.splitlines() if (stripped := line.strip().lstrip("\ufeff")))
    first, second = next(lines, ""), next(lines, "")
    value = _decode(first)
    if value is _NO_JSON:
        return not (_LIST_OF_ROWS.match(first) or first == "{" or second.startswith('"') or _OBJECTS.match(first))
    return bool(second) or not isinstance(value, list)


def _decode(line: str) -> Any:
    """Decode a line, which may end in the comma that a list would have there; `_NO_JSON` where it is none."""
    for text in (line, line.removesuffix(",")):
        with suppress(ValueError, RecursionError):
            return _DECODER.decode(text)
    return _NO_JSON


def _by_line(file: Path, text: TextIO) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(text, 1):
        stripped = line.strip().lstrip("\ufeff")
        if not stripped:
            continue
        yield f"{file.name} line {number}", stripped, _decode(stripped)


def _in_stream(file: Path, text: TextIO) -> Iterator[tuple[str, str, Any]]:
    stream = _Stream(text)
    try:
        for number, (raw, value) in enumerate(stream.rows(), 1):
            yield f"{file.name} row {number}", raw, value
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeError):
            raise
        raise DataError(
            f"{file} is no JSON beyond line {stream.line}: mend it there, or write an object a line (.jsonl), where "
            "one bad line is one bad row"
        ) from None


class _Stream:
    """JSON values one after another, without the whole text in memory."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._buffer, self._at = text, "", 0
        self.line = 1  # in which the newest value begins, or an error lies

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each value with its text; of lists at the top, their items."""
        while begin := self._peek():
            if begin != "[":
                yield self._value()
                continue
            self._skip()
            if self._peek() == "]":
                self._skip()
                continue
            yield self._value()
            while self._peek() == ",":
                self._skip()
                if self._peek() != "]":  # a comma after the last one
                    yield self._value()
            if self._peek() != "]":
                raise ValueError("a list that does not end")
            self._skip()

    def _more(self) -> bool:
        rest = self._buffer[self._at :]
        chunk = self._text.read(max(HEAD, len(rest)))
        self._buffer, self._at = rest + chunk, 0
        return bool(chunk)

    def _skip(self, to: int | None = None) -> None:
        end = self._at + 1 if to is None else to
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _peek(self) -> str:
        """Look at the next character that is not blank; "" at the end."""
        while True:
            blank = _BLANK.match(self._buffer, self._at)
            self._skip(blank.end() if blank else self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _value(self) -> tuple[str, Any]:
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _NEAR_END
                if not cut or not self._more():
                    self._skip(error.pos)
                    raise
                continue
            if end < len(self._buffer) or not self._more():  # a number may go on
                raw = self._buffer[self._at : end]
                self._skip(end)
                return raw, value
