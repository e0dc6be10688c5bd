"""One node's local round: micro-batches through bottom, trunk and top, and optimizer steps.

Data path: **batch -> model (bottom, trunk call, surrogate, top) -> loss -> backward -> optimizer**. The loss, the
labels and every gradient exist only here.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from fl_split.config import Train
from fl_split.errors import TrainingError
from fl_split.model.adapters import bottom_parameters, parameter_groups, part_of
from fl_split.model.distill import Distiller
from fl_split.model.loss import Batch, accumulate, count_tokens
from fl_split.model.slots import trunk_calls_of
from fl_split.node.record_dp import RecordDp


@dataclass(frozen=True)
class RoundSettings:
    """Which part of a run a local round is; by default a run by itself."""

    first_step: int = 0  # steps done in earlier rounds, for the scheduler
    total_steps: int | None = None  # of the whole run, for the scheduler; None: those of this round
    in_flight: int = 1  # calls to the trunk at the same time, at most
    proximal_mu: float = 0.0  # weight of FedProx's term
    trains_bottom: bool = True  # False: its gradient is made only for a distiller, and dropped
    anchored: Callable[[str], bool] = lambda name: True  # the weights that it is about, by name: those that are shared
    record_dp: RecordDp | None = None  # draws the examples and makes the gradients, with noise, of steps that it counts


@dataclass(frozen=True)
class Step:
    """How far a local round is after an optimizer step."""

    number: int  # of the whole run, from 1
    loss: float  # of this step; nan if `dp.record-*` drew no example
    num_tokens: int  # real tokens of the round so far
    seconds: float  # so far


@dataclass(frozen=True)
class Trained:
    """What a local round came to."""

    loss: float  # mean per response token, or per text of a classifier, over the round's steps; nan without one
    num_tokens: int  # real tokens trained on
    seconds: float


def make_optimizer(model: PeftModel, config: Train) -> torch.optim.AdamW:
    """AdamW over the adapters, with a rate for each end."""
    return torch.optim.AdamW(parameter_groups(model, *config.rates), weight_decay=0.0)


def make_distiller(model: PeftModel, lr: float, probe_every: int = 0) -> Distiller:
    """Train a model's surrogate from now on, on what its trunk returns; mutates the model."""
    names = {name: p for name, p in model.named_parameters() if part_of(model, name) == "trunk"}
    distiller = Distiller(names, lr, probe_every)
    trunk_calls_of(model.get_base_model()).distiller = distiller
    return distiller


def train_round(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    config: Train,
    settings: RoundSettings = RoundSettings(),
    on_step: Callable[[Step], None] = lambda step: None,
) -> Trained:
    """Train the adapters for ``train.steps`` optimizer steps, and the surrogate if it has a distiller.

    Args:
        model: The ends with their adapters; mutated.
        optimizer: From `make_optimizer`; mutated.
        batches: Endless micro-batches; left alone with `dp.record-*`, which draws its own.
        config: Steps, accumulation, scheduler and clipping.
        settings: Which part of a run this is.
        on_step: Called after each step.

    Raises:
        TrainingError: Loss, gradient or weights are no longer finite.
    """
    private = settings.record_dp
    num_steps = private.charge.steps if private else config.steps
    steps = range(settings.first_step, settings.first_step + num_steps)
    scheduler = _scheduler(optimizer, config, steps.start, settings.total_steps or steps.stop)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    bottom = bottom_parameters(model)
    proximal, distiller = _Proximal(model, settings), _distiller_of(model)
    for parameter in bottom:
        parameter.requires_grad_(settings.trains_bottom or distiller is not None)
    model.train()
    started, loss_sum, num_losses, num_tokens = time.monotonic(), 0.0, 0, 0
    with tqdm(total=num_steps, unit="step", disable=None, leave=False) as bar:  # None: only on a terminal
        for step in steps:
            if private:
                step_batches = private.draw()
                loss = private.accumulate(model, params, step_batches, settings.in_flight)
            else:
                step_batches = [next(batches) for _ in range(config.accumulation)]
                loss = accumulate(model, step_batches, settings.in_flight)
            if not settings.trains_bottom:
                for parameter in bottom:
                    parameter.grad = None
            proximal.add_gradient()
            norm = torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
            _check_finite(config, step + 1, **({} if private else {"loss": loss}), gradient=norm.item())
            optimizer.step()
            _check_finite(config, step + 1, weights=torch.nn.utils.get_total_norm(params).item())
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            if distiller is not None:
                distiller.step()
            if math.isfinite(loss):
                loss_sum, num_losses = loss_sum + loss, num_losses + 1
            num_tokens += sum(count_tokens(batch) for batch in step_batches)
            seconds = time.monotonic() - started
            bar.set_postfix_str(f"loss {loss:.3f}, {num_tokens / seconds:.0f} tokens/s")
            bar.update()
            on_step(Step(step + 1, loss, num_tokens, seconds))
    for parameter in bottom:
        parameter.requires_grad_(True)
    return Trained(loss_sum / num_losses if num_losses else math.nan, num_tokens, time.monotonic() - started)


def rest_of_run(optimizer: torch.optim.Optimizer, config: Train, settings: RoundSettings, steps: int) -> Train:
    """What is left of a run's schedule in fewer steps: from the rates of now, in a line to 0 unless they are constant.

    Sets the optimizer's rates to those of now.
    """
    _scheduler(optimizer, config, settings.first_step, settings.total_steps or settings.first_step + config.steps)
    now = {f"{group['name']}_lr": group["lr"] for group in optimizer.param_groups}
    scheduler = "constant" if config.scheduler == "constant" else "linear"
    return config.model_copy(update={**now, "steps": steps, "scheduler": scheduler})


def optimizer_state(model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors, so that it can be kept without pickle."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{field}": torch.as_tensor(value).detach().cpu()
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def forget_moments(model: PeftModel, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
    """Drop AdamW's state of some adapter weights, by their names in the adapter's state; mutates the optimizer."""
    forgotten = set(names)
    for name, parameter in model.named_parameters():
        if name.replace(".default.", ".") in forgotten:
            optimizer.state.pop(parameter, None)


def load_optimizer_state(model: PeftModel, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_state`; mutates the optimizer."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)


def _check_finite(config: Train, step: int, **values: float) -> None:
    for what, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} is not finite at step {step}: this round is dropped, and the last good round's adapter "
                "stays; lower train.bottom-lr={:g} and train.top-lr={:g}".format(*config.rates)
            )


class _Proximal:
    """FedProx's term ``mu / 2 * ||w - w at the start||^2`` of the loss (arXiv 1812.06127)."""

    def __init__(self, model: PeftModel, settings: RoundSettings) -> None:
        self._mu = settings.proximal_mu
        self._anchors = [
            (p, p.detach().clone())
            for name, p in model.named_parameters()
            if self._mu and p.requires_grad and settings.anchored(name)
        ]

    def add_gradient(self) -> None:
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._mu)


def _distiller_of(model: PeftModel) -> Distiller | None:
    base = model.get_base_model()
    return trunk_calls_of(base).distiller if hasattr(base, "trunk_calls") else None  # a whole model has no trunk


def _scheduler(
    optimizer: torch.optim.Optimizer, config: Train, first_step: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    rates = dict(zip(("bottom", "top"), config.rates, strict=True))
    for group in optimizer.param_groups:  # a scheduler multiplies the rates that a run starts with
        group["lr"] = group["initial_lr"] = rates[group["name"]]
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.scheduler,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=total_steps,
        scheduler_specific_kwargs={"last_epoch": first_step - 1},  # the steps before were done in earlier rounds
    )
    return scheduler
