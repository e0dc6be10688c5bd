"""What the server keeps of a run on disk, written so that a kill at any moment loses no finished round.

    <run.dir>/<run.name>/
        run.json                          configuration, versions, identity of the run
        metrics.jsonl                     one object per node and round, and one per round
        checkpoints/round-0003/           a finished round: shared.safetensors, and server.safetensors, its optimizer
        nodes/<partition-id>/             a node's, in simulation: see `node.state`

A round's folder is written under another name and renamed when complete.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_split.config import RunConfig, Scalar
from fl_split.errors import NodeStateError
from fl_split.files import KEPT_ROUNDS, Rounds, write_atomic

_MAY_CHANGE = ("num-server-rounds", "run.", "trunk.", "aggregation.min-nodes")
_MAY_NOT = ("trunk.wire-dtype",)  # what the trunk is given, so the numbers that come out
_MAY_NOT_WITH_DP = ("aggregation.min-nodes",)  # the noise of a node's part, which epsilon counts on


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
        self._rounds.save(server_round, files, keep=KEPT_ROUNDS)
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
