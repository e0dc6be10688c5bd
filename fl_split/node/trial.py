"""Whether the surrogate's gradient is worth following: tried before the bottom trains on it.

A surrogate can be wrong without anybody noticing: the top alone brings the loss down, and a bottom that follows noise
only makes the node's model a little worse. So before some rounds a node trains twice from where it stands, on the same
batches, the top alone and both ends, and compares the two, through the real trunk, on *other* examples. Then all is put
back. Where both ends are not better for sure, the rounds until the next trial train the top alone, bit for bit as
without a surrogate.

A trial is the rest of the run in 30 steps: with the optimizer's moments, from the rates of now down to where the
run's end. Neither small nor full rates alone tell. Small ones show no harm: on SmolLM2-135M (2 + 26 + 2, 8 x 80 tokens)
`identity` once won 0.010 (error 0.002) at an eighth of rates that ruin the model in 30 steps; in a trial it loses 0.063
(0.006). At full ones a gain does not show before they come down: on a small Llama two kept layers are worth 0.050 after
120 steps, and after 30 at full rates -0.024 (0.009); in a trial 0.015 (0.006).

Two things that look cheaper do not tell: taking a trained bottom's update back raises the loss even where it was
noise, since the top has got used to it; and the inner product with the exact gradient, which random probes of the
trunk can estimate, takes thousands of forward passes, since each of its samples carries a whole gradient's noise.

What leaves the node: hidden states of training examples under a bottom that trains, as in any round.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf, isfinite

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fl_split.config import RunConfig, Train
from fl_split.data.batches import heldout_batches, training_batches
from fl_split.data.store import Prepared
from fl_split.errors import TrainingError
from fl_split.model.loss import Batch, example_losses
from fl_split.model.slots import trunk_calls_of
from fl_split.model.turns import run_in_turns
from fl_split.node.train import RoundSettings, rest_of_run, train_round

STEPS = 30  # of each of the two; in ten, two kept layers once won 0.034 on SmolLM2-135M and a round of ten lost by them
LEAST = 8  # examples to measure on; with fewer, no error can be told
MEASURED = 128  # at most; half as many would see an exact gradient's gain in fewer first rounds
_SURE = 2.0  # standard errors

Losses = tuple[Tensor, Tensor]  # of each example: the sum over its targets, and their number; [examples] each


@dataclass(frozen=True)
class Gain:
    """By how much the loss is lower with a bottom that trains, in nats per response token or text."""

    mean: float = 0.0
    error: float = 0.0  # one standard error over examples; 0: nothing was measured
    top: float = 0.0  # by how much the top alone lowered the loss in the same steps

    @property
    def is_sure(self) -> bool:
        """Whether chance alone would be this good in fewer than one of forty trials."""
        return self.error > 0 and self.mean > _SURE * self.error


_DIVERGED = Gain(-inf, inf)


def passes(trial: Gain, is_training: bool) -> bool:
    """Whether the bottom trains until the next trial: to begin it has to win for sure, to go on it must not lose.

    At high rates a trial often cannot tell a gain that the one before has shown.
    """
    return trial.is_sure or (is_training and trial.mean > 0)


def is_due(server_round: int, last: int) -> bool:
    """Whether a round begins with a trial: 1, 2, 4, 8, 16, ..., or the first one after a node has missed these.

    The first results hold the least long.

    Args:
        server_round: The round.
        last: The node's last round before, 0 without one.
    """
    return server_round.bit_length() > last.bit_length()


def draw(
    examples: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    seed: int,
    steps: int = STEPS,
    most: int = MEASURED,
) -> tuple[list[Batch], list[Batch]] | None:
    """Draw what a trial needs from the examples to train on; None: they are too few.

    Returns:
        Micro-batches for so many steps, and batches of at most so many other examples to measure on.
    """
    count, train = min(most, len(examples) // 3), config.train
    if count < LEAST:
        return None
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    measured = heldout_batches([examples[i] for i in order[:count]], tokenizer, train.batch_size)
    num_batches = steps * train.accumulation
    others = [examples[i] for i in order[count:][: num_batches * train.batch_size]]
    batches = training_batches(others, tokenizer, train.batch_size, seed, 0, config.data)
    return list(islice(batches, num_batches)), list(measured)


def try_bottom(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    measured: Sequence[Batch],
    config: Train,
    settings: RoundSettings,
) -> Gain:
    """Train the top alone and both ends for the rest of the run in brief, and compare; leaves everything as it was.

    A training that diverges has won nothing: the round goes on, without the bottom. Dropout draws the same in both
    trainings: two draws differ by more than the error says.

    Args:
        model: The node's model with its adapters.
        optimizer: As the round begins with it.
        batches: Micro-batches for `STEPS` steps.
        measured: Batches of other examples.
        config: The round's.
        settings: The round's.
    """
    rest = rest_of_run(optimizer, config, settings, STEPS)
    settings = replace(settings, first_step=0, total_steps=None)
    seed = int(torch.randint(2**62, ()))

    def after(trains_bottom: bool) -> Losses:
        torch.manual_seed(seed)
        part = replace(settings, trains_bottom=trains_bottom)
        return losses_after(model, optimizer, batches, measured, rest, part)

    try:
        before = measure(model, measured, settings.in_flight)
        without = after(trains_bottom=False)
        result = gain(without, after(trains_bottom=True))
    except TrainingError:
        return _DIVERGED
    return replace(result, top=gain(before, without).mean) if isfinite(result.mean) else _DIVERGED


def losses_after(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    measured: Sequence[Batch],
    config: Train,
    settings: RoundSettings,
) -> Losses:
    """Train, measure, and put all back, whatever comes in between.

    Raises:
        TrainingError: Loss, gradient or weights are no longer finite.
    """
    calls = trunk_calls_of(model.get_base_model())
    distiller, calls.distiller = calls.distiller, None  # what it would learn here is for the round to come
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start, moments = [parameter.detach().clone() for parameter in trained], copy.deepcopy(optimizer.state_dict())
    try:
        train_round(model, optimizer, iter(batches), config, settings)
        return measure(model, measured, settings.in_flight)
    finally:
        calls.distiller = distiller
        optimizer.load_state_dict(moments)
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(True)
                parameter.grad = None


def measure(model: PeftModel, batches: Sequence[Batch], in_flight: int = 1) -> Losses:
    """Losses of single examples, without training; the trunk is called as in training."""
    model.eval()
    tasks = [partial(_losses_of, model, batch) for batch in batches]
    sums, counts = zip(*run_in_turns(tasks, in_flight), strict=True)
    return torch.cat(sums).double(), torch.cat(counts).double()


def _losses_of(model: PeftModel, batch: Batch) -> Losses:
    with torch.no_grad():
        return example_losses(model, batch)


def gain(without: Losses, with_bottom: Losses) -> Gain:
    """The difference of the mean losses per target of the same examples, with its standard error.

    The estimator of a ratio: ``sum(d) / sum(n)``, error ``sqrt(m / (m - 1) * sum((d - mean * n)^2)) / sum(n)``
    (Cochran, Sampling Techniques, 1977, 6.4), with d the differences and n the targets of m examples.
    """
    (losses, targets), (others, _) = without, with_bottom
    differences, total = losses - others, targets.sum()
    mean = differences.sum() / total
    rest = (differences - mean * targets).square().sum()
    error = torch.sqrt(rest * len(targets) / (len(targets) - 1)) / total
    return Gain(mean.item(), error.item())


def explain(trial: Gain, kind: str) -> str:
    """Say why the bottom does not train, and what would help.

    Args:
        trial: What came of the last one.
        kind: The surrogate's.
    """
    what = f"the bottom is not trained: in a trial of {STEPS} steps with the gradient of surrogate.kind={kind!r} "
    what += (
        f"it {'lowered' if trial.mean > 0 else 'raised'} the loss on other examples by {abs(trial.mean):.4f} (standard "
        f"error {trial.error:.4f}), the top alone lowered it by {trial.top:.4f}; this is too little. "
        if isfinite(trial.mean)
        else "numbers were no longer finite. Lower rates would help. "
    )
    return what + (
        "A kind with an exact gradient would help, or a surrogate that is fitted to this trunk (docs/surrogates.md), "
        "or a larger split.top-layers"
    )
