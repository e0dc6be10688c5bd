"""A node's executor with its libraries loaded: a message then starts in a moment, not after many seconds of imports.

Flower's SuperNode starts a process per message, which imports torch, transformers and the rest anew. Under
``flower-supernode --isolation process`` it leaves that to an executor of one's own; this one is Flower's own loop, but
starts processes as forks of a server that has imported the libraries. Each message still has a process to itself, with
the code that was submitted: of fl-split nothing is loaded beforehand.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor

from fl_split.errors import ConfigError

POLL_S = "0.1"  # Flower's own default is one second, half of which each message waits on average
_LIBRARIES = [  # what a message needs, none of which starts a thread or touches a GPU when imported
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "torch",
    "datasets",
    "peft",
    "transformers.models.auto",
    "transformers.modeling_utils",
    "transformers.tokenization_utils_tokenizers",
    "google.protobuf.runtime_version",
    "grpc_health.v1.health_pb2_grpc",
]


class ForkExecutor(SubprocessExecutor):
    """Starts ClientApps as forks; all else, such as capacity, is as in Flower's own."""

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_LIBRARIES)
        self._processes: list[ForkServerProcess] = []
        self._start([])  # starts the server: it imports now, not with the first message

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a ClientApp; the SuperNode learns from the process itself how it went."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
        if spec.insecure:
            arguments.append("--insecure")
        elif spec.root_certificates_path is not None:
            arguments += ["--root-certificates", spec.root_certificates_path]
        if spec.parent_pid is not None:
            arguments += ["--parent-pid", str(spec.parent_pid)]
        if spec.runtime_dependency_install:
            arguments.append("--allow-runtime-dependency-installation")
        self._start(arguments)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Forget processes that have ended."""
        self._processes = [process for process in self._processes if process.is_alive()]

    def _start(self, arguments: Sequence[str]) -> None:
        process = self._context.Process(target=_run_client_app, args=(list(arguments),), daemon=True)
        process.start()
        self._processes.append(process)


def _run_client_app(arguments: list[str]) -> None:
    """Turn the fork into `flwr-clientapp`."""
    if not arguments:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "fl_split"]:
        del sys.modules[name]  # the submitted code is to be used, not that of this executor
    sys.argv = ["flwr-clientapp", *arguments]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have workers
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    flwr_clientapp()


def serve(address: str, root_certificates: Path | None) -> None:
    """Run messages of the SuperNode at `address` until a signal comes.

    Args:
        address: host:port of its runtime API.
        root_certificates: PEM file, where that API speaks TLS.

    Raises:
        ConfigError: No address, or this version of Flower chooses its executor in another way.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ConfigError(
            f"{address!r} is not host:port: expected the SuperNode's --host and --port, such as 127.0.0.1:9094"
        )
    if "get_executor" not in superexec.run_superexec.__code__.co_names:  # else nobody would ask for what is set below
        raise ConfigError(
            f"Flower {version('flwr')} cannot be given an executor: expected the versions that fl-split asks for, see "
            "'fl-split doctor'; or start the SuperNode without --isolation process, which needs no executor"
        )
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", POLL_S)
    # Looking for a GPU must not make forks unable to use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    executor = ForkExecutor()
    setattr(superexec, "get_executor", lambda *_, **__: executor)  # noqa: B010  # Flower offers a choice of its own only
    superexec.run_superexec(
        runtime_api_address=address,
        insecure=root_certificates is None,
        root_certificates_path=str(root_certificates) if root_certificates else None,
        runtime_dependency_install=False,
    )
