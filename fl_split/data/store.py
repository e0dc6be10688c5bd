"""A node's examples as an Arrow file that is mapped, not read: however many there are, memory stays flat.

Data path: examples -> **prepared file** -> batches (`batches`). The file is as private as the rows it was made of: it
lies in the node's own folder, for its owner's eyes only, and serves every round of a run.
"""

import bisect
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fl_split.data.examples import Example
from fl_split.files import write_atomic

Array = np.ndarray[Any, Any]

_CHUNK = 512  # examples


class Prepared(Sequence[Example]):
    """Some of a file's examples in an order of their own."""

    def __init__(self, chunks: Sequence[Any], numbers: dict[str, Array], order: Array) -> None:
        """View `order` of what `chunks` (Arrow record batches) hold; `numbers` are of all that they hold."""
        self._chunks, self._numbers, self._order = chunks, numbers, order
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in chunks)]).tolist()

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Prepared": ...
    def __getitem__(self, index: int | slice) -> "Example | Prepared":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = int(self._order[index])
        chunk = bisect.bisect_right(self._starts, place) - 1
        columns = self._chunks[chunk]
        row = place - self._starts[chunk]
        return {name: columns.column(name)[row].as_py() for name in ("input_ids", "labels")}

    @property
    def lengths(self) -> Array:
        """Tokens of each example."""
        return self._of("length")

    @property
    def cut(self) -> Array:
        """Tokens that each example has lost to `data.max-length`."""
        return self._of("cut")

    @property
    def keys(self) -> Array:
        """What decides each example's side: equal for equal rows, and spread evenly over 64 bits."""
        return self._of("key")

    def _of(self, name: str) -> Array:
        numbers: Array = self._numbers[name][self._order]
        return numbers

    def largest_id(self) -> int:
        """Of all tokens of the file."""
        return max((pc.max(chunk.column("input_ids").flatten()).as_py() for chunk in self._chunks), default=-1)

    def take(self, order: Sequence[int] | Array) -> "Prepared":
        """These examples in another order, or some of them."""
        return Prepared(self._chunks, self._numbers, self._order[np.asarray(order, dtype=np.int64)])


def write(examples: Iterable[Example], sink: Any) -> None:
    """Write examples, each with its `key` and what was `cut`, a chunk in memory at a time."""
    drawn = iter(examples)
    first = list(islice(drawn, _CHUNK))
    whole = bool(first) and isinstance(first[0]["labels"], int)
    ids = pa.list_(pa.int32())
    labels = pa.int32() if whole else ids
    schema = pa.schema({"input_ids": ids, "labels": labels, "key": pa.uint64(), "cut": pa.int32()})
    with pa.ipc.new_file(sink, schema) as file:
        chunk = first
        while chunk:
            file.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
            chunk = list(islice(drawn, _CHUNK))


def open_prepared(source: Any) -> Prepared:
    """All examples of a file that `write` wrote; mapped if `source` is."""
    reader = pa.ipc.open_file(source)
    chunks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    numbers = {
        "length": _joined([np.diff(chunk.column("input_ids").offsets.to_numpy()) for chunk in chunks], np.int32),
        "key": _joined([chunk.column("key").to_numpy() for chunk in chunks], np.uint64),
        "cut": _joined([chunk.column("cut").to_numpy() for chunk in chunks], np.int32),
    }
    return Prepared(chunks, numbers, np.arange(len(numbers["length"])))


def _joined(parts: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def in_memory(examples: Iterable[Example]) -> Prepared:
    """Examples that need no file."""
    sink = pa.BufferOutputStream()
    write(examples, sink)
    return open_prepared(pa.BufferReader(sink.getvalue()))


class Store:
    """One prepared file in a node's folder, with what was reported when it was made."""

    def __init__(self, folder: Path, identity: object) -> None:
        """Name the file after all that its content depends on."""
        name = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
        self._folder, self._file = folder, folder / f"{name}.arrow"
        self._report = self._file.with_suffix(".json")

    def load(self) -> tuple[Prepared, dict[str, Any]] | None:
        """The examples and their report; None if they have to be made."""
        if not self._report.is_file() or not self._file.is_file():
            return None
        return open_prepared(pa.memory_map(str(self._file))), json.loads(self._report.read_text())

    def earlier(self) -> dict[str, Any]:
        """What was reported when the folder's file was made for the last time; empty if it never was."""
        reports = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
        found: dict[str, Any] = json.loads(reports[-1].read_text()) if reports else {}
        return found

    def save(self, examples: Iterator[Example]) -> Prepared:
        """Make the file, and forget others; it counts only once `finish` has been called."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._forget(but=".json")
        # Readable by its owner only.
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as scratch:
            try:
                write(examples, scratch)
                scratch.flush()
                os.replace(scratch.name, self._file)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(scratch.name)
                raise
        return open_prepared(pa.memory_map(str(self._file)))

    def finish(self, report: dict[str, Any]) -> None:
        """Keep the report, which makes the file count, and forget the earlier one."""
        write_atomic(self._report, json.dumps(report))
        self._forget(but=self._file.stem)

    def _forget(self, but: str) -> None:
        for old in self._folder.iterdir():
            if but not in old.name:
                old.unlink()
