"""A file of text, whatever it is compressed and encoded by.

Data path: **bytes of a file -> text** -> rows (`json_rows`, `csv_rows`). Bytes that are not of the encoding become lone
surrogates, so that they spoil the row they stand in and no other.
"""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pyarrow as pa

from fl_split.data.rows import Say
from fl_split.errors import DataError

PACKED: dict[str, Callable[[Path], Any]] = {  # endings after a format's own
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: pa.input_stream(str(file), compression="zstd"),
}
DAMAGED = (EOFError, OSError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowException)  # of reading, not of a row

HEAD = 2**16  # characters by which a file is judged
_MARKS = (  # the longer before those that they begin with
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_NO_TEXT = {  # first bytes of what is often named wrongly
    b"PK\x03\x04": "a .zip or .xlsx file",
    b"\xd0\xcf\x11\xe0": "an .xls file",
    b"%PDF": "a .pdf file",
    b"ARROW1": "an .arrow file",
    b"SQLite format 3": "a database of SQLite",
    b"version https://git-lfs": "a pointer of Git LFS ('git lfs pull' fetches what it points to)",
    b"<!DOCTYPE html": "a page of HTML",
    b"<html": "a page of HTML",
    b"PAR1": "a .parquet file",
    b"\x1f\x8b": "compressed (.gz)",
    b"BZh": "compressed (.bz2)",
    b"\xfd7zXZ": "compressed (.xz)",
    b"\x28\xb5\x2f\xfd": "compressed (.zst)",
}
_UNDECODED = re.compile("[\udc80-\udcff]+")


def endings(file: Path) -> tuple[str, str]:
    """A file's format and compression by its name, such as ``.jsonl`` and ``.gz``; in lower case, "" for none."""
    suffixes = ["", *(suffix.lower() for suffix in file.suffixes)]
    return (suffixes[-2], suffixes[-1]) if len(suffixes) > 2 and suffixes[-1] in PACKED else (suffixes[-1], "")


def open_text(file: Path, say: Say, newline: str | None = None) -> TextIOWrapper:
    """Open a file of text; says so where it is not UTF-8.

    Args:
        file: Compressed or not, by its ending.
        say: Is told of the encoding.
        newline: As for `open`.

    Raises:
        DataError: It is no text by its first bytes.
    """
    packed = endings(file)[1]
    with _open(file, packed) as stream:
        sample = bytes(stream.read(HEAD))
    for begin, kind in _NO_TEXT.items():
        if sample.startswith(begin):
            raise DataError(f"{file} is {kind} by its first bytes, whatever its name: name it so, or write it as text")
    encoding, how = _encoding(sample)
    if how:
        say(f"{file.name} is read as {encoding.upper()}, as its {how}")
    return TextIOWrapper(
        _open(file, packed),
        encoding=encoding,
        errors="surrogateescape" if encoding.startswith("utf-8") else "surrogatepass",
        newline=newline,
    )


def _open(file: Path, packed: str) -> Any:
    return PACKED[packed](file) if packed else file.open("rb")


def _encoding(sample: bytes) -> tuple[str, str]:
    """Find the encoding, and what tells it, which is "" for UTF-8."""
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name, "" if name == "utf-8-sig" else "byte order mark says"
    first, second = sample[::2].count(0), sample[1::2].count(0)
    many = 8 * (first + second) > len(sample)  # of UTF-8 text hardly any byte is zero, of ASCII in UTF-16 every other
    if many and (sample[1:4] == b"\0\0\0" or sample[:3] == b"\0\0\0"):
        return ("utf-32-le" if sample[0] else "utf-32-be"), "zero bytes show"
    begins = [byte == 0 for byte in sample[:4]]  # in ASCII, whatever follows: a brace, the names of columns
    if begins in ([False, True] * 2, [True, False] * 2) or many and max(first, second) > 9 * min(first, second):
        return ("utf-16-le" if second > first else "utf-16-be"), "zero bytes show"
    return "utf-8", ""


def undecoded(text: str) -> str:
    """The first bytes that were not UTF-8, as `open_text` left them; "" if there are none."""
    found = _UNDECODED.search(text)
    return found[0] if found else ""


def tell_encoding(file: Path, wrong: str, say: Say) -> None:
    """Say what encoding a file may have.

    Args:
        file: It.
        wrong: From `undecoded`.
        say: Is told.
    """
    try:
        wrong.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeDecodeError:
        say(f"{file.name} is in another encoding than UTF-8, and not in cp1252 either: save it again as UTF-8")
        return
    say(
        f"{file.name} is not in UTF-8; its bytes fit cp1252 (Windows, Western Europe) and others of its kind: if "
        "cp1252 is what wrote it, 'iconv -f CP1252 -t UTF-8' converts it"
    )
