"""One node's local round: micro-batches through bottom, trunk and top, and optimizer steps.

Data path: **batch -> model (bottom, trunk call, surrogate, top) -> loss -> backward -> optimizer**. The loss, the
labels and every gradient exist only here.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from fl_split.config import Train
from fl_split.model.adapters import parameter_groups, part_of
from fl_split.model.distill import Distiller
from fl_split.model.loss import Batch, accumulate, count_targets, count_tokens, forward
from fl_split.model.slots import remote_trunk_of
from fl_split.model.turns import run_in_turns


@dataclass(frozen=True)
class Trained:
    """What a local round came to."""

    loss: float  # mean per response token, or per text of a classifier, over the round's steps
    num_tokens: int  # real tokens trained on
    seconds: float


def make_optimizer(model: PeftModel, config: Train) -> torch.optim.AdamW:
    """AdamW over the adapters, with a rate for each end."""
    return torch.optim.AdamW(parameter_groups(model, config.bottom_lr, config.top_lr), weight_decay=0.0)


def make_distiller(model: PeftModel, lr: float, probe_every: int = 0) -> Distiller:
    """Begin to train a client's surrogate, from now on, on what its trunk returns; mutates the client."""
    names = {name: p for name, p in model.named_parameters() if part_of(model, name) == "trunk"}
    distiller = Distiller(names, lr, probe_every)
    remote_trunk_of(model.get_base_model()).distiller = distiller
    return distiller


def train_round(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    config: Train,
    *,
    first_step: int = 0,
    total_steps: int | None = None,
    distiller: Distiller | None = None,
    in_flight: int = 1,
    proximal_mu: float = 0.0,
    anchored: Callable[[str], bool] = lambda name: True,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train the adapters for one round of ``train.steps`` optimizer steps; mutates model and optimizer.

    Args:
        model: The client with its adapters.
        optimizer: From `make_optimizer`.
        batches: Endless micro-batches.
        config: Steps, accumulation, scheduler and clipping.
        first_step: Steps done in earlier rounds, for the scheduler.
        total_steps: Steps of the whole run, for the scheduler; by default those of this round.
        distiller: From `make_distiller`, for a surrogate that is trained on the way.
        in_flight: Calls to the trunk at the same time, at most.
        proximal_mu: Weight of ``mu / 2 * ||w - w at the start||^2`` in the loss (FedProx, arXiv 1812.06127).
        anchored: Which weights that term is about, by their name in the adapter's state; those that are shared.
        on_step: Called with the number of each step done.
    """
    end = first_step + config.steps
    scheduler = _scheduler(optimizer, config, first_step, total_steps or end)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    anchors = [
        (p, p.detach().clone())
        for name, p in model.named_parameters()
        if proximal_mu and p.requires_grad and anchored(name)
    ]
    model.train()
    started, loss_sum, num_tokens = time.monotonic(), 0.0, 0
    with tqdm(total=config.steps, unit="step", disable=None, leave=False) as bar:  # None: only on a terminal
        for step in range(first_step, end):
            step_batches = [next(batches) for _ in range(config.accumulation)]
            loss = accumulate(model, step_batches, in_flight)
            for parameter, anchor in anchors:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=proximal_mu)
            torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            if distiller is not None:
                distiller.step()
            loss_sum += loss
            num_tokens += sum(count_tokens(batch) for batch in step_batches)
            bar.set_postfix_str(f"loss {loss:.3f}, {num_tokens / (time.monotonic() - started):.0f} tokens/s")
            bar.update()
            on_step(step + 1)
    return Trained(loss_sum / config.steps, num_tokens, time.monotonic() - started)


def evaluate(model: PeftModel, batches: Iterable[Batch], in_flight: int = 1) -> float:
    """Mean loss per response token, without training; the trunk is called as in training."""
    model.eval()

    def run(batch: Batch) -> tuple[float, int]:
        with torch.no_grad():
            loss, _ = forward(model, batch, num_targets=1)
        return float(loss.item()), count_targets(batch)

    results = list(run_in_turns([partial(run, batch) for batch in batches], in_flight))
    return sum(loss for loss, _ in results) / sum(num_targets for _, num_targets in results)


def _scheduler(
    optimizer: torch.optim.Optimizer, config: Train, first_step: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    rates = {"bottom": config.bottom_lr, "top": config.top_lr}
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
