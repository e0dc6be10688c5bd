"""What the server keeps of a run on disk, written so that a kill at any moment loses no finished round.

    <run.dir>/<run.name>/
        run.json                          configuration, versions, identity of the run
        metrics.jsonl                     one object per node and round, and one per round
        checkpoints/round-0003/           a finished round: shared.safetensors, and server.safetensors, its optimizer
        nodes/<partition-id>/             a node's, in simulation: see `node.state`

A round's folder is written under another name and renamed when complete.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from fl_split.config import RunConfig, Scalar
from fl_split.errors import ConfigError, NodeStateError
from fl_split.files import KEPT_ROUNDS, Rounds, line_of, read_entries, write_atomic

logger = logging.getLogger(__name__)

_MAY_CHANGE = ("num-server-rounds", "run.", "report.", "trunk.", "aggregation.min-nodes")
_MAY_NOT = ("trunk.wire-dtype",)  # what the trunk is given, so the numbers that come out
_MAY_NOT_WITH_DP = ("aggregation.min-nodes",)  # the noise of a node's part, which epsilon counts on


def named(config: RunConfig) -> RunConfig:
    """The configuration with a name for the run: its own, or date and time."""
    name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


@contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
    """Hold the folder of a run of this name for this process, and give it back even if the process is killed.

    Raises:
        NodeStateError: Another run of this name is under way.
        ConfigError: The folder cannot be made.
    """
    root = config.run.root / config.run.name
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise NodeStateError(
            f"a run is under way in {root}: wait for its end ('flwr ls'), stop it ('flwr stop'), or choose another "
            "run.name"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir!r}: {root} cannot be made ({error.strerror}): set run.dir to a folder that the "
            "server can write to"
        ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass
class RunFolder:
    """The server's record of a run."""

    root: Path
    run_id: str
    num_finished: int
    config: RunConfig

    @classmethod
    def open(
        cls, config: RunConfig, versions: Mapping[str, str], given: Mapping[str, Scalar] | None = None
    ) -> "RunFolder":
        """Begin a run, or go on with one by its own configuration; a folder without a finished round is no run yet.

        Args:
            config: Of this start, with a name.
            versions: Of what runs it.
            given: The keys that a person has given; by default those that are not as they are by default.

        Raises:
            NodeStateError: The name is taken and ``run.resume`` is not set, or a key that was given is another than
                the run's.
        """
        root = config.run.root / config.run.name
        about = root / "run.json"
        finished = max(Rounds(root / "checkpoints").finished(), default=0)
        run_id = uuid.uuid4().hex
        if finished and not config.run.resume:
            raise NodeStateError(
                f"there is a run in {root}: set run.resume=true to go on with it, or choose another run.name"
            )
        if config.run.resume and not finished:
            text = "run.resume=true, but %s has no finished round: this begins the run; check run.name and run.dir"
            logger.warning(text, root)
        if finished:
            saved = json.loads(about.read_text())
            run_id, config = saved["run-id"], _resumed(saved["config"], config, given)
        run = cls(root, run_id, finished, config)
        kept = {"run-id": run_id, "config": config.to_flat(), "versions": dict(versions)}
        write_atomic(about, json.dumps(kept, indent=2) + "\n")
        if run.metrics.exists():
            write_atomic(run.metrics, "".join(line_of(entry) for entry in run.read_metrics()))
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
        return [entry for entry in read_entries(self.metrics) if entry["round"] <= self.num_finished]

    def numbers(self) -> dict[int, int]:
        """The nodes' partition-ids by Flower's ids, of the finished rounds."""
        return {entry["node"]: entry["partition-id"] for entry in self.read_metrics() if "partition-id" in entry}

    def finish_round(
        self,
        server_round: int,
        entries: list[dict[str, Any]],
        shared: dict[str, Tensor],
        server_state: dict[str, Tensor] | None = None,
    ) -> None:
        """Record a round; it counts as finished from the moment that this returns."""
        with self.metrics.open("a") as file:
            file.writelines(line_of(entry) for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        files = {"shared": shared, "server": server_state or {}}
        self._rounds.save(server_round, files, keep=KEPT_ROUNDS)
        self.num_finished = server_round

    def shared(self) -> dict[str, Tensor]:
        """The shared adapter weights after the last finished round, by name in order; empty at the start."""
        return dict(sorted(self._rounds.load(self.num_finished, "shared").items())) if self.num_finished else {}

    def server_state(self) -> dict[str, Tensor]:
        """What the server's own optimizer remembered then."""
        return self._rounds.load(self.num_finished, "server") if self.num_finished else {}


def read_run(root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What ``run.json`` says of a run, and the metrics of its finished rounds.

    Raises:
        NodeStateError: There is no run with a finished round.
    """
    finished = max(Rounds(root / "checkpoints").finished(), default=0)
    if not finished or not (root / "run.json").is_file():
        raise NodeStateError(
            f"no run with a finished round in {root}: give a run's folder, <run.dir>/<run.name> of the server, or on a "
            "node <out-dir>/<run.name>"
        )
    about: dict[str, Any] = json.loads((root / "run.json").read_text(encoding="utf-8"))
    return about, [entry for entry in read_entries(root / "metrics.jsonl") if entry["round"] <= finished]


def _resumed(saved: Mapping[str, Scalar], now: RunConfig, given: Mapping[str, Scalar] | None) -> RunConfig:
    """Take a run's own configuration, and what may change of what was given."""
    flat, default = now.to_flat(), RunConfig().to_flat()
    given = {key: value for key, value in flat.items() if value != default[key]} if given is None else given
    fixed = _MAY_NOT if saved.get("dp.mode", "off") == "off" else _MAY_NOT + _MAY_NOT_WITH_DP
    changed = [
        key
        for key, value in given.items()
        if saved.get(key, default.get(key)) != value and (key in fixed or not key.startswith(_MAY_CHANGE))
    ]
    if changed:
        raise NodeStateError(
            "cannot resume with another configuration: "
            + ", ".join(f"{key} was {saved.get(key, default.get(key))!r} and is {given[key]!r}" for key in changed)
            + "; leave these out, since the run's own configuration is used, or choose another run.name"
        )
    resumed = RunConfig.from_flat(
        {**saved, **given, **{key: flat[key] for key in ("run.name", "run.dir", "run.resume")}}
    )
    began, before = RunConfig.from_flat(saved), saved.get("aggregation.min-nodes")
    if began.is_personal != resumed.is_personal:
        raise NodeStateError(
            f"cannot resume with aggregation.min-nodes={resumed.aggregation.min_nodes}: it was {before!r}, and whether "
            "nodes train an adapter of their own beside the shared one, which aggregation.personal='auto' means from 3 "
            "nodes on, cannot change in a run"
        )
    return resumed
