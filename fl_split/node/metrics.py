"""The numbers that a node gives away about a round: all of them, and under which keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from fl_split.config import NodeConfig
from fl_split.node.evaluate import Scores

_NEEDED = ("partition-id", "weight")
_COUNTS = ("num-examples", "bad-rows", "truncated-examples", "cached-sequences")  # of examples
_OF_TRAINING = (  # computed from single rows to train on, without noise
    "bad-rows", "truncated-examples", "truncated-tokens", "train-loss", "train-tokens", "tokens-per-s",
    "activation-bytes", "cached-sequences",
)  # fmt: skip
_SCORES = ("heldout-", "sample-", "gain-over-")  # how keys of scores on held-out ones begin


@dataclass(frozen=True)
class RoundMetrics:
    """A round in numbers; each is sent under its field's name, with hyphens."""

    partition_id: int
    num_examples: int  # to train on
    weight: int  # in the mean over the nodes
    bad_rows: int  # left out
    truncated_examples: int
    truncated_tokens: int  # cut off from those
    train_loss: float  # mean per response token, or per text of a classifier, over the round's steps
    heldout: Mapping[str, Scores]  # `base`, `before`, `shared`, `after`: sent as `heldout-loss-base` and so on
    samples: Mapping[str, float]  # of `data.samples`, by their keys: see `node.samples`
    bottom_trained: int  # 1 or 0
    bottom_gain: float  # of the newest trial of the bottom's gradient, see `node.trial`; 0 without one
    bottom_gain_error: float  # its standard error
    top_gain: float  # what the top alone won in that trial
    train_tokens: int  # real ones
    tokens_per_s: float
    train_s: float
    evaluate_s: float  # scoring on held-out examples, before and after training
    trunk_forward_s: float  # summed over the calls of training
    activation_bytes: int  # sent to the trunk
    share_leak_bits: float  # that one of two trunks could learn of gradients, at most; `surrogate.kind = shares`
    cached_sequences: int  # for which the trunk was not asked
    rounds_missed: int  # since this node's last
    exported_round: int  # whose adapter is the export: see `train.keep`
    worth: Mapping[str, float] = field(default_factory=dict)  # of `aggregation.personal`, by key: `node.personal`
    record_dp: Mapping[str, float] = field(default_factory=dict)  # of `dp.record-*`, by key: `node.account`

    def record(self) -> dict[str, int | float]:
        """The numbers by their keys."""
        record: dict[str, int | float] = {}
        for name, value in vars(self).items():
            match name:
                case "heldout":
                    record |= heldout_metrics(value)
                case "samples" | "worth" | "record_dp":
                    record |= value
                case _:
                    record[name.replace("_", "-")] = value
        return record


def given_away(
    record: Mapping[str, int | float], num_heldout: int, node: NodeConfig, num_samples: int = 0
) -> dict[str, int | float]:
    """What of a round's numbers leaves the node; what is withheld is nan, since the server reads every key.

    Withheld is what `metrics-allow` does not name, and, with `metrics-least`, counts of fewer examples than that, and
    scores on fewer held-out ones. The weight in the mean is needed, and rounded up. With `dp.record-*` nothing leaves
    that was computed from rows to train on, but for how many they are, and what is in the account.

    Args:
        record: All numbers.
        num_heldout: Examples that the scores are of.
        node: The node's own configuration.
        num_samples: Held-out examples that were answered, `data.samples`.
    """
    least, allowed = node.metrics_least, node.allowed_metrics
    kept = dict(record)
    for key, value in record.items():
        few = key in _COUNTS and 0 < value < least or key.startswith(_SCORES) and num_heldout < least
        few |= key.startswith("sample-") and num_samples < least
        few |= key in _OF_TRAINING and "record-epsilon" in record
        if key not in _NEEDED and (few or (allowed and not any(fnmatch(key, pattern) for pattern in allowed))):
            kept[key] = math.nan
    if node.metrics_least and record["weight"] > 1:  # 1: all nodes weigh the same
        kept["weight"] = max(record["weight"], least)
    return kept


def heldout_metrics(heldout: Mapping[str, Scores]) -> dict[str, float]:
    """Scores by their keys, such as ``heldout-macro-f1-after``."""
    return {
        f"heldout-{name.replace('_', '-')}-{when}": value
        for when, scores in heldout.items()
        for name, value in scores.items()
    }
