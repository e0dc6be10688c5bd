"""What a disk refuses is told in words, with its remedy, on the node and on the server."""

import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import run_app
from safetensors import SafetensorError
from torch import Tensor
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.errors import ConfigError, FLSplitError
from fl_split.files import Rounds, disk_in_words
from fl_split.node.trunk_cache import CachedTrunk

SERIALIZING = "Error while serializing: I/O error: No space left on device (os error 28)"


def of_sqlite(name: str) -> Exception:
    """As SQLite raises it: the message says less than the name."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    return error


Refuse = Callable[[Exception], None]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "^/out: the disk is full: make room there and start again"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "/out/a"),
            "^/out/a: this account.s quota of the disk",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/out/a"), "^/out/a: the disk is read-only: name a folder on"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "^/a: this account may not read or write there"),
        (SafetensorError(SERIALIZING), "^/out: the disk is full"),
        (of_sqlite("SQLITE_FULL"), "^/out: the disk is full"),
        (of_sqlite("SQLITE_IOERR_SHMSIZE"), "^/out: the disk is full"),
        (of_sqlite("SQLITE_CANTOPEN"), "^/out: this account may not read or write there"),
    ],
)
def test_a_refusal_of_the_disk_is_told_in_words(error: Exception, message: str) -> None:
    with pytest.raises(FLSplitError, match=message), disk_in_words(Path("/out")):
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: a file of this command: the disk is full"),
        (OSError(errno.EROFS, "Read-only", "/keys/a"), "error: /keys/a: the disk is read-only"),
    ],
)
def test_a_command_tells_it_as_well(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("fl_split.trunk.access.add_token", refuse)
    done = CliRunner().invoke(app, ["trunk", "token", "add", "a", "--tokens", "t"])
    assert done.exit_code == 1 and done.stderr.startswith(message)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "no"),
        ValueError("x"),
        SafetensorError("x"),
        of_sqlite("SQLITE_CORRUPT"),
        ConfigError("x"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_in_words(Path("/out")):
        raise error
    assert caught.value is error


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, for which one has to be root."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("only root may make a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # lazily: a traceback holds a database open


def test_a_round_that_does_not_fit_leaves_the_last_one(small: Path) -> None:
    rounds = Rounds(small)
    rounds.save(1, {"adapter": {"a": torch.zeros(10)}}, 2)
    with pytest.raises(FLSplitError, match=f"{small}: the disk is full"), disk_in_words(small):
        rounds.save(2, {"adapter": {"a": torch.zeros(100_000)}}, 2)
    assert rounds.finished() == [1] and torch.equal(rounds.load(1, "adapter")["a"], torch.zeros(10))
    rounds.save(2, {"adapter": {"a": torch.ones(10)}}, 2)  # what was left half done is in nobody's way
    assert rounds.finished() == [1, 2] and not list(small.glob(".round-*"))


@pytest.mark.parametrize("filled", [0, 30, 64], ids=lambda kilobytes: f"{64 - kilobytes}-left")
def test_a_trunk_cache_that_does_not_fit_is_told_in_words(small: Path, filled: int) -> None:
    (small / "other").write_bytes(b"x" * filled * 1024)  # SQLite fails at another place each time

    class Twice:
        def start(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> "Future[Tensor]":
            done: Future[Tensor] = Future()
            done.set_result(2 * hidden)
            return done

    with pytest.raises(FLSplitError, match=f"{small}: the disk is full"), disk_in_words(small):
        with closing(CachedTrunk(Twice(), small / "cache.sqlite", 10**9, b"")) as cache:
            for _ in range(20):
                cache.start(torch.randn(4, 16, 64), None, None).result()


@pytest.mark.parametrize(
    ("where", "who"),
    [("fl_split.node.progress.write_atomic", "node 0.*: .*/nodes/0"), ("server_app.record_round", "/test_a_full_disk")],
)
def test_a_full_disk_is_named_where_the_person_looks(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, who: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, fail)
    with pytest.raises(FLSplitError, match=f"{who}.*: the disk is full: make room there and start again"):
        run_app(tmp_path, "x", nodes=2, **{"train.steps": 1, "num-server-rounds": 1, "data.max-length": 32})
