"""Processor seconds until the process of a ClientApp has loaded the app, so many times; for `bench_rounds.py`."""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)


def load(queue: Any) -> None:
    """In a fork: what a message does before it computes."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fl_split"]:
        del sys.modules[name]
    sys.path.insert(0, ROOT)
    import flwr.supernode.cli.flwr_clientapp  # noqa: F401

    import client_app  # noqa: F401

    queue.put(time.process_time())


def forked(repeats: int) -> float:
    sys.path.insert(0, ROOT)
    from fl_split.node.executor import _LIBRARIES

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    queue = context.Queue()
    seconds = []
    for _ in range(repeats + 1):
        process = context.Process(target=load, args=(queue,))
        process.start()
        seconds.append(queue.get(timeout=600))
        process.join()
    return statistics.median(seconds[1:])  # the first one touches pages for the first time


def fresh(repeats: int) -> float:
    seconds = []
    environment = {**os.environ, "PYTHONPATH": ROOT}
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "import flwr.supernode.cli.flwr_clientapp, client_app"]
        subprocess.run(command, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


if __name__ == "__main__":
    times = int(sys.argv[1])
    print(json.dumps({"client-app-start-cpu-s/cold": fresh(times), "client-app-start-cpu-s/warm": forked(times)}))
