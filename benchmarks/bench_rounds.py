"""What does a round cost beyond training, in both of Flower's engines, and what does one more simulated node cost?

    python benchmarks/bench_rounds.py [--only PART ...] [--quick] [--json FILE] [--seeds N ...]

Parts: start, deployment, simulation, kills; the figures of each are added to those in the file.

start: processor seconds until a ClientApp's process has loaded the app. deployment: a SuperLink, SuperNodes and a trunk
on this machine, as `scripts/local_federation.py` starts them, on the demo; once with Flower's own executors (`cold`)
and once with fl-split's (`warm`), which is also what ``round-overhead-s/deployment`` is. The overhead of a round is the
time from one finished round to the next, less the slowest node's training. Processor seconds are those of a ClientApp's
process at its end: on a shared machine they say more than the clock. simulation: Flower's engine on this machine, a
generated model, two short steps a node; the overhead is what a round takes less all nodes' training, spread over Ray's
actors; ``round-overhead-s/simulation`` is of the fewest nodes. Memory is the proportional set size (PSS) of the engine
and all its children at its highest: shared pages count once. kills: a calm run, then one for each seed with a kill -9
of a SuperNode, of a trunk replica and of the ServerApp at random moments, resumed until it is through; the trunk
computes each call by itself, so that the arrays that are left have to equal the calm run's bit for bit.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "scripts")]
from about import about, write  # noqa: E402
from federation import BIN, ROOT, Federation, demo_data, free_ports  # noqa: E402
from kills import left_arrays, mend, run_with_kills  # noqa: E402

from fl_split import demo  # noqa: E402

MB = 1e6
PARTS = ("start", "deployment", "simulation", "kills")
SHORT = {"train.steps": 10, "data.max-length": 64}
SHORTEST = {"train.steps": 2, "train.batch-size": 2, "data.max-length": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=6, help="of the deployment; the first is not timed")
    parser.add_argument("--simulated-rounds", type=int, default=4, help="of the simulations; the first is not timed")
    parser.add_argument("--nodes", type=int, default=2, help="of the deployment")
    parser.add_argument("--simulated", type=int, nargs="+", default=[2, 10, 50], help="nodes of the simulations")
    parser.add_argument(
        "--model-mb", type=int, default=100, help="of a generated model for the simulations; 0: the demo"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the kills: a run each")
    parser.add_argument("--quick", action="store_true", help="two rounds, two nodes, warm executors, no kills")
    parser.add_argument("--json", type=Path, help="write the figures here, added to those in it")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.simulated_rounds, options.simulated, options.model_mb = 2, 2, [2], 20
        options.only = [part for part in options.only if part != "kills"]
    for part in options.only:
        started, block = time.monotonic(), about(0, "flwr", "ray")
        figures = measure(part, options)
        print(f"\n{part} ({time.monotonic() - started:.0f} s)")
        for name, value in figures.items():
            print(f"  {name:44} {value:.4g}" if isinstance(value, float) else f"  {name:44} {value}", flush=True)
        write(options.json, figures | block | {f"commit/{part}": block["commit"]}, keep=True)
        print(f"  {block}", flush=True)


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    if part == "start":
        command = [sys.executable, Path(__file__).with_name("client_start.py"), "1" if options.quick else "3"]
        return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
    if part == "deployment":
        figures: dict[str, Any] = {}
        for warm in (True,) if options.quick else (False, True):
            figures |= measure_deployment(options.nodes, options.rounds, warm)
        return figures | {"round-overhead-s/deployment": figures["round-overhead-s/deployment/warm"]}
    if part == "simulation":
        return measure_simulation(options.simulated, options.simulated_rounds, options.model_mb)
    return measure_kills(options.seeds)


# ---------------------------------------------------------------------------------------------------- deployment


def measure_deployment(num_nodes: int, rounds: int, warm: bool) -> dict[str, Any]:
    kind = "warm" if warm else "cold"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Federation(folder, demo_data(folder, num_nodes), num_replicas=1, warm=warm) as federation:
            run_id = federation.submit({"run.name": "x", "num-server-rounds": rounds, **SHORT})
            with watch_client_apps(federation) as lives:
                ends = follow(folder / "server" / "x", rounds, lambda: federation.end_of(run_id))
            status = federation.wait(run_id)
            if status[0] != "finished:completed":
                raise SystemExit(f"the run ended as {status}\n{federation.superlink.tail(40)}")
        training = slowest_training(folder / "server" / "x")
    cpu = [life["cpu-s"] for life in lives.values() if life["cpu-s"] > 0.5]
    wall = [life["wall-s"] for life in lives.values() if life["cpu-s"] > 0.5]
    name = f"deployment/{kind}"
    overheads = [ends[r] - ends[r - 1] - training[r] for r in ends if r - 1 in ends]  # the first also starts the run
    return {
        f"round-overhead-s/{name}": statistics.median(overheads),
        f"round-overhead-s-spread/{name}": max(overheads) - min(overheads),
        f"training-s/{name}": statistics.median(training.values()),
        f"client-app-cpu-s/{name}": statistics.median(cpu),
        f"client-app-wall-s/{name}": statistics.median(wall),
        f"load-average/{name}": os.getloadavg()[0],
    }


def follow(run: Path, rounds: int, ended: Callable[[], object], timeout_s: float = 1200) -> dict[int, float]:
    """When each round was recorded."""
    found: dict[int, float] = {}
    deadline, over = time.monotonic() + timeout_s, False
    while len(found) < rounds and not over:
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(found)} of {rounds} rounds were done after {timeout_s:g} s")
        over = bool(ended())  # asked before the look: what was recorded until then is seen
        for path in (run / "checkpoints").glob("round-*"):
            found.setdefault(int(path.name.removeprefix("round-")), time.monotonic())
        time.sleep(0.1)
    return found


def slowest_training(run: Path) -> dict[int, float]:
    """Of each round, the longest `train-s` of a node."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train-s" in entry:
            found[entry["round"]] = max(found.get(entry["round"], 0.0), entry["train-s"])
    return found


@contextmanager
def watch_client_apps(federation: Federation) -> Iterator[dict[int, dict[str, float]]]:
    """Processor and clock seconds of every ClientApp's process, by its id; looked at five times a second."""
    lives: dict[int, dict[str, float]] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            for part in (*federation.nodes, *federation.executors):
                if part.pid < 0 or not psutil.pid_exists(part.pid):
                    continue
                try:
                    below = psutil.Process(part.pid).children(recursive=True)
                except psutil.Error:
                    continue
                for process in below:
                    note(lives, process)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lives
    finally:
        stop.set()
        thread.join()


def note(lives: dict[int, dict[str, float]], process: psutil.Process) -> None:
    try:
        words = process.cmdline()
        forked = any("forkserver" in word for word in words) and process.parent() is not None
        is_app = any(Path(word).name == "flwr-clientapp" for word in words)
        if forked and not any("forkserver" in word for word in process.parent().cmdline()):
            return  # the server of forks itself
        if is_app or forked:
            times = process.cpu_times()
            lives[process.pid] = {
                "cpu-s": times.user + times.system,
                "wall-s": time.time() - process.create_time(),
            }
    except (psutil.Error, AttributeError):
        return


def measure_kills(seeds: list[int]) -> dict[str, Any]:
    """For each seed, one kill -9 of a SuperNode, a trunk replica and the ServerApp each, at random moments."""
    calm = {**SHORT, "num-server-rounds": 3, "run.name": "calm", "aggregation.share": "top"}
    figures = {"kills": 0, "resumes": 0, "rounds-lost": 0, "arrays-different": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Federation(folder, demo_data(folder, 3), trunk={"batching.enabled": False}) as federation:
            status = federation.wait(federation.submit(calm), 900)
            if status[0] != "finished:completed":
                raise SystemExit(f"the calm run ended as {status}\n{federation.superlink.tail(40)}")
            expected = left_arrays(federation, "calm")
            for seed in seeds:
                mend(federation)
                storm = run_with_kills(federation, {**calm, "run.name": f"storm-{seed}"}, seed)
                found = left_arrays(federation, f"storm-{seed}")
                same = {n for n in expected.keys() & found.keys() if torch.equal(expected[n], found[n])}
                figures["kills"] += len(storm.kills)
                figures["resumes"] += storm.num_resumes
                figures["rounds-lost"] += storm.rounds_lost
                figures["arrays-different"] += len((expected.keys() | found.keys()) - same)
    return {**figures, "arrays-compared": len(expected) * len(seeds), "seed/kills": " ".join(map(str, seeds))}


# ---------------------------------------------------------------------------------------------------- simulation


def measure_simulation(numbers: list[int], rounds: int, model_mb: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", model_mb) if model_mb else "demo"
        for nodes in numbers:
            seconds, training, memory[nodes] = simulate(Path(scratch) / str(nodes), nodes, rounds, model)
            overheads = [a - b for a, b in zip(seconds, training, strict=True)]
            figures[f"round-s/simulation/{nodes}-nodes"] = statistics.median(seconds)
            figures[f"round-overhead-s/simulation/{nodes}-nodes"] = statistics.median(overheads)
            figures[f"round-overhead-s-spread/simulation/{nodes}-nodes"] = max(overheads) - min(overheads)
            figures[f"load-average/simulation/{nodes}-nodes"] = os.getloadavg()[0]
            figures[f"memory-mb/simulation/{nodes}-nodes"] = memory[nodes]
    few, many = min(numbers), max(numbers)
    figures["round-overhead-s/simulation"] = figures[f"round-overhead-s/simulation/{few}-nodes"]
    if many > few:
        figures["memory-per-extra-node-mb"] = (memory[many] - memory[few]) / (many - few)
    figures["model-mb"] = model_mb
    return figures


def make_model(folder: Path, megabytes: int) -> str:
    """A Llama of about this size with random weights and the demo's tokenizer: only its memory matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(demo.model_folder())
    hidden = 512
    config.hidden_size, config.intermediate_size, config.head_dim = hidden, 4 * hidden, 64
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.num_hidden_layers = max(6, round(megabytes * MB / 4 / (16 * hidden**2)))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_folder()).save_pretrained(folder)
    return str(folder)


def simulate(folder: Path, nodes: int, rounds: int, model: str) -> tuple[list[float], list[float], float]:
    """Seconds of each round but the first, of all nodes' training in it per actor, and peak memory in MB."""
    folder.mkdir()
    (port,) = free_ports(1)
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = ["--insecure", "--simulation", "--port", str(port), "--disable-runtime-dependency-installation"]
    with (folder / "superlink.log").open("wb") as log:
        superlink = subprocess.Popen(
            [BIN / "flower-superlink", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    config = {
        **SHORTEST,
        "model.name": model,
        "data.path": str(demo.data_folder() / "*.jsonl"),  # named: to another model's run the demo's are not given
        "num-server-rounds": rounds,
        "data.partitioner": "iid",
        "aggregation.min-nodes": nodes,
        "run.dir": str(folder / "runs"),
        "run.name": "x",
    }
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    resources = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={os.cpu_count()}"
    submit = [BIN / "flwr", "run", ROOT, "bench", "-c", pairs, "--federation-config", resources]
    peak, looked = [0.0], [0.0]
    try:
        for _ in range(60):  # until the SuperLink answers
            done = subprocess.run(submit, env=environment, cwd=folder, capture_output=True, text=True)
            if done.returncode == 0:
                break
            time.sleep(2)
        else:
            raise SystemExit(f"the simulation could not be started:\n{done.stdout}{done.stderr}")

        def gone() -> bool:
            if time.monotonic() > looked[0] + 0.5:  # adding up pages takes time from the run
                peak[0] = max(peak[0], proportional_mb(superlink.pid))
                looked[0] = time.monotonic()
            return superlink.poll() is not None or b"Finished task" in (folder / "superlink.log").read_bytes()

        ends = follow(folder / "runs" / "x", rounds, gone)
        if len(ends) < 2:
            said = "".join(
                file.read_text()[-3000:] for file in (folder / "superlink.log", *folder.glob("runs/x/*.log"))
            )
            raise SystemExit(f"the simulation failed:\n{said}")
    finally:
        below = psutil.Process(superlink.pid).children(recursive=True) if superlink.poll() is None else []
        os.killpg(superlink.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs([*below, psutil.Process(superlink.pid)], timeout=20)
        for process in alive:
            process.kill()
    training = total_training(folder / "runs" / "x")
    actors = min(nodes, os.cpu_count() or 1)
    timed = [r for r in ends if r - 1 in ends]
    return [ends[r] - ends[r - 1] for r in timed], [training[r] / actors for r in timed], peak[0]


def total_training(run: Path) -> dict[int, float]:
    """Of each round, `train-s` of all nodes together."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train-s" in entry:
            found[entry["round"]] = found.get(entry["round"], 0.0) + entry["train-s"]
    return found


def proportional_mb(pid: int) -> float:
    """PSS of a process and all below it."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total / MB


if __name__ == "__main__":
    main()
