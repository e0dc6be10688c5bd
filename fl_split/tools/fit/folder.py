"""A fit's setting, how far it is, and what it keeps on disk until it is done: a kill costs a minute of it."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fl_split.config import Task
from fl_split.errors import ConfigError
from fl_split.files import write_atomic
from fl_split.log import clock

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 60.0  # of a training's state
_SAY_EVERY_S = 15.0
_OF_TRAINING = ("lr", "steps")  # of a fit's setting


@dataclass(frozen=True)
class Fit:
    """How to fit."""

    layers: float = 2.0  # memory and compute of the surrogate, in trunk layers
    steps: int = 3000
    batch_size: int = 8
    length: int = 96  # tokens per sequence
    lr: float = 2.5e-3
    seed: int = 0
    whole: int = 0  # the trunk's first layers that stay as they are, of `layers`
    lessons: int = 1000  # recorded, and gone through again and again
    task: Task = "causal-lm"
    device: str = "cpu"
    dtype: str = "float32"  # of the teacher and of what is recorded of it


def save_tensors(file: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file; a reader, or whoever goes on after a kill, sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, unfinished, {"card": json.dumps(card or {})})
    unfinished.replace(file)


class FitFolder:
    """Parts of an unfinished fit by name, beside the file that it will write."""

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        """Begin, or go on with what a fit of the same setting left.

        What was recorded serves other rates and steps as well: then the training alone begins anew.

        Args:
            out: The file to write in the end.
            about: Model, text and setting.

        Raises:
            ConfigError: An unfinished fit of another setting is there.
        """
        self.folder = folder_of(out)
        file, text = self.folder / "about.json", json.dumps(about, indent=1)
        if file.exists():
            found = file.read_text()
            if _recorded(found) != _recorded(text):
                raise ConfigError(
                    f"{self.folder} holds an unfinished fit of another model, text or setting: go on with that one, "
                    "delete the folder, or write to another file"
                )
            if found != text:
                self.drop("fit")
            if any(self.folder.glob("*.safetensors")):
                logger.info("going on with the unfinished fit in %s", self.folder)
        write_atomic(file, text)

    def has(self, name: str) -> bool:
        """Whether a part is there, all of it."""
        return (self.folder / f"{name}.safetensors").exists()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Add a part, or replace it."""
        save_tensors(self.folder / f"{name}.safetensors", tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """All tensors of a part."""
        return load_file(self.folder / f"{name}.safetensors")

    def load_one(self, name: str, key: str) -> Tensor:
        """One tensor of a part."""
        with safe_open(self.folder / f"{name}.safetensors", "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def drop(self, pattern: str) -> None:
        """Delete parts that are needed no more."""
        for file in self.folder.glob(f"{pattern}.safetensors"):
            file.unlink()

    def close(self) -> None:
        """Delete it all: the fit is done."""
        shutil.rmtree(self.folder)


def folder_of(out: Path) -> Path:
    """Where the fit that will write `out` keeps what it has so far."""
    return out.with_name(f"{out.name}.unfinished")


def _recorded(about: str) -> dict[str, Any] | None:
    """What a fit's setting says of all that comes before its training; None if it cannot be read."""
    try:
        setting: dict[str, Any] = json.loads(about)
    except ValueError:
        return None
    return {name: value for name, value in setting.items() if name not in _OF_TRAINING}


class Saved:
    """A training of which the state is saved now and then: weights, their optimizer, and how much is done."""

    def __init__(
        self, folder: FitFolder, name: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._folder, self._name, self._parameters, self._optimizer = folder, name, parameters, optimizer
        self._saved_at = time.monotonic()

    def load(self) -> int:
        """Put the state back, if there is one; returns how much was done."""
        if not self._folder.has(self._name):
            return 0
        state = self._folder.load(self._name)
        with torch.no_grad():
            for i, parameter in enumerate(self._parameters):
                parameter.copy_(state[f"{i}"])
                prefix = f"{i}."
                own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
                self._optimizer.state[parameter] = {
                    key: t if key == "step" else t.to(parameter.device) for key, t in own.items()
                }
        return int(state["done"])

    def save(self, done: int) -> None:
        """Save the state, if it is time to."""
        if time.monotonic() < self._saved_at + _SAVE_EVERY_S:
            return
        state = {"done": torch.tensor(done)}
        for i, parameter in enumerate(self._parameters):
            state[f"{i}"] = parameter
            state |= {f"{i}.{key}": value for key, value in self._optimizer.state[parameter].items()}
        self._folder.save(self._name, state)
        self._saved_at = time.monotonic()


class Stage:
    """Says how far one stage of a fit is, and how long it will take."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._start = what, total, done
        self._started_at = time.monotonic()
        self._said_at = self._started_at

    def step(self, done: int, more: str = "") -> None:
        """Note that so many of the total are done; a line every so often, and at the end."""
        now = time.monotonic()
        if now < self._said_at + _SAY_EVERY_S and done < self._total:
            return
        self._said_at = now
        left = (now - self._started_at) / (done - self._start) * (self._total - done)
        logger.info("%s: %d of %d%s, %s left", self._what, done, self._total, more, clock(left))
