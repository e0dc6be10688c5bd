"""What a fit will cost, said before it begins: memory and disk from shapes, time from one lesson and one step."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from fl_split.config import RunConfig
from fl_split.log import clock
from fl_split.model.family import Hole, auto_class, examine
from fl_split.model.loading import Boundaries
from fl_split.model.thin import LowRank, linears, replace
from fl_split.plan.step_memory import Live, layers_of, on_meta, step_on_meta
from fl_split.tools.fit.folder import Fit
from fl_split.tools.fit.lessons import Batches, Lesson, observe
from fl_split.tools.fit.moments import MOMENT_BATCHES, ROOM_FOR_CHOICE, Budget, thin_product
from fl_split.tools.fit.student import backward, build

logger = logging.getLogger(__name__)

_PROCESS = 600_000_000  # bytes of this process before there is any model
_HELD = 1.7  # bytes of the process for each that a step has at its peak: C's heap has holes. Measured 1.2 to 1.8
_TRIED = (256, 512)  # sides of a matrix that is cut to see how long that takes


@dataclass(frozen=True)
class Cost:
    """Bytes of a fit, by what needs them."""

    teacher: int
    start: int  # beside the teacher, while layers are cut
    lesson: int  # beside the teacher, while lessons are recorded
    student: int
    disk: int

    @classmethod
    def of(cls, config: PretrainedConfig, cut: Boundaries, fit: Fit) -> "tuple[Cost, Budget]":
        """Count them on the meta device, and what the thin layers may have.

        Raises:
            ConfigError: The budget does not lie between the smallest thin copy and the trunk itself.
            SplitError: The model cannot be split.
        """
        trunk = on_meta(config, examine(config, AutoModel), torch.float32)
        layers = layers_of(trunk, examine(config, AutoModel))
        budget = Budget.of({i: layers[i] for i in cut.trunk}, config.hidden_size, fit)
        shapes = [list(linear.values()) for linear in budget.shapes.values()]
        moments = max(sum(4 * (a * a + b * b) for a, b in layer) for layer in shapes)
        product = max(8 * (max(a, b) ** 2 + 3 * min(a, b) ** 2 + 3 * a * b) for layer in shapes for a, b in layer)
        batch = fit.batch_size * fit.length * config.hidden_size * getattr(torch, fit.dtype).itemsize
        cuts = min(ROOM_FOR_CHOICE * budget.numbers, sum((a + b) * min(a, b) for layer in shapes for a, b in layer))
        teacher, lesson = _teacher(config, cut, fit)
        cost = cls(
            teacher=teacher,
            start=moments + product + 3 * MOMENT_BATCHES * batch,
            lesson=lesson,
            student=_student(trunk, layers, cut, budget, fit),
            disk=round(4 * cuts + (4 * fit.lessons + MOMENT_BATCHES * (len(cut.trunk) + 2)) * batch),
        )
        return cost, budget

    @property
    def total(self) -> int:
        """Memory at the peak."""
        return _PROCESS + max(self.teacher + max(self.start, self.lesson), self.student)

    def say(self, device: str, folder: Path) -> None:
        """Say what memory and disk are needed, and whether the memory is there."""
        logger.info(
            "needs about %.1f GB of memory (the model %.1f; beside it the start %.1f, a lesson %.1f; then the "
            "surrogate in training %.1f) and %.1f GB of disk in %s",
            *(size / 1e9 for size in (self.total, self.teacher, self.start, self.lesson, self.student, self.disk)),
            folder,
        )
        on_gpu = torch.device(device).type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
        if free < self.total:
            logger.warning(
                "only %.1f GB are free: use --dtype bfloat16, or smaller --batch-size and --length", free / 1e9
            )


def time_step(config: PretrainedConfig, folder: Path, cut: Boundaries, budget: Budget, fit: Fit) -> float:
    """Time a step of a random surrogate on a random lesson, while there is no teacher beside it; returns seconds."""
    anatomy = examine(config, AutoModel)
    layers = layers_of(on_meta(config, anatomy, torch.float32), anatomy)
    rank = max(1, round(budget.numbers / budget.one_rank))
    thin = {i: _random(layers[i], shapes, rank) for i, shapes in budget.shapes.items()}
    student = build(folder, cut, thin, fit.device)
    shape = (fit.batch_size, fit.length, config.hidden_size)
    lesson = Lesson(*(torch.randn(shape, device=fit.device) for _ in range(4)))
    return _seconds(lambda: backward(student, lesson), fit.device)


def say_time(teacher: Any, public: Tensor, budget: Budget, fit: Fit, step_s: float) -> float:
    """Say how long the fit takes, from one step (`time_step`), one lesson and one cut; returns seconds."""
    ids, labels = Batches(teacher, fit).draw(public, 0, 0)
    lesson_s = _seconds(lambda: observe(teacher, teacher.boundaries, ids, labels), fit.device)
    short, long = _TRIED
    weight = torch.randn(short, long, device=fit.device)
    x, g = (torch.eye(n, device=fit.device) for n in (long, short))
    tried_s = _seconds(lambda: thin_product(weight, x, g), fit.device)
    linear = [shape for shapes in budget.shapes.values() for shape in shapes.values()]
    cuts_s = tried_s / _work(short, long) * sum(_work(min(shape), max(shape)) for shape in linear)
    rows = torch.randn(fit.batch_size * fit.length, long, device=fit.device)
    square_s = _seconds(lambda: rows.T @ rows, fit.device) / long**2
    moments_s = square_s * sum(a * a + b * b for a, b in linear)
    start_s = cuts_s + MOMENT_BATCHES * (moments_s + 2 * lesson_s)
    parts = (start_s, fit.lessons * lesson_s, fit.steps * step_s)
    total = sum(parts)
    logger.info(
        "takes about %s on %s: the start %s, %d lessons %s, %d steps of the fit %s",
        *(clock(total), fit.device, clock(parts[0]), fit.lessons, clock(parts[1])),
        *(fit.steps, clock(parts[2])),
    )
    return total


def _work(short: int, long: int) -> float:
    """Count what a cut computes, up to a factor: products with the longer side's moment, taking the shorter's apart."""
    return short * long**2 + short**2 * long + 10 * short**3


def _seconds(do: Callable[[], Any], device: str) -> float:
    """Time one go, the second of two."""
    for _ in range(2):
        started = time.perf_counter()
        do()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _random(layer: nn.Module, shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, Tensor]:
    """Make up the weights of a thin layer, of the shapes of a layer on the meta device."""
    weights = {name: torch.ones(tensor.shape) for name, tensor in layer.state_dict().items()}
    for name, (out, into) in shapes.items():
        del weights[f"{name}.weight"]
        weights |= {f"{name}.A": torch.randn(rank, into) / into, f"{name}.B": torch.randn(out, rank) / rank}
    return weights


def _teacher(config: PretrainedConfig, cut: Boundaries, fit: Fit) -> tuple[int, int]:
    """Count the bytes of the whole model, and of a lesson at its peak."""
    classifies = fit.task == "sequence-classification"
    anatomy = examine(config, auto_class(fit.task))
    config = copy.deepcopy(config)
    object.__setattr__(config, "pad_token_id", None)  # else some look for padding, which meta tensors cannot show
    model = on_meta(config, anatomy, getattr(torch, fit.dtype))
    size: int = sum(p.numel() * p.element_size() for p in model.parameters())
    data = {"max-length": fit.length, **({"labels": "a,b", "text": "text"} if classifies else {})}
    run = RunConfig.model_validate({"task": fit.task, "data": data, "train": {"batch-size": 1}})
    adapter, sequence = step_on_meta(model, anatomy, cut, tuple(cut.trunk), run)
    return size, round(_held(fit) * (adapter + sequence * fit.batch_size))


def _student(trunk: Any, layers: nn.ModuleList, cut: Boundaries, budget: Budget, fit: Fit) -> int:
    """Count the bytes of the surrogate while it is trained; its trunk on the meta device is mutated."""
    rank = max(1, round(budget.numbers / budget.one_rank))
    for i, layer in enumerate(layers):
        if i not in cut.trunk:
            layers[i] = Hole(layer, examine(trunk.config, AutoModel).as_tuple)
        if i in budget.shapes:
            for name in linears(layer):
                out, into = budget.shapes[i][name]
                bias = getattr(layer.get_submodule(name), "bias", None)
                with torch.device("meta"):
                    replace(layer, name, LowRank(torch.empty(rank, into), torch.empty(out, rank), bias))
            layer.requires_grad_(True)
    trunk.set_attn_implementation("eager")
    with torch.device("meta"):
        lesson = Lesson(*(torch.empty(fit.batch_size, fit.length, trunk.config.hidden_size) for _ in range(4)))
    held = [layers[i] for i in cut.trunk]
    trained = sum(p.numel() for layer in held for p in layer.parameters() if p.requires_grad)
    weights = sum(p.numel() for layer in held for p in layer.parameters())
    live = Live(trunk)
    with live:
        backward(trunk, lesson)
    return 4 * (weights + 2 * trained) + 16 * lesson.h1.numel() + round(_held(fit) * live.peak)


def _held(fit: Fit) -> float:
    return _HELD if torch.device(fit.device).type == "cpu" else 1.0
