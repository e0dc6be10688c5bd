"""Kill -9 parts of a federation at random moments until its run is through; used by `bench_rounds.py` and the tests."""

import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from federation import Federation  # noqa: E402

KINDS = ("node", "trunk replica", "server app")
LATEST_S = 12.0  # a kill comes up to this long after its round has begun


@dataclass
class Storm:
    """What was done to a run, and what it cost."""

    kills: list[str] = field(default_factory=list)
    num_resumes: int = 0
    rounds_lost: int = 0  # finished rounds whose record is not what it was when they finished


def run_with_kills(
    federation: Federation, config: Mapping[str, Any], seed: int, num_resumes: int = 12, timeout_s: float = 1800
) -> Storm:
    """Run to the end, with one kill of each kind at a random moment of a random round; resume whatever fails.

    Args:
        federation: Up.
        config: Of the run; has ``run.name`` and ``num-server-rounds``.
        seed: Of order and moments.
        num_resumes: At most.
        timeout_s: Of each part of the run between two resumes.
    """
    rng, storm = random.Random(seed), Storm()
    folder = federation.folder / "server" / str(config["run.name"])
    pending = rng.sample(KINDS, len(KINDS))
    rounds = sorted(rng.randrange(int(config["num-server-rounds"])) for _ in pending)  # to be finished before each kill
    records: dict[int, list[str]] = {}
    run_id = federation.submit(config)
    for attempt in range(num_resumes + 1):
        deadline = time.monotonic() + timeout_s
        while (status := federation.end_of(run_id)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run did not end within {timeout_s:g} s")
            records = {**_records(folder), **records}  # the first record of a round counts
            if pending and len(records) >= rounds[0] and federation.server_app() is not None:
                time.sleep(rng.uniform(0, LATEST_S))
                if kill(federation, pending[0], rng):
                    storm.kills.append(f"{pending.pop(0)} in round {rounds.pop(0) + 1}")
            time.sleep(1)
        records = {**_records(folder), **records}
        print(f"  attempt {attempt}: {status[0]} after {len(records)} rounds; kills so far: {storm.kills}", flush=True)
        if status[0] == "finished:completed":
            break
        mend(federation)
        storm.num_resumes += 1
        run_id = federation.submit({**config, "run.resume": True})
    final = _records(folder)
    storm.rounds_lost = sum(final.get(number) != lines for number, lines in records.items())
    return storm


def kill(federation: Federation, kind: str, rng: random.Random) -> bool:
    """Kill -9 one part; False if there was none to kill."""
    if kind == "node":
        federation.kill_node(rng.randrange(federation.num_nodes))
    elif kind == "trunk replica":
        rng.choice(federation.replicas).kill()
    else:
        app = federation.server_app()
        if app is None:
            return False
        try:
            app.kill()
        except psutil.NoSuchProcess:
            return False
    return True


def mend(federation: Federation) -> None:
    """Start what was killed, as a supervisor would."""
    for replica in federation.replicas:
        if not replica.running():
            replica.start()
    federation.wait_for_nodes()


def left_arrays(federation: Federation, run_name: str) -> dict[str, Tensor]:
    """Every array that a run has left: the nodes' adapters and what they share."""
    folder, found = federation.folder, {}
    for i in range(federation.num_nodes):
        adapter = load_file(folder / f"node-{i}" / "out" / run_name / "adapter" / "adapter_model.safetensors")
        found |= {f"node {i}: {name}": value for name, value in adapter.items()}
    newest = max((folder / "server" / run_name / "checkpoints").glob("round-*"))
    return found | {f"{newest.name}: {name}": value for name, value in load_file(newest / "shared.safetensors").items()}


def _records(folder: Path) -> dict[int, list[str]]:
    """The lines of metrics.jsonl by round, of the rounds that have finished."""
    finished = {int(path.name.removeprefix("round-")) for path in (folder / "checkpoints").glob("round-*")}
    found: dict[int, list[str]] = {}
    if not finished:
        return found
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            number = json.loads(line)["round"]
        except json.JSONDecodeError:
            continue  # cut off by a kill
        if number <= max(finished):
            found.setdefault(number, []).append(line)
    return found
