import subprocess
import sys
from typing import Any

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec, SubprocessExecutor

from fl_split.errors import ConfigError
from fl_split.node import executor


class Recording(executor.ForkExecutor):
    """Starts nothing."""

    def _start(self, arguments: Any) -> None:
        self.started = list(arguments)


def spec(**changes: Any) -> ExecutionSpec:
    values: dict[str, Any] = {
        "task_type": TaskType.CLIENT_APP,
        "runtime_api_address": "127.0.0.1:1",
        "token": "t",
        "insecure": True,
        "root_certificates_path": None,
        "runtime_dependency_install": False,
        "parent_pid": 7,
        "suppress_output": False,
        "task_id": 1,
    }
    return ExecutionSpec(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"insecure": False, "root_certificates_path": "/ca"},
        {"parent_pid": None, "runtime_dependency_install": True},
    ],
)
def test_a_fork_is_told_what_flowers_own_process_is_told(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    SubprocessExecutor().launch(spec(**changes))
    ours = Recording()
    ours.launch(spec(**changes))
    assert commands == [["flwr-clientapp", *ours.started]]


def test_other_tasks_are_processes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    ours = Recording()
    ours.launch(spec(task_type=TaskType.SERVER_APP))
    assert ours.started == [] and commands[0][0] == "flwr-serverapp"


def test_flowers_loop_is_given_this_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def loop(**arguments: Any) -> None:
        seen.update(arguments, executor=superexec.get_executor("subprocess", executor_config=None))

    monkeypatch.setattr(executor, "ForkExecutor", Recording)
    monkeypatch.setattr(superexec, "run_superexec", loop)
    monkeypatch.setattr(superexec, "get_executor", superexec.get_executor)  # put back afterwards
    for name in ("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "1")
    executor.serve("127.0.0.1:1", None)
    assert isinstance(seen["executor"], Recording)
    assert (seen["runtime_api_address"], seen["insecure"]) == ("127.0.0.1:1", True)


@pytest.mark.parametrize("address", ["127.0.0.1", ":9094", "127.0.0.1:", "http://127.0.0.1"])
def test_an_address_without_a_port_is_refused_rather_than_tried_for_ever(address: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port: expected the SuperNode's --host and --port"):
        executor.serve(address, None)


def test_a_message_runs_the_submitted_code_not_the_executors() -> None:
    script = (
        "import sys, fl_split.node.executor as e\n"
        "import flwr.supernode.cli.flwr_clientapp\n"
        "app = sys.modules['flwr.supernode.cli.flwr_clientapp']\n"  # the package's attribute is the function
        "app.flwr_clientapp = lambda: print(sys.argv[1:], [n for n in sys.modules if n.startswith('fl_split')])\n"
        "e._run_client_app(['--token', 't'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "['--token', 't'] []"
