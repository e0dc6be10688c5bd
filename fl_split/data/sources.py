"""Where a node's private rows come from, and which of them are its own, one after another, however many there are.

Data path: **files, saved folder or hub -> a node's rows** -> examples (`examples`) -> batches (`batches`).
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from fl_split import demo
from fl_split.config import Data, NodeConfig, absolute
from fl_split.data.partition import owners
from fl_split.data.readers import can_read, known_endings, read_file, read_hub, read_saved
from fl_split.data.rows import Row
from fl_split.errors import DataError

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAVED = ("state.json", "dataset_dict.json")  # of `datasets.save_to_disk`, one split and several
_HIDDEN = re.compile(r"(^|/)(\.|__|~\$)")  # .ipynb_checkpoints, __MACOSX, ~$notes.csv that Excel locks
_NAMED = 5  # files that are left out


@dataclass(frozen=True)
class Source:
    """A node's rows; nothing is read before `rows` is iterated."""

    rows: Iterable[Row]
    identity: tuple[object, ...]  # changes whenever the rows may have changed
    path: str  # of the file or files, for people
    notes: dict[str, None] = field(default_factory=dict)  # what is unusual about them: each once; filled while reading


def find_rows(config: Data, node: NodeConfig, seed: int) -> Source:
    """Find a node's rows: a path of its own, a file of its own, or its share of what all nodes read.

    Raises:
        DataError: Nothing is there, or it cannot be divided among the nodes; while iterating, a file that cannot be
            read or lacks a column.
    """
    if node.data_path:
        return _source("data-path", node.data_path, config)
    path = path_of(config)
    if config.partitioner:
        return _dealt(_source("data.path", path, config), config, node, seed)
    if _is_hub(path) or _is_saved(absolute("data.path", path)):
        return _share(_source("data.path", path, config), node, seed)
    files, left_out = _find_files("data.path", path)
    if len(files) > 1 and len(files) != node.num_partitions:
        raise DataError(
            f"data.path matches {len(files)} files, but the run has {node.num_partitions} nodes: use one node per file "
            f'(flwr run ... --federation-config "num-supernodes={len(files)}"), or one file, which is dealt out to all'
        )
    if len(files) > 1:
        return _of_files([files[node.partition_id]], left_out, config)
    return _share(_of_files(files, left_out, config), node, seed)


def path_of(config: Data) -> str:
    """`data.path`, with the demo's data made on first use."""
    return str(demo.data_folder()) if config.path == "demo" else config.path


def num_files(config: Data) -> int:
    """Files that `data.path` matches: as many nodes as a run can have, unless it is 1.

    Raises:
        DataError: It matches none.
    """
    path = path_of(config)
    if _is_hub(path) or _is_saved(absolute("data.path", path)):
        return 1
    return len(_find_files("data.path", path)[0])


def _share(source: Source, node: NodeConfig, seed: int) -> Source:
    """Deal rows out: of each `num_partitions` of them, every node gets one, drawn by seed."""
    partition, num_partitions = node.partition_id, node.num_partitions

    def rows() -> Iterator[Row]:
        generator, dealt = torch.Generator().manual_seed(seed), iter(source.rows)
        while hand := list(islice(dealt, num_partitions)):
            mine = int(torch.randperm(num_partitions, generator=generator)[partition])
            if mine < len(hand):
                yield hand[mine]

    return Source(_Again(rows), (*source.identity, partition, num_partitions, seed), source.path, source.notes)


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

    identity = (*source.identity, node.partition_id, node.num_partitions, seed)
    return Source(_Again(rows), identity, source.path, source.notes)


@dataclass(frozen=True)
class _Again:
    """An iterable that begins anew each time."""

    begin: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.begin()


def _source(key: str, path: str, config: Data) -> Source:
    if _is_hub(path):
        return Source(_Again(lambda: read_hub(key, path, config)), (path, config.subset, config.split), path)
    folder = absolute(key, path)
    if _is_saved(folder):
        stamps = [_stamp(file) for file in sorted(folder.rglob("*")) if file.is_file()]
        return Source(_Again(lambda: read_saved(folder, config)), (*stamps, config.split), str(folder))
    return _of_files(*_find_files(key, path), config)


def _of_files(files: Sequence[Path], left_out: Sequence[Path], config: Data) -> Source:
    notes: dict[str, None] = {}
    if left_out:
        names = ", ".join(file.name for file in left_out[:_NAMED]) + (", ..." if len(left_out) > _NAMED else "")
        notes[f"{len(left_out)} other files are not read: {names}; expected are {known_endings()}"] = None

    def rows() -> Iterator[Row]:
        for file in files:
            empty = True
            for row in read_file(file, config, lambda note: notes.setdefault(note)):
                empty = False
                yield row
            if empty:
                notes[f"{file.name} has no rows"] = None

    shown = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return Source(_Again(rows), tuple(_stamp(file) for file in files), shown, notes)


def _stamp(file: Path) -> tuple[str, int, int]:
    about = file.stat()
    return str(file), about.st_size, about.st_mtime_ns


def _is_hub(path: str) -> bool:
    return bool(_HUB.fullmatch(path)) and not can_read(Path(path))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _below(key: str, folder: Path) -> Iterator[Path]:
    """Walk through a folder; one that may not be looked into is no empty one. Links to folders count as files."""

    def stop(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename} may not be read by this account: give it the right to (chmod, chown)")

    for where, folders, names in os.walk(folder, onerror=stop):
        yield from (Path(where, name) for name in names)
        yield from (Path(where, name) for name in folders if os.path.islink(os.path.join(where, name)))


def _check_link(key: str, file: Path) -> None:
    """Refuse a link to nothing: data that git-annex or DVC have not fetched look like that."""
    if can_read(file) and not file.exists():
        raise DataError(f"{key}: {file} is a link to a file that is not there: fetch it, or remove the link")


def _find_files(key: str, path: str) -> tuple[list[Path], list[Path]]:
    """Find the files to be read, and those that a folder has beside them; hidden ones do not count."""
    place = absolute(key, path)
    if place.is_dir():
        below = sorted(file for file in _below(key, place) if file.exists() or file.is_symlink())
        found = [file for file in below if not _HIDDEN.search(file.relative_to(place).as_posix())]
        for file in found:
            _check_link(key, file)
    elif place.is_file() or place.is_symlink():
        _check_link(key, place)
        found = [place]
    else:
        found = sorted(file for file in map(Path, glob.glob(str(place), recursive=True)) if file.is_file())
    files = [file for file in found if can_read(file) and file.is_file()]
    strange = [file for file in found if file not in files]
    if strange and not place.is_dir():
        raise DataError(f"{key}={path!r} matches {strange[0].name}: expected files that end in {known_endings()}")
    if not files:
        raise DataError(
            f"{key}={path!r} matches no file: expected a file, folder or pattern of {known_endings()}, a folder "
            "that datasets.save_to_disk wrote, or the name of a dataset on the Hugging Face hub (owner/name)"
        )
    return files, strange
