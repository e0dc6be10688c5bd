"""How well a sequence classifier does on held-out texts.

Data path: held-out batches -> model (bottom, trunk call, top, head) -> **predicted classes -> three numbers**. Labels
and predictions stay on the node; the numbers go to the server.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from fl_split.model.loss import Batch, forward
from fl_split.model.turns import run_in_turns


@dataclass(frozen=True)
class Scores:
    """What a classifier comes to on one set of texts."""

    loss: float  # mean cross entropy per text
    accuracy: float  # part of the texts whose class was predicted
    macro_f1: float  # see `macro_f1`


def evaluate(model: PeftModel, batches: Iterable[Batch], in_flight: int = 1) -> Scores:
    """Score a classifier, without training; the trunk is called as in training."""
    model.eval()

    def run(batch: Batch) -> tuple[float, Tensor, Tensor]:
        with torch.no_grad():
            loss, logits = forward(model, batch, num_targets=1)
        return float(loss.item()), logits.argmax(-1).cpu(), batch["labels"].cpu()

    results = list(run_in_turns([partial(run, batch) for batch in batches], in_flight))
    predicted, truth = torch.cat([p for _, p, _ in results]), torch.cat([t for _, _, t in results])
    return Scores(
        sum(loss for loss, _, _ in results) / len(truth),
        (predicted == truth).double().mean().item(),
        macro_f1(predicted, truth),
    )


def macro_f1(predicted: Tensor, truth: Tensor) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN); both ``[texts]``.

    Over the classes that occur among either, as scikit-learn's ``f1_score(average="macro")`` does: a class that a node
    has no text of does not lower its score.
    """
    scores = []
    for label in torch.cat([predicted, truth]).unique():
        hits = int(((predicted == label) & (truth == label)).sum())
        scores.append(2 * hits / int((predicted == label).sum() + (truth == label).sum()))
    return sum(scores) / len(scores)
