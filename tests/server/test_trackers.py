"""Trackers get what metrics.jsonl has; none is needed for a run."""

import math
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fl_split.config import RunConfig
from fl_split.errors import ConfigError
from fl_split.server.run_folder import RunFolder
from fl_split.server.trackers import flatten, open_trackers

ENTRIES = [
    {"round": 2, "time": "now", "node": 77, "name": "a", "partition-id": 0, "train-loss": 1.5, "num-examples": 3},
    {"round": 2, "time": "now", "num-nodes": 1, "train-loss": math.nan},
]
FLAT = {"node-0/train-loss": 1.5, "node-0/num-examples": 3.0, "all/num-nodes": 1.0}


def folder(tmp_path: Path, to: str) -> RunFolder:
    config = RunConfig.from_flat({"run.dir": str(tmp_path), "run.name": "mine", "report.to": to})
    return RunFolder.open(config, {})


def test_a_rounds_finite_numbers_get_names_by_node() -> None:
    assert flatten(ENTRIES) == FLAT


def test_tensorboard_has_a_point_per_number_and_round(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with ExitStack() as stack:
        open_trackers(folder(tmp_path, "tensorboard"), stack)(ENTRIES)
    events = accumulator.EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    assert {tag: (events.Scalars(tag)[0].step, events.Scalars(tag)[0].value) for tag in events.Tags()["scalars"]} == {
        name: (2, value) for name, value in FLAT.items()
    }


class Recorder(ModuleType):
    """A stand-in for a tracker's package: it writes down its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: self.calls.append((name, args, options)) or ExitStack()


@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("trackio", ["init", "log", "finish"]),
        ("mlflow", ["set_experiment", "start_run", "log_params", "log_metrics"]),
        ("wandb", ["init", "log", "finish"]),
    ],
)
def test_other_trackers_are_begun_fed_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, verbs: list[str]
) -> None:
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    with ExitStack() as stack:
        open_trackers(folder(tmp_path, f"{name}"), stack)(ENTRIES)
    assert [verb for verb, _, _ in package.calls] == verbs
    (logged,) = (call for call in package.calls if call[0] in ("log", "log_metrics"))
    assert (logged[1], logged[2]) == ((FLAT,), {"step": 2})
    assert str(tmp_path) not in str(package.calls)  # where things lie is nobody else's business


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf"report\.to='{name}' needs a package .* pip install {name}"):
        open_trackers(folder(tmp_path, name), ExitStack())


def test_an_unknown_tracker_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'excel' is none of tensorboard, trackio, mlflow, wandb"):
        RunConfig.from_flat({"report.to": "tensorboard, excel"})
    assert RunConfig.from_flat({"report.to": "tensorboard, wandb"}).report.names == ("tensorboard", "wandb")
