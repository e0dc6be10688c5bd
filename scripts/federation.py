"""The processes of a federation on one machine, each as institutions run it; see `local_federation.py`."""

import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
MARK = "FL_SPLIT_LOCAL_FEDERATION"  # in the environment of every process, children of Flower's included
SESSION_S = 75  # a SuperLink takes a killed SuperNode back once its session, up to 60 s, is over
sys.path.insert(0, str(ROOT))

from fl_split import demo  # noqa: E402
from fl_split.config import Scalar  # noqa: E402
from fl_split.errors import FLSplitError  # noqa: E402
from fl_split.files import write_atomic  # noqa: E402
from fl_split.node.replicas import Credentials  # noqa: E402
from fl_split.tools.certificates import make_authority, make_node_key, make_server_certificate  # noqa: E402
from fl_split.tools.watch import ping  # noqa: E402
from fl_split.trunk.access import add_token  # noqa: E402


class FederationError(FLSplitError):
    """A process that did not come up, or a run that did not complete."""


class Part:
    """One process of the federation, in a process group of its own; its log is kept over restarts."""

    def __init__(self, name: str, command: Sequence[str | Path], home: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, home / f"{name}.log"
        self._command, self._home, self._environment = [str(word) for word in command], home, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it anew."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self._process.pid if self._process else -1

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise unless it runs.

        Raises:
            FederationError: With the end of its log.
        """
        if not self.running():
            raise FederationError(f"{self.name} has stopped; the end of {self.log}:\n{self.tail()}")

    def tail(self, num_lines: int = 15) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-num_lines:])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the whole group, and wait for the process after SIGKILL."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass
        if number == signal.SIGKILL:
            self._process.wait()


class Federation:
    """SuperLink, SuperNodes and trunk replicas on this machine; a context that leaves nothing running.

    Args:
        folder: Where everything goes; made if need be. Keys that are in it from an earlier time are used again.
        data: One file, folder or pattern per node.
        num_replicas: Of the trunk; of each, if there are two.
        in_shares: There is a second trunk, as of another operator, for `surrogate.kind = "shares"`.
        secure: Nodes know each other by key, and share nothing but masked (`aggregation.secure`).
        warm: Nodes have executors with libraries loaded (`fl_split.node.executor`), not Flower's own.
        trunk: Keys of the trunk's configuration, such as ``{"model.name": "demo"}``.
        node: More keys of every node's configuration.
        environment: More variables for all processes.
    """

    def __init__(
        self,
        folder: Path,
        data: Sequence[Path],
        *,
        num_replicas: int = 2,
        in_shares: bool = False,
        secure: bool = False,
        warm: bool = True,
        trunk: Mapping[str, Scalar] | None = None,
        node: Mapping[str, Scalar] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.data, self.num_nodes = folder, list(data), len(data)
        self._warm, self._secure, self._ask_again = warm, secure, 0.0
        self._trunks = {"trunk": "tokens.json"}  # names of keys and certificates, and of the files of tokens
        if in_shares:
            self._trunks["trunk-share"] = "share-tokens.json"
        self._mark = f"{folder}:{secrets.token_hex(4)}"
        self._environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **(environment or {}),
            MARK: self._mark,
        }
        self._keys = folder / "keys"
        for name in ("keys", "superlink", "trunk", "user", *(f"node-{i}" for i in range(self.num_nodes))):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")
        self._make_keys()
        of_trunks = num_replicas * len(self._trunks)
        ports = free_ports(1 + of_trunks + self.num_nodes)
        self._superlink_port, *ports = ports
        places = [f"{HOST}:{port}" for port in ports[:of_trunks]]
        self.trunk_address, self.share_address = ",".join(places[:num_replicas]), ",".join(places[num_replicas:])
        self.superlink = self._make_superlink()
        self.replicas = [
            self._make_replica(i, [*self._trunks][i // num_replicas], port, trunk or {})
            for i, port in enumerate(ports[:of_trunks])
        ]
        self.nodes = [self._make_node(i, port, node or {}) for i, port in enumerate(ports[of_trunks:])]
        self.executors = [self._make_executor(i, port) for i, port in enumerate(ports[of_trunks:])]
        write_atomic(
            folder / "user" / "config.toml",
            f'[superlink]\ndefault = "local-federation"\n\n[superlink.local-federation]\n'
            f'address = "{HOST}:{self._superlink_port}"\nroot-certificates = "{self._keys / "ca.crt"}"\n',
        )

    # ------------------------------------------------------------------------------------------------- what there is

    def _make_keys(self) -> None:
        if not (self._keys / "ca.crt").exists():
            make_authority(self._keys)
        for server in ("superlink", *self._trunks):
            if not (self._keys / f"{server}.crt").exists():
                make_server_certificate(self._keys, server, [HOST])
        for i in range(self.num_nodes):
            home = self.folder / f"node-{i}"
            if not (home / "supernode").exists():
                make_node_key(home / "supernode")
            for name, tokens in self._trunks.items():
                if not (home / f"{name}.token").exists():
                    token = add_token(self._keys / tokens, f"node-{i}", None)
                    write_atomic(home / f"{name}.token", token + "\n")
        public = [(self.folder / f"node-{i}" / "supernode.pub").read_text() for i in range(self.num_nodes)]
        write_atomic(self._keys / "institutions.pub", "".join(line.strip() + "\n" for line in public))

    def _make_superlink(self) -> Part:
        home, keys = self.folder / "superlink", self._keys
        command = [
            BIN / "flower-superlink",
            *("--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "superlink.crt"),
            *("--ssl-keyfile", keys / "superlink.key", "--enable-supernode-auth"),
            *(
                "--host",
                HOST,
                "--port",
                str(self._superlink_port),
            ),  # its state in memory: SQLite locks on busy machines
            "--disable-runtime-dependency-installation",
        ]
        return Part("superlink", command, home, {**self._environment, "FLWR_HOME": str(home / "flwr")})

    def _make_replica(self, number: int, name: str, port: int, changes: Mapping[str, Scalar]) -> Part:
        keys = self._keys
        values: dict[str, Scalar] = {
            "server.host": HOST,
            "server.port": port,
            "server.gradient-shares": len(self._trunks) > 1,
            "security.cert": str(keys / f"{name}.crt"),
            "security.key": str(keys / f"{name}.key"),
            "security.tokens": str(keys / self._trunks[name]),
            "metrics.port": 0,
            **changes,
        }
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        command = [sys.executable, "-m", "fl_split.cli", "trunk", "serve", *sets]
        return Part(f"trunk-{number}", command, self.folder / "trunk", self._environment)

    def _make_node(self, number: int, port: int, changes: Mapping[str, Scalar]) -> Part:
        home = self.folder / f"node-{number}"
        values: dict[str, Scalar] = {
            "partition-id": number,
            "num-partitions": self.num_nodes,
            "data-path": str(self.data[number]),
            "out-dir": str(home / "out"),
            "trunk-address": self.trunk_address,
            "trunk-ca": str(self._keys / "ca.crt"),
            "trunk-token-file": str(home / "trunk.token"),
        }
        if self.share_address:
            values |= {
                "trunk-share-address": self.share_address,
                "trunk-share-ca": str(self._keys / "ca.crt"),
                "trunk-share-token-file": str(home / "trunk-share.token"),
                "allow-gradient-shares": True,
            }
        if self._secure:
            values |= {"secure-key": str(home / "supernode"), "secure-peers": str(self._keys / "institutions.pub")}
        values |= changes
        write_atomic(home / "node.toml", "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        command = [
            BIN / "flower-supernode",
            *("--root-certificates", self._keys / "ca.crt", "--superlink", f"{HOST}:{self._superlink_port}"),
            *("--auth-supernode-private-key", home / "supernode", "--host", HOST, "--port", str(port)),
            *("--node-config", home / "node.toml", "--isolation", "process" if self._warm else "subprocess"),
        ]
        return Part(f"node-{number}", command, home, {**self._environment, "FLWR_HOME": str(home / "flwr")})

    def _make_executor(self, number: int, port: int) -> Part:
        command = [sys.executable, "-m", "fl_split.cli", "executor", f"{HOST}:{port}"]
        home = self.folder / f"node-{number}"
        return Part(f"executor-{number}", command, home, {**self._environment, "FLWR_HOME": str(home / "flwr")})

    # --------------------------------------------------------------------------------------------------- up and down

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FederationError(f"another federation runs in {self.folder}: end it, or use another folder") from None
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._lock.release()

    def _start(self) -> None:
        for part in (self.superlink, *self.replicas):
            part.start()
        _wait("the SuperLink", self._superlink_answers, self.superlink)
        for i in range(self.num_nodes):
            public = self.folder / f"node-{i}" / "supernode.pub"
            self.flwr("supernode", "register", str(public), "local-federation", "--name", f"node-{i}")
        for node in self.nodes:
            node.start()
        for executor in self.executors if self._warm else ():
            executor.start()
        for number, replica in enumerate(self.replicas):
            _wait(replica.name, lambda number=number: self.replica_serves(number), replica, timeout_s=300)
        self.wait_for_nodes()

    @property
    def parts(self) -> list[Part]:
        """All processes that are to run."""
        return [*self.nodes, *(self.executors if self._warm else ()), *self.replicas, self.superlink]

    def _superlink_answers(self) -> bool:
        context = ssl.create_default_context(cafile=self._keys / "ca.crt")
        try:
            with urllib.request.urlopen(f"https://{HOST}:{self._superlink_port}/health", timeout=2, context=context):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def replica_serves(self, number: int) -> bool:
        """Whether a replica of the trunk would answer calls."""
        address = [*self.trunk_address.split(","), *self.share_address.split(",")][number]
        try:
            return ping(address, Credentials(ca=str(self._keys / "ca.crt")), 2.0)[0] == "SERVING"
        except FLSplitError:
            return False

    def wait_for_nodes(self, timeout_s: float = 2 * SESSION_S) -> None:
        """Wait until all nodes are online; one that is refused because it was killed a moment ago is started again.

        Raises:
            FederationError: They did not come.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            listed = self.flwr("supernode", "ls", "local-federation")["nodes"]
            if sum(entry["status"] == "online" for entry in listed) >= self.num_nodes:
                if all(node.running() for node in self.nodes):
                    return
            for node in self.nodes:
                if not node.running() and time.monotonic() > deadline:
                    node.check()
                if not node.running():  # exit code 305: its old session is not over yet
                    node.start()
            for executor in self.executors if self._warm else ():
                if not executor.running():
                    executor.start()
            if time.monotonic() > deadline:
                raise FederationError(
                    f"not all nodes came online within {timeout_s:g} s; see the logs in {self.folder}"
                )
            time.sleep(3)

    def kill_node(self, number: int) -> None:
        """Kill -9 a SuperNode with its executor and what it runs."""
        self.nodes[number].kill()
        self.executors[number].kill()

    def server_app(self) -> psutil.Process | None:
        """The ServerApp's process, if a run is under way."""
        found = [p for p in self.processes() if any(Path(word).name == "flwr-serverapp" for word in _words(p))]
        return found[0] if found else None

    def processes(self) -> list[psutil.Process]:
        """Every process of this federation that runs, found by a mark in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # of somebody else, or just gone
        return found

    def _stop(self) -> None:
        parts = self.parts
        for part in parts:
            part.kill(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            for part in parts:
                part.running()  # reaps it
            time.sleep(0.2)
        for process in self.processes():  # Flower starts some in sessions of their own
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for part in parts:
            part.kill()

    # ---------------------------------------------------------------------------------------------------------- runs

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What `flwr` answers, as JSON.

        Raises:
            FederationError: It failed.
        """
        command = [BIN / "flwr", *arguments, "--format", "json"]
        environment = {**self._environment, "FLWR_HOME": str(self.folder / "user")}
        done = subprocess.run(
            command, env=environment, cwd=self.folder / "user", capture_output=True, text=True, timeout=120
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"success": False, "error-message": f"{done.stdout}{done.stderr}"}
        if not answer.get("success"):
            raise FederationError(f"flwr {' '.join(arguments[:2])}: {answer.get('error-message')}")
        return answer

    def run_config(self, changes: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """What a run is told."""
        return {
            "run.dir": str(self.folder / "server"),
            "trunk.address": self.trunk_address,
            **({"trunk.share-address": self.share_address, "surrogate.kind": "shares"} if self.share_address else {}),
            **({"aggregation.secure": True} if self._secure else {}),
            "aggregation.min-nodes": self.num_nodes,
            **changes,
        }

    def submit(self, changes: Mapping[str, Scalar]) -> str:
        """Start a run with keys of its configuration; returns Flower's number of it."""
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in self.run_config(changes).items())
        return str(self.flwr("run", str(ROOT), "local-federation", "-c", config)["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Of a run: such as ``finished:completed``, and why it failed."""
        run = self.flwr("ls", "local-federation", "--run-id", run_id)["runs"][0]
        return run["status"], str(run.get("status-details") or "")

    def wait(
        self, run_id: str, timeout_s: float = 86_400, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[str, str]:
        """Wait for the end of a run; returns its last status. Calls `meanwhile` every few seconds.

        Raises:
            FederationError: It did not end, or a process of the federation did.
        """
        deadline = time.monotonic() + timeout_s
        while (status := self.end_of(run_id)) is None:
            for part in self.parts:
                part.check()
            if time.monotonic() > deadline:
                raise FederationError(f"the run did not end within {timeout_s:g} s; see the logs in {self.folder}")
            meanwhile()
            time.sleep(1)
        meanwhile()
        return status

    def end_of(self, run_id: str) -> tuple[str, str] | None:
        """The status of a run that has ended, else None; asks `flwr`, which costs seconds of CPU, but rarely."""
        if self.server_app() is not None or time.monotonic() < self._ask_again:
            return None
        status = self.status(run_id)
        self._ask_again = time.monotonic() + 5
        return status if status[0].startswith("finished") else None


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def demo_data(folder: Path, number: int) -> list[Path]:
    """Write the demo's examples for any number of nodes: two styles, other patients each."""
    files = []
    for i in range(number):
        institution = demo.INSTITUTIONS[i % len(demo.INSTITUTIONS)]
        rows = demo.private_examples(institution, seed=i // len(demo.INSTITUTIONS))
        files.append(folder / f"node-{i}" / "data.jsonl")
        write_atomic(files[-1], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _wait(what: str, ready: Callable[[], bool], part: Part, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        part.check()
        if time.monotonic() > deadline:
            raise FederationError(f"{what} was not ready within {timeout_s:g} s; the end of {part.log}:\n{part.tail()}")
        time.sleep(0.5)
