"""Where private rows come from, one after another, however many there are. No error quotes a row.

Data path: **files, saved folder or hub -> rows** -> examples (`examples.py`) -> batches (`data.py`).

Nothing is copied: a reader that caches would leave private data elsewhere on the disk.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch

from fl_split import demo
from fl_split.config import Data, NodeConfig, absolute
from fl_split.data.partition import owners
from fl_split.errors import DataError

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAVED = ("state.json", "dataset_dict.json")  # of `datasets.save_to_disk`, one split and several
_MAX_FIELD = 2**31 - 1  # characters of a CSV field; Python's own limit is 128 KiB


@dataclass(frozen=True)
class Row:
    """One row, and where a person finds it."""

    place: str  # such as "notes.jsonl line 7"
    values: dict[str, Any] | None  # None: malformed


@dataclass(frozen=True)
class Source:
    """A node's rows; nothing is read before `rows` is iterated."""

    rows: Iterable[Row]
    identity: tuple[object, ...]  # changes whenever the rows may have changed


def find_rows(config: Data, node: NodeConfig, seed: int) -> Source:
    """Find a node's rows: a path of its own, a file of its own, or its share of what all nodes read.

    Raises:
        DataError: Nothing is there, or it cannot be divided among the nodes; while iterating, a file that cannot be
            read or lacks a column.
    """
    if node.data_path:
        return _source("data-path", node.data_path, config)
    path = str(demo.data_folder()) if config.path == "demo" else config.path
    if config.partitioner:
        return _dealt(_source("data.path", path, config), config, node, seed)
    if _is_hub(path):
        return _share(_source("data.path", path, config), node, seed)
    folder = absolute("data.path", path)
    files = [folder] if _is_saved(folder) else _find_files("data.path", path)
    if len(files) > 1 and len(files) != node.num_partitions:
        raise DataError(
            f"data.path matches {len(files)} files, but the run has {node.num_partitions} nodes: use one node per file "
            f'(flwr run ... --federation-config "num-supernodes={len(files)}"), or one file, which is dealt out to all'
        )
    if len(files) > 1:
        return _source("data.path", str(files[node.partition_id]), config)
    return _share(_source("data.path", str(files[0]), config), node, seed)


def num_files(config: Data) -> int:
    """Files that `data.path` matches: as many nodes as a run can have, unless it is 1.

    Raises:
        DataError: It matches none.
    """
    path = str(demo.data_folder()) if config.path == "demo" else config.path
    if _is_hub(path) or _is_saved(absolute("data.path", path)):
        return 1
    return len(_find_files("data.path", path))


def _share(source: Source, node: NodeConfig, seed: int) -> Source:
    """Deal rows out: of each `num_partitions` of them, every node gets one, drawn by seed."""
    partition, num_partitions = node.partition_id, node.num_partitions

    def rows() -> Iterator[Row]:
        generator, dealt = torch.Generator().manual_seed(seed), iter(source.rows)
        while hand := list(islice(dealt, num_partitions)):
            mine = int(torch.randperm(num_partitions, generator=generator)[partition])
            if mine < len(hand):
                yield hand[mine]

    return Source(_Again(rows), (*source.identity, partition, num_partitions, seed))


def _dealt(source: Source, config: Data, node: NodeConfig, seed: int) -> Source:
    """Deal rows out as `data.partitioner` says; reads them twice, and keeps none.

    Malformed rows have nothing to go by: they are node 0's, which counts them.
    """

    def rows() -> Iterator[Row]:
        good = (row.values for row in source.rows if row.values is not None)
        dealt = iter(owners(good, config, node.num_partitions, seed))
        for row in source.rows:
            if (0 if row.values is None else next(dealt)) == node.partition_id:
                yield row

    return Source(_Again(rows), (*source.identity, node.partition_id, node.num_partitions, seed))


@dataclass(frozen=True)
class _Again:
    """An iterable that begins anew each time."""

    begin: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.begin()


def _source(key: str, path: str, config: Data) -> Source:
    if _is_hub(path):
        return Source(_Again(lambda: _from_hub(key, path, config)), (path, config.subset, config.split))
    folder = absolute(key, path)
    if _is_saved(folder):
        stamps = [_stamp(file) for file in sorted(folder.rglob("*")) if file.is_file()]
        return Source(_Again(lambda: _from_saved(folder, config)), (*stamps, config.split))
    files = _find_files(key, path)

    def rows() -> Iterator[Row]:
        for file in files:
            yield from _check_columns(str(file), _READERS[file.suffix](file), config)

    return Source(_Again(rows), tuple(_stamp(file) for file in files))


def _stamp(file: Path) -> tuple[str, int, int]:
    about = file.stat()
    return str(file), about.st_size, about.st_mtime_ns


def _is_hub(path: str) -> bool:
    return bool(_HUB.fullmatch(path)) and Path(path).suffix not in _READERS


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _find_files(key: str, path: str) -> list[Path]:
    pattern = absolute(key, path)
    if pattern.is_dir():
        found = [p for p in pattern.iterdir() if p.suffix in _READERS]
    else:
        found = [p for p in map(Path, glob.glob(str(pattern))) if p.is_file()]
    if not found:
        raise DataError(
            f"{key}={path!r} matches no file: expected a file, folder or pattern of {', '.join(_READERS)}, a folder "
            "that datasets.save_to_disk wrote, or the name of a dataset on the Hugging Face hub (owner/name)"
        )
    strange = [p.name for p in found if p.suffix not in _READERS]
    if strange:
        raise DataError(f"{key}={path!r} matches {strange[0]}: expected files that end in {', '.join(_READERS)}")
    return sorted(found)


# ----------------------------------------------------------------------------------------------------- readers


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            yield Row(f"{file.name} line {number}", values if isinstance(values, dict) else None)


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD)
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] | None = None
        for _ in count():
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield Row(f"{file.name} line {reader.line_num}", None)
                continue
            except UnicodeDecodeError:
                raise DataError(f"{file} is not UTF-8 after line {reader.line_num}: write it in UTF-8") from None
            if header is None:
                header = fields
            elif fields:
                fits = len(fields) == len(header)
                yield Row(
                    f"{file.name} line {reader.line_num}", dict(zip(header, fields, strict=True)) if fits else None
                )


def _read_by_datasets(form: str) -> Callable[[Path], Iterator[Row]]:
    def read(file: Path) -> Iterator[Row]:
        try:  # readers raise anything, with the offending text in the message
            rows = datasets.load_dataset(form, data_files=str(file), split="train", streaming=True)
            for number, values in enumerate(rows, 1):
                yield Row(f"{file.name} row {number}", dict(values))
        except Exception as error:
            raise DataError(f"{file} cannot be read as {form} ({type(error).__name__}): check the file") from None

    return read


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_by_datasets("json"),
    ".csv": _read_csv,
    ".parquet": _read_by_datasets("parquet"),
}


def _from_saved(folder: Path, config: Data) -> Iterator[Row]:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder} cannot be read as a saved dataset ({type(error).__name__}): save it again with "
            "datasets.save_to_disk"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise DataError(f"{folder} has no data.split={config.split!r}: it has {', '.join(sorted(saved))}")
        saved = saved[config.split]
    rows = (Row(f"{folder.name} row {number}", dict(values)) for number, values in enumerate(saved, 1))
    yield from _check_columns(str(folder), rows, config)


def _from_hub(key: str, name: str, config: Data) -> Iterator[Row]:
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

    yield from _check_columns(name, rows(), config)


def needed_columns(config: Data) -> dict[str, str]:
    """Configuration key -> name of each column that is read."""
    if config.messages:
        return {"data.messages": config.messages}
    if config.text:
        text = {"data.text": config.text}
        return {**text, "data.label": config.label} if config.labels else text
    return {"data.prompt": config.prompt, "data.response": config.response}


def _check_columns(where: str, rows: Iterable[Row], config: Data) -> Iterator[Row]:
    """Pass rows on; the first one that is not malformed must have every column."""
    checked = False
    for row in rows:
        if row.values is not None and not checked:
            checked = True
            for key, column in needed_columns(config).items():
                if column not in row.values:
                    raise _no_column(f"{where} has no column {key}={column!r}", where, sorted(map(str, row.values)))
        yield row


def _no_column(text: str, where: str, columns: Sequence[str]) -> DataError:
    """The error for a column that is not there: it goes to the server, and its note, if any, only to `fl-split doctor`.

    Names of columns are of a schema, but for a CSV without a header (its first row would be taken for them) and for
    JSON (its keys may be data, such as a person's name).
    """
    if where.endswith(".csv"):
        return DataError(f"{text}: it has {len(columns)} others; the first line of a .csv must name them")
    if not where.endswith((".jsonl", ".json")):
        return DataError(f"{text}: it has {', '.join(columns)}")
    error = DataError(f"{text}: its first row has {len(columns)} others, which 'fl-split doctor' names on the node")
    error.add_note(", ".join(columns))
    return error
