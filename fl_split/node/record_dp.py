"""Gradients that tell little of any one training example, towards whoever sees the adapter (DP-SGD, arXiv 1607.00133).

Data path: **examples drawn each by itself -> gradient of each -> clipped -> summed -> noise** -> optimizer.

Each example goes through the model alone: then its gradient is its own for any family, adapter and head, and what is
held at a time is one. Each counts the same, however long. A step's sum moves by at most `dp.record-clip` with one
example; the noise, the probability of being drawn and the number of steps give epsilon (`node.account`). The step
divides by the expected number of examples, which tells nothing of who was drawn. What comes after, clipping, momentum
and sharing, costs nothing more.

Sampling and noise come from the operating system's entropy, never from `train.seed`, which everybody knows: a round
that is done again has other noise, and is charged again. NumPy's generator is no cryptographic one, and floats round.

What leaves the node: as ever, hidden states of the examples that were drawn. **They are not covered.**
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fl_split.config import Dp, RunConfig
from fl_split.data.batches import heldout_batches
from fl_split.data.store import Prepared
from fl_split.errors import ConfigError
from fl_split.model.loss import Batch, accumulate
from fl_split.node.account import Account, Charge

logger = logging.getLogger(__name__)

_ABOVE_ROUNDING = 1 + 1e-6  # of a norm in float32


def sampling_of(config: RunConfig, num_examples: int) -> float:
    """Probability with which an example is in a step, so that a step has `train.batch-size` times `.accumulation`."""
    return min(1.0, config.train.batch_size * config.train.accumulation / num_examples)


def check_delta(dp: Dp, num_examples: int) -> None:
    """Refuse a delta with which giving away one whole example would count as private.

    Raises:
        ConfigError: It is not below 1 / `num_examples`.
    """
    if dp.record_delta * num_examples >= 1:
        raise ConfigError(
            f"dp.record-delta={dp.record_delta:g} is too large for this node: it must be below 1 / its examples to "
            "train on"
        )


def begin(
    config: RunConfig, examples: Prepared, tokenizer: PreTrainedTokenizerBase, account: Account, number: int
) -> "RecordDp | None":
    """Charge a round's steps to the account and make what takes them; None without `dp.record-noise-multiplier`.

    Raises:
        ConfigError: See `check_delta` and `account.epsilon_of`.
    """
    if not config.dp.is_record:
        return None
    check_delta(config.dp, len(examples))
    charge = account.charge(config.dp, number, config.train.steps, sampling_of(config, len(examples)))
    logger.info("round %d: %s", number, charge)
    if charge.steps < config.train.steps:
        logger.warning(
            "dp.record-max-epsilon=%g allows %d of this round's %d steps: %s",
            config.dp.record_max_epsilon,
            charge.steps,
            config.train.steps,
            "the adapter stays as it is" if not charge.steps else "the adapter is not trained any further after them",
        )
    return RecordDp(charge, config.dp.record_clip, examples, tokenizer)


class RecordDp:
    """What a round's steps are made of."""

    def __init__(
        self,
        charge: Charge,
        clip: float,
        examples: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        generator: np.random.Generator | None = None,
    ) -> None:
        """Begin a round that is charged.

        Args:
            charge: How many steps, with which sampling and noise.
            clip: L2 norm of one example's gradient.
            examples: To draw from.
            tokenizer: Of the base model.
            generator: Of sampling and noise; by default a new one that nobody knows the seed of.
        """
        self.charge, self._clip = charge, clip
        self._examples, self._tokenizer = examples, tokenizer
        self._generator = generator or np.random.default_rng()

    def draw(self) -> list[Batch]:
        """Examples of a step, a batch each: every one with the same probability, by itself; maybe none."""
        drawn = self._generator.random(len(self._examples)) < self.charge.sampling
        return list(heldout_batches(self._examples.take(np.flatnonzero(drawn)), self._tokenizer, 1))

    def accumulate(
        self, model: PeftModel, parameters: Sequence[Tensor], examples: Sequence[Batch], in_flight: int = 1
    ) -> float:
        """Make one step's gradient, and return the examples' mean loss, nan without any; it stays on the node.

        Args:
            model: The ends with their adapters.
            parameters: All that is trained; their `grad` is replaced.
            examples: A batch each.
            in_flight: Calls to the trunk at the same time, at most.
        """
        sums = [torch.zeros_like(parameter) for parameter in parameters]

        def add(loss: Tensor) -> None:
            own = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([gradient for gradient in own if gradient is not None]).item()
            if not math.isfinite(norm):  # an error would tell of the example, and no factor makes it finite
                return
            for total, gradient in zip(sums, own, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=self._clip / max(norm * _ABOVE_ROUNDING, self._clip))

        loss = accumulate(model, examples, in_flight, alone=add)
        expected = self.charge.sampling * len(self._examples)
        for parameter, total in zip(parameters, sums, strict=True):
            noise = torch.from_numpy(self._generator.standard_normal(total.shape, np.float32)).to(total)
            parameter.grad = total.add_(noise, alpha=self._clip * self.charge.noise).div_(expected)
        return loss / len(examples) if examples else math.nan
