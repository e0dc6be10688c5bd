"""The loss of one batch through bottom, trunk and top, and its gradients; labels never go further than this.

Data path: **batch -> model (bottom, trunk call, surrogate, top) -> loss -> backward**.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from fl_split.model.turns import run_in_turns

IGNORED = -100  # label of a token that the loss does not count
Batch = dict[str, Tensor]  # "input_ids", "attention_mask": [batch, seq]; "labels": [batch, seq], or [batch]


def accumulate(
    model: PeftModel, batches: Iterable[Batch], in_flight: int = 1, alone: Callable[[Tensor], None] | None = None
) -> float:
    """Add one step's gradients, of the mean loss over all targets of its micro-batches; return that loss.

    With `in_flight` > 1, as many calls to the trunk are under way while the node computes; the result is the same.

    Args:
        model: The ends with their adapters; their gradients are added to.
        batches: Micro-batches.
        in_flight: Calls to the trunk at the same time, at most.
        alone: Gets each micro-batch's loss, the mean over its own targets, and makes of it what it will, instead; then
            the losses' sum is returned.
    """
    batches = list(batches)
    all_targets = sum(count_targets(batch) for batch in batches)
    seeds = torch.randint(2**62, (len(batches),)).tolist()  # dropout's, whatever runs in between

    def run(batch: Batch, seed: int) -> float:
        torch.manual_seed(seed)
        num_targets = count_targets(batch) if alone else all_targets
        loss = forward(model, batch, num_targets)[0]  # the logits, by far the largest tensor, go before backward begins
        (alone or Tensor.backward)(loss)
        return float(loss.item())

    tasks = [partial(run, batch, seed) for batch, seed in zip(batches, seeds, strict=True)]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        return sum(run_in_turns(tasks, in_flight))


def count_tokens(batch: Batch) -> int:
    """Real tokens; a batch without a mask has no others."""
    return int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())


def forward(model: PeftModel, batch: Batch, num_targets: int) -> tuple[Tensor, Tensor]:
    """One micro-batch through bottom, trunk and top.

    Returns:
        The sum of the cross entropies of all targets over `num_targets`, and the logits: ``[batch, seq, vocab]``, or
        ``[batch, labels]`` of a classifier.
    """
    batch = _to_device(batch, model)
    with _autocast(model):
        if batch["labels"].dim() > 1:
            out = model(**batch, num_items_in_batch=num_targets)
            return out.loss, out.logits
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits.float()
        # Not the model's own loss: some families' takes no count of targets.
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum") / num_targets, logits


def example_losses(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """One micro-batch's cross entropies by example, not packed: sums over targets, and their numbers; ``[batch]``."""
    batch = _to_device(batch, model)
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _autocast(model):
        logits: Tensor = model(**inputs).logits.float()
    if labels.dim() == 1:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses.cpu(), torch.ones(len(labels))
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
    )
    return losses.sum(1).cpu(), (targets != IGNORED).sum(1).cpu()


def count_targets(batch: Batch) -> int:
    """What the loss counts: tokens, but for the first of a sequence, which is predicted from nothing; or texts."""
    if batch["labels"].dim() == 1:
        return len(batch["labels"])
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _to_device(batch: Batch, model: PeftModel) -> Batch:
    return {name: value.to(model.device) for name, value in batch.items()}


def _autocast(model: PeftModel) -> AbstractContextManager[object]:
    """Use mixed precision where the device is made for it."""
    if model.device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
