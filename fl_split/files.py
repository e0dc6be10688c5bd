"""Files and folders: written atomically, cached, kept by round, so that a kill at any moment loses nothing finished."""

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_split.errors import FLSplitError

if TYPE_CHECKING:  # torch takes seconds to load, and most of what writes a file does without
    from torch import Tensor

KEPT_ROUNDS = 2  # of a run or a node: the server may have lost the last one, and then asks for it again


_ROOM = "make room there and start again; a run goes on with run.resume=true"
_NO_RIGHT = "this account may not read or write there: give it the right to (chmod, chown)"
_REFUSALS = {
    errno.ENOSPC: f"the disk is full: {_ROOM}",
    errno.EDQUOT: f"this account's quota of the disk is used up: {_ROOM}",
    errno.EROFS: "the disk is read-only: name a folder on another one, or mount it for writing",
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
}
_OF_SQLITE = {  # whose errors are no OSError
    "SQLITE_FULL": errno.ENOSPC,
    "SQLITE_IOERR_SHMSIZE": errno.ENOSPC,
    "SQLITE_CANTOPEN": errno.EACCES,
    "SQLITE_READONLY": errno.EACCES,
}


@contextmanager
def disk_in_words(folder: Path | str) -> Iterator[None]:
    """Say in words why the system refused to write: it is no fault of the code, and its remedy is known.

    Args:
        folder: Where most is written; named where the system names no file.

    Raises:
        FLSplitError: A full disk, a read-only one, or no right to write.
    """
    try:
        yield
    except FLSplitError:
        raise
    except Exception as error:  # safetensors tells a full disk in a text only
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        number = _OF_SQLITE.get(getattr(error, "sqlite_errorname", ""), number)
        if number not in _REFUSALS:
            raise
        raise FLSplitError(f"{getattr(error, 'filename', None) or folder}: {_REFUSALS[number]}") from error


def cache_folder() -> Path:
    """Where things are kept that can be had again: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``fl-split``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl-split"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content; a reader sees all of the old or all of the new. What is no file is written to."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def line_of(entry: Mapping[str, Any]) -> str:
    """An entry of a ``metrics.jsonl`` as strict JSON, which knows no NaN: null, and back again by `read_entries`."""
    finite = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a ``metrics.jsonl``, a node's or a server's; a line that a kill has cut off is left out."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        entries.append({key: math.nan if value is None else value for key, value in entry.items()})
    return entries


class Rounds:
    """Named tensors of finished rounds, one folder a round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self) -> list[int]:
        """Numbers of the rounds at hand, ascending."""
        names = (re.fullmatch(r"round-(\d+)", p.name) for p in self._folder.glob("round-*"))
        return sorted(int(match[1]) for match in names if match)

    def save(self, number: int, files: Mapping[str, dict[str, "Tensor"]], keep: int) -> None:
        """Add a round, or replace it, and forget all but the newest `keep` up to it."""
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self._folder, prefix=".round-"))
        for name, tensors in files.items():
            file = scratch / f"{name}.safetensors"
            save_file(tensors, file)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _sync(scratch)
        target = self._path(number)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
        _sync(self._folder)
        _sync(self._folder.parent)  # that this folder is there, and a run's metrics
        for old in self.finished():
            if old > number or old <= number - keep:
                shutil.rmtree(self._path(old))
        for leftover in self._folder.glob(".round-*"):
            shutil.rmtree(leftover)

    def load(self, number: int, name: str) -> dict[str, "Tensor"]:
        """One file of a finished round; nothing where an older version has not kept it."""
        from safetensors.torch import load_file

        file = self._path(number) / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}"
