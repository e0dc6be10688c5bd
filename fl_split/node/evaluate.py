"""How well a node's model does on held-out examples, as a whole and in part.

Data path: held-out batches -> model (bottom, trunk call, top) -> **loss, predicted classes -> a few numbers**. Labels
and predictions stay on the node; the numbers go to the server.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from fl_split.config import Aggregation
from fl_split.model import adapters
from fl_split.model.loss import Batch, count_targets, forward
from fl_split.model.turns import run_in_turns

Scores = dict[str, float]  # `loss`, per response token or text; of a classifier `accuracy` and `macro_f1` as well


def evaluate(model: PeftModel, batches: Iterable[Batch], in_flight: int = 1) -> Scores:
    """Score a model, without training; the trunk is called as in training."""
    model.eval()
    results = list(run_in_turns([partial(_run, model, batch) for batch in batches], in_flight))
    scores = {"loss": sum(loss for loss, _, _ in results) / sum(num_targets for _, num_targets, _ in results)}
    if pairs := [classes for _, _, classes in results if classes is not None]:
        predicted, truth = torch.cat([p for p, _ in pairs]), torch.cat([t for _, t in pairs])
        scores["accuracy"] = (predicted == truth).double().mean().item()
        scores["macro_f1"] = macro_f1(predicted, truth)
    return scores


def scores_before(
    model: PeftModel, how: Aggregation, seed: int, earlier: Mapping[str, Scores], measure: Callable[[], Scores]
) -> dict[str, Scores]:
    """Score the base model, what is shared alone, and the whole, before a round's training; leaves the model as it is.

    Args:
        model: The node's model with its adapters.
        how: What is shared.
        seed: Of adapters as they begin, which private ones are replaced by.
        earlier: `base`, and `after` the last round; empty at the start.
        measure: Scores the model as it stands.

    Returns:
        `base`, `before`, `shared`.
    """
    own = adapters.adapter_state(model)
    private = {name for name in own if not adapters.is_shared(model, name, how)}
    nothing_new = private == own.keys() and bool(earlier)
    scores = {"base": earlier["base"] if earlier else base_scores(model, measure)}
    scores["before"] = earlier["after"] if nothing_new else measure()
    if all(".lora_A." in name for name in own.keys() - private):  # nothing, or A alone: without its B it does nothing
        scores["shared"] = scores["base"]
    elif not private:
        scores["shared"] = scores["before"]
    else:
        fresh = adapters.fresh_state(adapters.adapter_shapes(model), seed)
        adapters.load_adapter_state(model, {name: fresh[name] for name in private if name in fresh})
        scores["shared"] = measure()
        adapters.load_adapter_state(model, own)
    return scores


def base_scores(model: PeftModel, measure: Callable[[], Scores]) -> Scores:
    """Score the model without its adapters."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with model.disable_adapter():
        scores = measure()
    for p in frozen:  # PEFT has made all of every adapter trainable
        p.requires_grad_(False)
    return scores


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


def _run(model: PeftModel, batch: Batch) -> tuple[float, int, tuple[Tensor, Tensor] | None]:
    """Run one batch: its summed loss and number of targets, and of a classifier predicted and true classes."""
    with torch.no_grad():
        loss, logits = forward(model, batch, num_targets=1)
    classes = (logits.argmax(-1).cpu(), batch["labels"].cpu()) if batch["labels"].dim() == 1 else None
    return float(loss.item()), count_targets(batch), classes
