"""What a run and its nodes keep on disk, written so that a kill at any moment loses no finished round.

    <run.dir>/<run.name>/                 the server's
        run.json                          configuration, versions, identity of the run
        metrics.jsonl                     one object per node and round, and one per round
        checkpoints/round-0003/           a finished round: shared.safetensors, and server.safetensors, its optimizer
        nodes/<partition-id>/             a node's, in simulation; on a deployed node <out-dir>/<run.name>/
            adapter/                      the PEFT export
            state/<run id>/round-0003/    adapter, optimizer and surrogate as safetensors: private
            examples/                     the prepared examples: private

A round's folder is written under another name and renamed when complete.
"""

import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fl_split.config import RunConfig, Scalar
from fl_split.errors import NodeStateError

_TENSORS = ("adapter", "optimizer", "surrogate", "surrogate_optimizer")  # of SavedRound, a file each
_KEPT_ROUNDS = 2  # the server may have lost the last one, and then asks for it again
Quality = dict[str, float]  # on held-out examples: `loss`, and of a classifier `accuracy` and `macro_f1`
_MAY_CHANGE = ("num-server-rounds", "run.", "trunk.", "aggregation.min-nodes")
_MAY_NOT = ("trunk.wire-dtype",)  # what the trunk is given, so the numbers that come out
_MAY_NOT_WITH_DP = ("aggregation.min-nodes",)  # the noise of a node's part, which epsilon counts on


def cache_folder() -> Path:
    """Where things are kept that can be had again: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``fl-split``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl-split"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content; a reader sees all of the old or all of the new."""
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


class Rounds:
    """Named tensors of finished rounds, one folder a round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self) -> list[int]:
        """Numbers of the rounds at hand, ascending."""
        names = (re.fullmatch(r"round-(\d+)", p.name) for p in self._folder.glob("round-*"))
        return sorted(int(match[1]) for match in names if match)

    def save(self, number: int, files: Mapping[str, dict[str, Tensor]], keep: int) -> None:
        """Add a round, or replace it, and forget all but the newest `keep` up to it."""
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

    def load(self, number: int, name: str) -> dict[str, Tensor]:
        """One file of a finished round."""
        return load_file(self._path(number) / f"{name}.safetensors")

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}"


@dataclass(frozen=True)
class SavedRound:
    """What a node keeps of a finished round, for itself; round 0 is the start."""

    number: int
    adapter: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    surrogate: dict[str, Tensor] = field(default_factory=dict)  # empty unless it is distilled
    surrogate_optimizer: dict[str, Tensor] = field(default_factory=dict)
    falls: list[float] = field(default_factory=list)  # of the loss by the bottom's update, one a round
    quality: dict[str, Quality] = field(default_factory=dict)  # on held-out examples: `base`, and `after` that round


class NodeFolder:
    """A node's private results. Nothing in here is read by anybody but the node."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.adapter = root / "adapter"
        self.rounds = Rounds(root / "state" / run_id)

    def load_before(self, server_round: int) -> SavedRound | None:
        """The newest round before `server_round`; None at the start.

        Raises:
            NodeStateError: Later rounds are at hand: a server loses one round at most.
        """
        finished = self.rounds.finished()
        if finished and max(finished) > server_round:
            raise NodeStateError(
                f"this node has finished round {max(finished)} and is asked for round {server_round}: the server's "
                "run folder is older than the node's; start a run with another run.name"
            )
        before = [n for n in finished if n < server_round]
        if not before:
            return None
        number = before[-1]
        files = {name: self.rounds.load(number, name.replace("_", "-")) for name in _TENSORS}
        numbers = self.rounds.load(number, "numbers")
        falls = numbers.pop("falls").tolist()
        quality: dict[str, Quality] = {}
        for key, value in numbers.items():
            when, _, name = key.partition("|")
            quality.setdefault(when, {})[name] = value.item()
        return SavedRound(number, **files, falls=falls, quality=quality)

    def save(self, saved: SavedRound) -> None:
        """Keep what a round has trained."""
        files = {name.replace("_", "-"): getattr(saved, name) for name in _TENSORS}
        numbers: dict[str, Any] = {"falls": saved.falls}
        numbers |= {f"{when}|{name}": x for when, values in saved.quality.items() for name, x in values.items()}
        files["numbers"] = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        self.rounds.save(saved.number, files, keep=_KEPT_ROUNDS)


@dataclass
class RunFolder:
    """The server's record of a run."""

    root: Path
    run_id: str
    num_finished: int

    @classmethod
    def open(cls, config: RunConfig, versions: Mapping[str, str]) -> "RunFolder":
        """Begin a run, or go on with one.

        Raises:
            NodeStateError: The name is taken and ``run.resume`` is not set, or the run to go on with had another
                configuration.
        """
        name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
        root = config.run.root / name
        about = root / "run.json"
        if not about.exists():
            run_id = uuid.uuid4().hex
            write_atomic(about, _dump({"run-id": run_id, "config": config.to_flat(), "versions": dict(versions)}))
            return cls(root, run_id, 0)
        if not config.run.resume:
            raise NodeStateError(
                f"there is a run in {root}: set run.resume=true to go on with it, or choose another run.name"
            )
        saved = json.loads(about.read_text())
        _check_same(saved["config"], config.to_flat())
        run = cls(root, saved["run-id"], 0)
        run.num_finished = max(run._rounds.finished(), default=0)
        write_atomic(about, _dump({**saved, "config": config.to_flat(), "versions": dict(versions)}))
        write_atomic(run.metrics, "".join(f"{json.dumps(m)}\n" for m in run.read_metrics()))
        return run

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def _rounds(self) -> Rounds:
        return Rounds(self.root / "checkpoints")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Metrics of the finished rounds, oldest first."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a kill cut this line off: its round did not finish
                continue
            if entry["round"] <= self.num_finished:
                found.append(entry)
        return found

    def finish_round(
        self,
        server_round: int,
        entries: list[dict[str, Any]],
        shared: dict[str, Tensor],
        server_state: dict[str, Tensor] | None = None,
    ) -> None:
        """Record a round; it counts as finished from the moment that this returns."""
        with self.metrics.open("a") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        files = {"shared": shared, "server": server_state or {}}
        self._rounds.save(server_round, files, keep=_KEPT_ROUNDS)
        self.num_finished = server_round

    def shared(self) -> dict[str, Tensor]:
        """The shared adapter weights after the last finished round, by name in order; empty at the start."""
        return dict(sorted(self._rounds.load(self.num_finished, "shared").items())) if self.num_finished else {}

    def server_state(self) -> dict[str, Tensor]:
        """What the server's own optimizer remembered then."""
        return self._rounds.load(self.num_finished, "server") if self.num_finished else {}


def _check_same(saved: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    fixed = _MAY_NOT if now.get("dp.mode", "off") == "off" else _MAY_NOT + _MAY_NOT_WITH_DP
    changed = [k for k in now if saved.get(k) != now[k] and (k in fixed or not k.startswith(_MAY_CHANGE))]
    if changed:
        raise NodeStateError(
            "cannot resume with another configuration: "
            + ", ".join(f"{k} was {saved.get(k)!r} and is {now[k]!r}" for k in changed)
            + "; restore these, or choose another run.name"
        )


def _dump(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
