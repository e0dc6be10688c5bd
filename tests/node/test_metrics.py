"""The numbers of a round: exactly these keys reach the server, its records and whoever reads them."""

from fl_split.node.metrics import RoundMetrics


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
        descent_ratio=11.0,
        bottom_loss_fall=12.0,
        train_tokens=13,
        tokens_per_s=14.0,
        train_s=15.0,
        trunk_forward_s=16.0,
        activation_bytes=17,
        cached_sequences=18,
        rounds_missed=19,
    )
    keys = (
        "partition-id num-examples weight bad-rows truncated-examples truncated-tokens train-loss heldout-loss-base "
        "heldout-macro-f1-base heldout-loss-after descent-ratio bottom-loss-fall train-tokens tokens-per-s train-s "
        "trunk-forward-s activation-bytes cached-sequences rounds-missed"
    )
    assert metrics.record() == dict(zip(keys.split(), range(1, 20), strict=True))
