"""The surrogate of a fit: made where the cut layers leave it, trained on recorded lessons, measured on others."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fl_split.errors import TrainingError
from fl_split.model.loading import Boundaries
from fl_split.model.trunk import load_trunk
from fl_split.tools.fit.folder import Fit, FitFolder, Saved, Stage
from fl_split.tools.fit.lessons import Lesson
from fl_split.tools.fit.moments import Budget
from fl_split.tools.fit.text import generator

logger = logging.getLogger(__name__)

_VALUE_WEIGHT = 0.1


def make_thin(budget: Budget, recorded: FitFolder) -> dict[int, dict[str, Tensor]]:
    """Take from each cut layer the ranks that the budget pays for; weights of thin layers, by layer."""
    names = [(i, name) for i, linears in budget.shapes.items() for name in linears]
    ranks = budget.choose({(i, name): recorded.load_one(f"cut-{i}", f"{name}.energy") for i, name in names})
    thin = {}
    for i, linears in budget.shapes.items():
        thin[i] = recorded.load(f"cut-{i}")
        for name in linears:
            a, b, rank = f"{name}.A", f"{name}.B", ranks[i, name]
            del thin[i][f"{name}.energy"]
            thin[i] |= {a: thin[i][a][:rank].clone(), b: thin[i][b][:, :rank].clone()}
    logger.info(
        "thin copies of layers %d to %d: ranks %d to %d", min(thin), max(thin), min(ranks.values()), max(ranks.values())
    )
    return thin


def build(
    folder: Path, cut: Boundaries, thin: Mapping[int, Mapping[str, Tensor]], device: str = "cpu"
) -> PreTrainedModel:
    """Make the surrogate, in float32: thin layers to be trained, the trunk's others frozen."""
    student = load_trunk(folder, cut.first, cut.num_layers - cut.end, thin=thin)
    student.set_attn_implementation("eager")  # fused attention kernels have no second derivative
    layers = student.get_submodule(cut.layers_path)
    for i in thin:
        layers.get_submodule(str(i)).requires_grad_(True)
    nn.Module.to(student, device)
    return student


def train(student: PreTrainedModel, recorded: FitFolder, config: Fit) -> None:
    """Train the surrogate on the recorded lessons, all of them in each epoch; goes on where it was.

    Raises:
        TrainingError: It diverges.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    count = int(recorded.load_one("lessons-done", "count"))
    saved = Saved(recorded, "fit", parameters, optimizer)
    begin = saved.load()
    progress = Stage("fit", config.steps, begin)
    for step in range(begin, config.steps):
        warm = min(1.0, (step + 1) / 30)
        rate = config.lr * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / config.steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        epoch, place = divmod(step, count)
        number = torch.randperm(count, generator=generator(config.seed, "lessons", epoch))[place]
        optimizer.zero_grad()
        gradient_error, value_error = backward(student, Lesson.read(recorded, f"lesson-{number}", config.device))
        check_finite([nn.utils.clip_grad_norm_(parameters, 1.0).item()], step + 1, config)
        optimizer.step()
        saved.save(step + 1)
        progress.step(step + 1, f", gradient error {gradient_error:.3f}, value error {value_error:.3f}")


def check_finite(numbers: Sequence[float], step: int, config: Fit) -> None:
    """Refuse a fit that has gone wrong.

    Raises:
        TrainingError: One of the numbers is not finite.
    """
    if not all(map(math.isfinite, numbers)):
        raise TrainingError(
            f"the fit diverges, its numbers are not finite at step {step}: lower --lr {config.lr:g} and go on with the "
            "same file; what was recorded is kept"
        )


def backward(student: PreTrainedModel, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Leave the gradient of a lesson's loss in the surrogate's weights.

    Returns:
        Gradient error (mean over sequences, each scaled to the same size) and value error.
    """
    scale = 1 / lesson.g1.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    h1 = lesson.h1.detach().requires_grad_()
    out = student(inputs_embeds=h1)[0]
    (pulled,) = torch.autograd.grad(out, h1, lesson.g2 * scale, create_graph=True)
    gradient_error = (pulled - lesson.g1 * scale).square().sum() / len(h1)
    value_error = (out - lesson.h2).square().sum() / (lesson.h1 - lesson.h2).square().sum()
    (gradient_error + _VALUE_WEIGHT * value_error).backward(inputs=[p for p in student.parameters() if p.requires_grad])
    return gradient_error.detach(), value_error.detach()


def quality(student: PreTrainedModel, recorded: FitFolder, names: Sequence[str], device: str) -> tuple[float, float]:
    """Mean cosine of J_S^T g with J_T^T g per sequence, and value error, over lessons that were not trained on."""
    cosines, value_errors = [], []
    for name in names:
        lesson = Lesson.read(recorded, name, device)
        h1 = lesson.h1.clone().requires_grad_()
        out = student(inputs_embeds=h1)[0]
        (pulled,) = torch.autograd.grad(out, h1, lesson.g2)
        cosines.append(torch.cosine_similarity(pulled.flatten(1), lesson.g1.flatten(1), dim=1).mean())
        value_errors.append((out.detach() - lesson.h2).square().sum() / (lesson.h1 - lesson.h2).square().sum())
    return torch.stack(cosines).mean().item(), torch.stack(value_errors).mean().item()
