"""The numbers of a round: exactly these keys reach the server, its records and whoever reads them."""

from math import isnan

import pytest

from fl_split.config import NodeConfig
from fl_split.node.metrics import RoundMetrics, given_away


def test_keys_are_these_and_no_others() -> None:
    metrics = RoundMetrics(
        partition_id=1,
        num_examples=2,
        weight=3,
        bad_rows=4,
        truncated_examples=5,
        truncated_tokens=6,
        train_loss=7.0,
        heldout={"base": {"loss": 8.0, "macro_f1": 9.0}, "after": {"loss": 10.0}},
        samples={"sample-rouge-l": 11.0},
        bottom_trained=1,
        bottom_gain=12.0,
        bottom_gain_error=13.0,
        top_gain=14.0,
        train_tokens=15,
        tokens_per_s=16.0,
        train_s=17.0,
        evaluate_s=18.0,
        trunk_forward_s=19.0,
        activation_bytes=20,
        share_leak_bits=21.0,
        cached_sequences=22,
        rounds_missed=23,
        exported_round=24,
    )
    keys = (
        "partition-id num-examples weight bad-rows truncated-examples truncated-tokens train-loss heldout-loss-base "
        "heldout-macro-f1-base heldout-loss-after sample-rouge-l bottom-trained bottom-gain bottom-gain-error top-gain "
        "train-tokens tokens-per-s train-s evaluate-s trunk-forward-s activation-bytes share-leak-bits "
        "cached-sequences rounds-missed exported-round"
    )
    numbers = [*range(1, 12), 1, *range(12, 25)]
    assert metrics.record() == dict(zip(keys.split(), numbers, strict=True))


@pytest.mark.parametrize(("least", "withheld"), [(3, True), (2, False)])
def test_scores_on_few_answered_prompts_are_withheld(least: int, withheld: bool) -> None:
    record = {"partition-id": 0, "weight": 9, "sample-rouge-l": 0.5}
    node = NodeConfig.from_flat({"partition-id": 0, "metrics-least": least})
    assert isnan(given_away(record, 99, node, num_samples=2)["sample-rouge-l"]) == withheld
