"""Whether the surrogate's gradient is worth following: tried before the bottom trains on it.

A surrogate can be wrong without anybody noticing: the top alone brings the loss down, and a bottom that follows noise
only makes the node's model a little worse. So at some rounds a node trains a few steps twice from where it stands, on
the same batches, the top alone and both ends, and compares the two, through the real trunk, on *other* examples. Then
all is put back. Where both ends are not better for sure, and by a part of what the top alone wins, the rounds until
the next trial train the top alone, bit for bit as without a surrogate.

On a pretrained decoder (SmolLM2-135M, 2 + 26 + 2, steps of 8 x 80 tokens) the top alone won 0.0093 in such a trial, the
exact gradient 0.0055 more (error 0.0004), two kept layers 0.0008 (error 0.0002), which is too little. In 20 steps at
full rates they won 0.091 (error 0.007) and 0.001 (error 0.006) more. What wins in small steps may lose in large ones:
`identity` once won 0.010 (error 0.002) there and made a round worse by 0.011. So both have to win.

Two things that look cheaper do not tell: taking a trained bottom's update back raises the loss even where it was
noise, since the top has got used to it; and the inner product with the exact gradient, which random probes of the
trunk can estimate, takes thousands of forward passes, since each of its samples carries a whole gradient's noise.

What leaves the node: hidden states of training examples under a bottom that trains, as in any round.
"""

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
from fl_split.node.train import RoundSettings, make_optimizer, train_round

STEPS = 10  # of each of the two
LEAST = 8  # examples to measure on; with fewer, no error can be told
MEASURED = 64  # at most
_SLOWER = 1 / 8  # than the round: small steps show what the gradient says, large ones how two runs differ
_SURE = 2.0  # standard errors
_PART = 0.1  # of what the top alone wins: less is within what two runs differ by, and does not last

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

    @property
    def is_useful(self) -> bool:
        """Whether it is sure, and matters beside the top."""
        return self.is_sure and self.mean > _PART * self.top


_DIVERGED = Gain(-inf, inf)


def is_due(server_round: int) -> bool:
    """Whether a round begins with a trial: 1, 2, 4, 8, 16, ...; the first results hold the least long."""
    return server_round.bit_count() == 1


def draw(
    examples: Prepared, tokenizer: PreTrainedTokenizerBase, config: RunConfig, seed: int
) -> tuple[list[Batch], list[Batch]] | None:
    """Draw what a trial needs from the examples to train on; None: they are too few.

    Returns:
        Micro-batches for `STEPS` steps, and batches of other examples to measure on.
    """
    count, train = min(MEASURED, len(examples) // 3), config.train
    if count < LEAST:
        return None
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    measured = heldout_batches([examples[i] for i in order[:count]], tokenizer, train.batch_size)
    num_batches = STEPS * train.accumulation
    others = [examples[i] for i in order[count:][: num_batches * train.batch_size]]
    batches = training_batches(others, tokenizer, train.batch_size, seed, 0, config.data)
    return list(islice(batches, num_batches)), list(measured)


def try_bottom(
    model: PeftModel, batches: Sequence[Batch], measured: Sequence[Batch], config: Train, in_flight: int = 1
) -> Gain:
    """Train the top alone and both ends for a few steps and compare; leaves the model as it was.

    A training that diverges has won nothing: the round goes on, without the bottom.

    Args:
        model: The node's model with its adapters.
        batches: Micro-batches for `STEPS` steps.
        measured: Batches of other examples.
        config: Accumulation, clipping, schedule and rates. A trial takes an eighth of these; what is useful then is
            tried once more at all of them, and has to win for sure there.
        in_flight: Calls to the trunk at the same time, at most.

    Returns:
        What the first came to if the second confirms it, else what that came to.
    """
    top, both = (RoundSettings(in_flight=in_flight, trains_bottom=trains_bottom) for trains_bottom in (False, True))
    small = for_trial(config, *(rate * _SLOWER for rate in config.rates), scheduler="constant")
    try:
        before = measure(model, measured, in_flight)

        def won(rates: Train) -> Gain:
            without = losses_after(model, batches, measured, rates, top)
            result = gain(without, losses_after(model, batches, measured, rates, both))
            return replace(result, top=gain(before, without).mean) if isfinite(result.mean) else _DIVERGED

        result = won(small)
        at_full = won(for_trial(config, *config.rates)) if result.is_useful else result
    except TrainingError:
        return _DIVERGED
    return result if at_full.is_sure else at_full


def for_trial(config: Train, bottom_lr: float, top_lr: float, **changes: object) -> Train:
    """A round's configuration with a trial's steps and rates."""
    return config.model_copy(update={"steps": STEPS, "bottom_lr": bottom_lr, "top_lr": top_lr, **changes})


def losses_after(
    model: PeftModel, batches: Sequence[Batch], measured: Sequence[Batch], config: Train, settings: RoundSettings
) -> Losses:
    """Train, measure, and put all back, whatever comes in between.

    Raises:
        TrainingError: Loss, gradient or weights are no longer finite.
    """
    calls = trunk_calls_of(model.get_base_model())
    distiller, calls.distiller = calls.distiller, None  # what it would learn here is for the round to come
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    try:
        train_round(model, make_optimizer(model, config), iter(batches), config, settings)
        return measure(model, measured, settings.in_flight)
    finally:
        calls.distiller = distiller
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
