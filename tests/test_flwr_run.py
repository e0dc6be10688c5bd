"""The app through Flower itself: its own SuperLink, Ray, and the status that `flwr run` does not tell."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A simulation SuperLink of this test's own; yields the environment in which `flwr` uses it."""
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    log = (tmp_path / "superlink.log").open("w")
    command = ["--insecure", "--simulation", "--port", str(port), "--disable-runtime-dependency-installation"]
    process = subprocess.Popen(
        [BIN / "flower-superlink", *command], cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_until_healthy(port, process)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                raise RuntimeError("the SuperLink stopped") from None
            time.sleep(0.5)
    raise RuntimeError("the SuperLink did not come up")


def flwr(environment: dict[str, str], *arguments: str) -> Any:
    done = subprocess.run([BIN / "flwr", *arguments], env=environment, capture_output=True, text=True, timeout=120)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"flwr {arguments[0]} said: {done.stdout}{done.stderr}") from None


def run_to_the_end(environment: dict[str, str], app: Path, **config: Any) -> dict[str, Any]:
    """Submit a run and wait for it; returns what `flwr ls` says of it."""
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    federation = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    submitted = flwr(
        environment, "run", str(app), "test", "-c", pairs, "--federation-config", federation, "--format", "json"
    )
    if not submitted["success"]:
        raise RuntimeError(f"flwr run said: {submitted}")
    log = [BIN / "flwr", "log", str(submitted["run-id"]), "test"]
    subprocess.run(log, env=environment, capture_output=True, timeout=900)  # it ends with the run
    for _ in range(60):
        runs = flwr(environment, "ls", "test", "--run-id", str(submitted["run-id"]), "--format", "json")["runs"]
        status: dict[str, Any] = runs[0]
        if status["status"].startswith("finished"):
            return status
        time.sleep(1)
    raise RuntimeError("the run did not end")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A copy of the app, as a user's checkout."""
    target = tmp_path / "app"
    own = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", "shared", "*.fab", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=own)
    return target


def test_a_run_completes_and_a_wrong_one_fails_with_its_reason(
    superlink: dict[str, str], app: Path, demo_model: Path, tmp_path: Path
) -> None:
    short = {"num-server-rounds": 2, "train.steps": 2, "data.max-length": 48, "data.holdout": 0.02}
    done = run_to_the_end(superlink, app, **short, **{"run.dir": str(tmp_path), "run.name": "x"})
    assert done["status"] == "finished:completed", json.dumps(done)
    entries = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [(e["round"], e.get("partition-id")) for e in entries] == [
        (1, 0), (1, 1), (1, None), (2, 0), (2, 1), (2, None),
    ]  # fmt: skip
    for node in "01":
        assert (tmp_path / "x" / "nodes" / node / "adapter" / "adapter_model.safetensors").is_file()

    wrong = run_to_the_end(superlink, app, **{"split.bottom-layers": 7, "run.dir": str(tmp_path), "run.name": "y"})
    assert wrong["status"] == "finished:failed"
    assert "leave no trunk" in json.dumps(wrong)
