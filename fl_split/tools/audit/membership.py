"""Whether an adapter tells which rows it was trained on: by its losses, with the base model's as a reference.

Whoever has the adapter and a row can ask. The score of a row is by how much the adapter lowers its loss per target
(Watson et al., arXiv 2111.08440: a reference takes out how hard a row is); its AUC is the part of all pairs of a row
that was trained on and one that was not in which the former has the higher score: a half is guessing.
"""

import random
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from fl_split.config import NodeConfig, RunConfig
from fl_split.data.batches import heldout_batches, prepare_tokenizer
from fl_split.data.load import load_examples
from fl_split.errors import DataError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.trial import measure

_BATCH = 4


def membership(config: RunConfig, own: NodeConfig, folder: Path, adapter: Path, rows: int) -> dict[str, float]:
    """Compare rows that the node trains on with rows that it holds out.

    Args:
        config: The run's, with its split chosen: by its data and seed rows are on the side on which they were.
        own: The node's own.
        folder: The whole base model.
        adapter: Of the run.
        rows: Of each side, at most.

    Raises:
        DataError: One side has fewer than two rows.
        NodeStateError: There is no adapter.
    """
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    examples = load_examples(config.data, own, tokenizer, config.train.seed)
    drawn = random.Random(0)
    sides = [
        [part[i] for i in drawn.sample(range(len(part)), min(rows, len(part)))]
        for part in (examples.train, examples.heldout)
    ]
    if min(map(len, sides)) < 2:
        raise DataError(
            "too few rows to tell whether the adapter gives them away: expected two held out (data.holdout) and two to "
            "train on; --members 0 leaves this out"
        )
    ends, dtype = (config.split.bottom_layers, config.split.top_layers), config.model.torch_dtype
    trunk = LocalTrunk(load_trunk(folder, *ends, dtype=dtype))
    model = load_ends(folder, *ends, trunk, surrogate="identity", dtype=dtype, labels=config.data.label_names)
    model.config.pad_token_id = tokenizer.pad_token_id
    lora, state = adapters.read_export(adapter)
    adapted = adapters.attach(model, lora, train_bottom=True, seed=0)
    batches = [list(heldout_batches(side, tokenizer, _BATCH)) for side in sides]
    before = [measure(adapted, side) for side in batches]
    adapters.load_adapter_state(adapted, state)
    after = [measure(adapted, side) for side in batches]
    lowered = [(one[0] - other[0]) / one[1] for one, other in zip(before, after, strict=True)]
    auc = auc_of(*lowered)
    return {
        "membership-auc": auc,
        "membership-error": auc_error(auc, *map(len, lowered)),
        "membership-rows": len(lowered[0]) + len(lowered[1]),
    }


def auc_of(members: Tensor, others: Tensor) -> float:
    """The part of all pairs in which the member has the higher score; ties count half."""
    difference = members[:, None] - others[None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def auc_error(auc: float, members: int, others: int) -> float:
    """Its standard error (Hanley and McNeil, Radiology 143, 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    rest = (members - 1) * (q1 - auc**2) + (others - 1) * (q2 - auc**2)
    return float((max(auc * (1 - auc) + rest, 0.0) / (members * others)) ** 0.5)
