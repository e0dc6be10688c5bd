#!/usr/bin/env python3
"""Bring up a whole federation on this machine from nothing, run it, and take it down.

    python scripts/local_federation.py                                      # the demo: three nodes, two trunk replicas
    python scripts/local_federation.py --model ~/models/m --data '~/data/*.jsonl' -c 'train.steps=100'

Every part is a process of its own, as institutions run it (docs/operator.md, docs/institution.md): TLS everywhere,
SuperNode authentication, a trunk token, data path, out path and FLWR_HOME for each node. All listen on 127.0.0.1, on
free ports. Certificates, keys, logs and results lie in one folder. Whatever ends the script, Ctrl-C included, ends all
processes.
"""

import argparse
import glob
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation import Federation, FederationError, demo_data

from fl_split.config import Scalar, read_values
from fl_split.errors import FLSplitError


def main() -> int:
    """Exit code 0 if the run completed."""
    options = _parser().parse_args()
    signal.signal(signal.SIGINT, _interrupt)  # ignored where a shell has put the script into the background
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    folder = Path(options.folder).expanduser().resolve()
    try:
        data = _find_data(options.data) if options.data else demo_data(folder, options.nodes)
        return _run(options, folder, data)
    except FLSplitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: everything has been stopped; run.resume=true goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="~/fl-split/local-federation", help="where everything goes")
    parser.add_argument("--nodes", type=int, default=3, help="institutions of the demo (default: 3)")
    parser.add_argument("--replicas", type=int, default=2, help="of the trunk (default: 2)")
    parser.add_argument(
        "--operators",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: a second trunk, and gradients in shares (default: 1)",
    )
    parser.add_argument("--data", help="a pattern of .jsonl, .csv or .parquet files: one node for each file")
    parser.add_argument("--model", default="demo", help="demo, an absolute or ~ path, or a Hugging Face id")
    parser.add_argument("--bottom-layers", type=int, default=2, help="of run and trunk (default: 2)")
    parser.add_argument("--top-layers", type=int, default=2, help="of run and trunk (default: 2)")
    parser.add_argument("-c", "--run-config", action="append", default=[], help="as of 'flwr run', merged key by key")
    parser.add_argument(
        "--cold", action="store_true", help="Flower's own executors: libraries are imported every round"
    )
    parser.add_argument("--stay", action="store_true", help="submit no run, and stay up until Ctrl-C")
    return parser


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _find_data(pattern: str) -> list[Path]:
    files = sorted(Path(name).resolve() for name in glob.glob(str(Path(pattern).expanduser())))
    if not files:
        raise FederationError(f"--data {pattern!r} matches no file: give a pattern of the institutions' files, quoted")
    return files


def _run(options: argparse.Namespace, folder: Path, data: list[Path]) -> int:
    split = {"bottom-layers": options.bottom_layers, "top-layers": options.top_layers}
    trunk = {"model.name": options.model, **{f"model.{key}": value for key, value in split.items()}}
    changes: dict[str, Scalar] = {"model.name": options.model}
    changes |= {f"split.{key}": value for key, value in split.items()} | read_values(None, options.run_config)
    print(f"folder: {folder}\nstarting a SuperLink, {options.replicas} trunk replicas and {len(data)} SuperNodes ...")
    with Federation(
        folder,
        data,
        num_replicas=options.replicas,
        in_shares=options.operators == 2,
        warm=not options.cold,
        trunk=trunk,
    ) as federation:
        if options.stay:
            print(f"up. In another shell:\n  export FLWR_HOME={folder}/user FLWR_DISABLE_UPDATE_CHECK=1")
            of_run = federation.run_config(changes)
            pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in of_run.items())
            print(f"  flwr run . local-federation --stream -c '{pairs}'\nCtrl-C stops everything.")
            signal.pause()
        changes = {"run.name": time.strftime("%Y%m%d-%H%M%S"), **changes}
        started = time.time()
        run_id = federation.submit(changes)
        print(f"run {run_id} is under way; its log: {federation.superlink.log}")
        status, reason = federation.wait(run_id, meanwhile=_follow(folder / "server", started))
    if status != "finished:completed":
        print(f"error: the run ended as {status}: {reason or 'see the logs'}", file=sys.stderr)
        return 1
    print("completed; everything has been stopped")
    for i in range(len(data)):
        for adapter in (folder / f"node-{i}" / "out").glob("*/adapter"):
            if adapter.stat().st_mtime >= started:
                print(f"  node {i}: {adapter}")
    return 0


def _follow(server: Path, started: float) -> Callable[[], None]:
    """Print each round's losses as they come; the run's folder is the one that changed since."""
    seen: set[tuple[str, Any, Any]] = set()

    def look() -> None:
        for file in server.glob("*/metrics.jsonl"):
            if file.stat().st_mtime < started:
                continue
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                key = (file.parent.name, entry["round"], entry.get("partition-id"))
                if key not in seen and "partition-id" in entry:
                    before, after = entry["heldout-loss-before"], entry["heldout-loss-after"]
                    print(f"  round {entry['round']}, node {entry['partition-id']}: {before:.3f} -> {after:.3f}")
                seen.add(key)

    return look


if __name__ == "__main__":
    sys.exit(main())
