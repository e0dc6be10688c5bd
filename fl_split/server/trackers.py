"""Trackers that a run's metrics go to as well as to its metrics.jsonl: `report.to`, server side.

What they get is what the file has: numbers of nodes and rounds. TensorBoard and Trackio write to this machine; MLflow
and Weights & Biases go where their own settings say, which may be another one.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from fl_split.config import RunConfig
from fl_split.errors import ConfigError
from fl_split.server.run_folder import RunFolder

Send = Callable[[int, dict[str, float]], None]  # a round's number, and its numbers by name
PROJECT = "fl-split"


def open_trackers(run: RunFolder, stack: ExitStack) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    """Start what `report.to` names; `stack` closes it.

    Returns:
        What takes a round's entries.

    Raises:
        ConfigError: A package is not installed.
    """
    sends = [_OPEN[name](run, stack) for name in run.config.report.names]

    def send(entries: Iterable[Mapping[str, Any]]) -> None:
        entries = list(entries)
        for each in sends:
            each(int(entries[0]["round"]), flatten(entries))

    return send


def flatten(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """A round's finite numbers by names such as ``node-0/train-loss`` and ``all/train-loss``."""
    found = {}
    for entry in entries:
        who = f"node-{entry['partition-id']}" if "partition-id" in entry else "all"
        for key, value in entry.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and key not in ("round", "node", "partition-id"):
                found[f"{who}/{key}"] = float(value)
    return found


def _package(name: str, module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"report.to={name!r} needs a package that is not installed ({error.name}), where the ServerApp runs: "
            f"pip install {install}"
        ) from None


def _tensorboard(run: RunFolder, stack: ExitStack) -> Send:
    module = _package("tensorboard", "torch.utils.tensorboard", "tensorboard")
    writer = module.SummaryWriter(str(run.root / "tensorboard"))
    stack.callback(writer.close)

    def send(number: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return send


def _trackio(run: RunFolder, stack: ExitStack) -> Send:
    trackio = _package("trackio", "trackio", "trackio")
    trackio.init(project=PROJECT, name=run.root.name, config=_about(run.config), resume="allow")
    stack.callback(trackio.finish)
    return lambda number, values: trackio.log(values, step=number)


def _mlflow(run: RunFolder, stack: ExitStack) -> Send:
    mlflow = _package("mlflow", "mlflow", "mlflow")
    mlflow.set_experiment(PROJECT)
    stack.enter_context(mlflow.start_run(run_name=run.root.name))
    mlflow.log_params(_about(run.config))
    return lambda number, values: mlflow.log_metrics(values, step=number)


def _wandb(run: RunFolder, stack: ExitStack) -> Send:
    wandb = _package("wandb", "wandb", "wandb")
    wandb.init(project=PROJECT, name=run.root.name, id=run.run_id, resume="allow", config=_about(run.config))
    stack.callback(wandb.finish)
    return lambda number, values: wandb.log(values, step=number)


_OPEN: dict[str, Callable[[RunFolder, ExitStack], Send]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def _about(config: RunConfig) -> dict[str, Any]:
    """Leave paths out of a run's configuration: they say where data lies."""
    return {key: value for key, value in config.to_flat().items() if not str(value).startswith(("/", "~"))}
