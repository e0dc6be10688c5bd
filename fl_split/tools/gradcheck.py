"""`fl-split gradcheck`: how far each surrogate's gradient is from the exact one, on one's own model and data.

Needs the whole checkpoint on the machine, and sends nothing anywhere: the trunk runs in this process. Run it on a
*trained* model: at default initialisation a trunk is nearly the identity, and every surrogate looks perfect.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from fl_split.config import Data, Kind, Lora, NodeConfig
from fl_split.data.batches import prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.data.sources import path_of
from fl_split.errors import ConfigError
from fl_split.model import adapters
from fl_split.model.checkpoint import resolve_model
from fl_split.model.ends import load_ends
from fl_split.model.loss import Batch, accumulate
from fl_split.model.slots import Trunk
from fl_split.model.streamed import StreamedLayer
from fl_split.model.thin import read_card
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.expected import Expected
from fl_split.node.trunk_cache import CachedTrunk

logger = logging.getLogger(__name__)

_GOOD, _POOR = 0.3, 0.1  # cosines: on trained decoders of 30 layers 0.01 to 0.08 gained nothing, on encoders 0.4 did
_EXACT = ("exact", "streamed")  # not estimates; what `streamed` costs is in the table


@dataclass(frozen=True)
class Candidate:
    """A surrogate to be looked at."""

    kind: Kind
    layers: int = 1  # kept, for `blocks`
    matched: Path | None = None  # the fitted file, for `matched`

    @property
    def name(self) -> str:
        """Such as ``blocks-2``."""
        return f"{self.kind}-{self.layers}" if self.kind in ("blocks", "distilled", "matched") else self.kind


@dataclass(frozen=True)
class Agreement:
    """A surrogate's bottom gradient beside the exact one."""

    candidate: Candidate
    cosine: float
    norm_ratio: float  # of the surrogate's gradient to the exact one
    extra_params: int  # weights that the node holds for it
    wire_tensors: int  # activation-sized tensors on the wire per token: 2 for a forward, 5 with the exact gradient


def check_model(
    model: tuple[str, str],
    ends: tuple[int, int],
    config: Data,
    layers: Sequence[int],
    matched: Sequence[Path],
    adapter: Path | None,
    num_batches: int,
) -> list[dict[str, str | float]]:
    """`gradcheck` from what a person types; one row per surrogate.

    Args:
        model: Name and revision.
        ends: Layers of bottom and top.
        config: Where the private examples are.
        layers: Numbers of kept layers to look at.
        matched: Fitted surrogates to look at.
        adapter: Exported adapter to check at, or None for the start of training.
        num_batches: Batches of 8 examples.

    Raises:
        FLSplitError: Model, data or a file cannot be used.
    """
    if config.path == "demo" and model[0] != "demo":
        raise ConfigError(
            f"--model {model[0]} is checked on data that it could be trained on, and the demo's invented data is the "
            "demo's: give --data, and --prompt and --response or --text for the names of its columns"
        )
    folder = resolve_model(*model)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    examples = load_examples(config, NodeConfig(data_path=path_of(config)), tokenizer, 0)
    batches = list(islice(training_batches(examples.train, tokenizer, 8, 0, 0), num_batches))
    expected = Expected.from_checkpoint(folder, *ends)
    for file in matched:
        expected.check_surrogate(read_card(file))
    candidates = [
        Candidate("identity"),
        *(Candidate("blocks", k) for k in layers),
        *(Candidate("matched", matched=file) for file in matched),
        Candidate("streamed"),
        Candidate("exact"),
    ]
    lora, state = adapters.read_export(adapter) if adapter else (Lora(), None)
    return [
        {
            "surrogate": row.candidate.matched.name if row.candidate.matched else row.candidate.name,
            "gradient cosine": row.cosine,
            "norm ratio": row.norm_ratio,
            "extra MB on the node": row.extra_params * 4 / 1e6,  # float32
            "bytes on the wire": f"x{row.wire_tensors / 2:g}",
        }
        for row in gradcheck(folder, *ends, batches, candidates, lora=lora, adapter=state)
    ]


def verdict(rows: Sequence[Mapping[str, str | float]]) -> str:
    """Say in words what the rows of `check_model` mean for a run."""
    estimates = {str(row["surrogate"]): float(row["gradient cosine"]) for row in rows if row["surrogate"] not in _EXACT}
    best = max(estimates, key=estimates.__getitem__)
    text = "; ".join(f"{name} {_words(cosine)} (cosine {cosine:.2f})" for name, cosine in estimates.items())
    if estimates[best] < _POOR:
        return (
            f"{text}. No estimate here gives the bottom a useful gradient. Of use are: surrogate.kind='streamed', "
            "whose gradient is exact, where a node's disk holds the whole checkpoint; or 'none', and the node's memory "
            "given to split.top-layers; or a surrogate that is fitted to this trunk (docs/surrogates.md)."
        )
    return f"{text}. The best estimate is {best}; a run tries it before it is followed (surrogate.check)."


def _words(cosine: float) -> str:
    if cosine >= _GOOD:
        return "follows the exact gradient"
    return "is weak" if cosine >= _POOR else "hardly follows it"


def build(
    folder: Path, bottom_layers: int, top_layers: int, trunk: Trunk, candidate: Candidate, lora: Lora
) -> PeftModel:
    """Load the ends with adapters (seed 0) around `trunk`, with the candidate as its surrogate."""
    ends = load_ends(
        folder,
        bottom_layers,
        top_layers,
        trunk,
        surrogate=candidate.kind,
        surrogate_layers=candidate.layers,
        matched=candidate.matched,
    )
    return adapters.attach(ends, lora, train_bottom=candidate.kind != "none", seed=0)


def bottom_gradient(model: PeftModel, batches: Sequence[Batch]) -> Tensor:
    """Gradient of the mean loss over the batches with respect to the bottom adapter, flat; clears all gradients."""
    model.eval()
    accumulate(model, batches)
    parts = [
        parameter.grad.flatten()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and adapters.part_of(model, name) == "bottom"
    ]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def surrogate_params(model: PeftModel) -> int:
    """Count the weights that a node holds beyond its ends: those of its surrogate; streamed: of its largest layer."""
    streamed = [module.shell for module in model.modules() if isinstance(module, StreamedLayer)]
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in streamed), default=0)
    held = sum(p.numel() for name, p in model.named_parameters() if adapters.part_of(model, name) == "trunk")
    return held + largest


def gradcheck(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate],
    *,
    lora: Lora | None = None,
    adapter: dict[str, Tensor] | None = None,
) -> list[Agreement]:
    """Compare bottom gradients with the exact one.

    Args:
        folder: The whole checkpoint.
        bottom_layers: Layers before the trunk.
        top_layers: Layers after the trunk.
        batches: Private examples; used here and sent nowhere.
        candidates: What to compare.
        lora: The adapters' setting.
        adapter: Adapter weights to check at, such as those of a finished run; by default the start of training.
    """
    whole = LocalTrunk(load_trunk(folder, bottom_layers, top_layers))
    forward_only = CachedTrunk(whole, Path(":memory:"), sys.maxsize, b"")  # all candidates have the same bottom
    lora = lora or Lora()

    def gradient(candidate: Candidate) -> tuple[Tensor, int]:
        trunk = whole if candidate.kind == "exact" else forward_only
        model = build(folder, bottom_layers, top_layers, trunk, candidate, lora)
        adapters.load_adapter_state(model, adapter or {})
        return bottom_gradient(model, batches), surrogate_params(model)

    logger.info("the exact gradient, through the whole model ...")
    exact, no_extra = gradient(Candidate("exact"))
    rows = []
    for number, candidate in enumerate(candidates, 1):
        logger.info("%s (%d of %d) ...", candidate.name, number, len(candidates))
        got, extra = (exact, no_extra) if candidate.kind == "exact" else gradient(candidate)
        cosine = torch.cosine_similarity(got, exact, dim=0).item()
        wire = 5 if candidate.kind == "exact" else 2
        rows.append(Agreement(candidate, cosine, (got.norm() / exact.norm()).item(), extra, wire))
    return rows
