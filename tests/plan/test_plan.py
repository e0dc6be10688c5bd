"""The plan from the configuration alone, against models that are really loaded and really trained."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, Family
from transformers import AutoConfig, MixtralConfig, MptConfig

from fl_split import wire
from fl_split.config import RunConfig, num_bytes
from fl_split.errors import ConfigError, SplitError
from fl_split.model import adapters, loss
from fl_split.model.checkpoint import read_config
from fl_split.model.ends import checkpoint_activations, load_ends
from fl_split.model.family import examine
from fl_split.model.key_values import bytes_per_token
from fl_split.model.loss import Batch
from fl_split.model.trunk import load_trunk
from fl_split.node import train
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.plan.message_bytes import request_bytes
from fl_split.plan.plan import (
    PROCESS_BYTES,
    Link,
    Plan,
    choose_split,
    make_plan,
    rows_of,
    splits,
    with_split,
)
from fl_split.plan.step_memory import key_value_bytes, on_meta
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers

BATCH, LENGTH = 3, 40
FAMILIES = ("llama", "qwen2", "gpt2", "mistral")


def run_config(**keys: Any) -> RunConfig:
    small = {"train.batch-size": BATCH, "data.max-length": LENGTH, "surrogate.layers": 1}
    return RunConfig.from_flat({**small, **keys})


class Echo:
    """A trunk of no layers that counts what a call would put on the wire."""

    def __init__(self, dtype: str) -> None:
        self.dtype = wire.NAMES[dtype]
        self.sent = self.received = 0

    def start(self, hidden_states: torch.Tensor, mask: Any, positions: Any) -> "Future[torch.Tensor]":
        packed = wire.pack_batch(hidden_states, mask, positions)
        request = wire.encode_request(packed, self.dtype)
        reply = wire.encode_reply(packed.rows, self.dtype, bytes(16))
        self.sent, self.received = request.ByteSize(), reply.ByteSize()
        done: Future[torch.Tensor] = Future()
        done.set_result(hidden_states.clone())
        return done


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_weights_and_activations_are_those_of_a_real_step(checkpoint: Callable[[str], Path], family: str) -> None:
    folder, run = checkpoint(family), run_config()
    plan = make_plan(AutoConfig.from_pretrained(folder), run)
    trunk = Echo(run.trunk.wire_dtype)
    client = load_ends(folder, 2, 2, trunk, surrogate="blocks", surrogate_layers=1)
    assert plan.node.weights == sum(p.numel() * p.element_size() for p in client.parameters())
    assert plan.trunk_weights == sum(p.numel() * p.element_size() for p in load_trunk(folder, 2, 2).parameters())
    model = adapters.attach(client, run.lora, train_bottom=True, seed=0).train()
    assert plan.node.training == 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)

    ids = torch.randint(99, (BATCH, LENGTH))
    model(input_ids=ids)  # full length: what the plan counts
    assert (trunk.sent, trunk.received) == (plan.request_bytes, plan.reply_bytes)


def peak_of_a_step(folder: Path, run: RunConfig) -> int:
    """Most bytes that a real step has from torch's allocator at once, the adapters' gradients left out."""
    client = load_ends(folder, 2, 2, Echo("bfloat16"), surrogate=run.surrogate.planned, surrogate_layers=1)
    if run.train.activation_checkpointing:
        checkpoint_activations(client)
    model = adapters.attach(client, run.lora, train_bottom=True, seed=0).train()
    ids = torch.randint(client.config.vocab_size, (run.train.batch_size, run.data.max_length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    batches: list[Batch] = [{"input_ids": ids, "attention_mask": mask, "labels": ids}]
    loss.accumulate(model, batches)  # which leaves gradients to add to
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.accumulate(model, batches)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]  # no public way to the order
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(accumulate(sizes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [{}, {"train.activation-checkpointing": True}, {"surrogate.kind": "streamed"}],
    ids=["plain", "checkpointing", "streamed"],
)
def test_activations_are_those_of_a_real_step(
    checkpoint: Callable[[str], Path], family: str, keys: dict[str, Any]
) -> None:
    folder, run = checkpoint(family), run_config(**keys)
    planned, real = make_plan(AutoConfig.from_pretrained(folder), run).node.activations, peak_of_a_step(folder, run)
    assert abs(planned - real) / real < 0.1


def test_auto_is_planned_with_no_more_layers_than_the_trunk_has(checkpoint: Callable[[str], Path]) -> None:
    config, run = AutoConfig.from_pretrained(checkpoint("llama")), run_config(**{"split.top-layers": 3})
    auto, one = run.with_kind("auto", 2), run.with_kind("blocks", 1)
    assert make_plan(config, auto).node.weights == make_plan(config, one).node.weights
    with pytest.raises(ConfigError, match="surrogate.layers=2 cannot be kept of a trunk of 1 layers"):
        make_plan(config, run.with_kind("blocks", 2))


def test_a_streamed_surrogate_holds_one_layer_and_costs_the_time_of_all(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    none, one, streamed = (
        make_plan(config, run_config(**{"surrogate.kind": kind})) for kind in ("identity", "blocks", "streamed")
    )
    assert streamed.node.weights == one.node.weights > none.node.weights
    boundaries = 2 * BATCH * LENGTH * config.hidden_size * 4  # of two trunk layers
    assert none.node.activations < streamed.node.activations < one.node.activations + boundaries
    ratio = (streamed.node_flop - none.node_flop) / (one.node_flop - none.node_flop)
    assert 2 * 4 / 3 < ratio < 2 * 3 / 2  # two layers of three passes, one of two; attention is more when run again
    assert streamed.request_bytes == none.request_bytes


def test_activation_checkpointing_leaves_less_to_hold(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    waiting = {"train.accumulation": 2, "trunk.in-flight": 2}
    again = {"train.activation-checkpointing": True}
    plain, both, less, both_less = (
        make_plan(config, run_config(**keys)).node.activations for keys in ({}, waiting, again, waiting | again)
    )
    assert less < 0.7 * plain
    assert less < both_less < less + 0.5 * (both - plain)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("blocks", {}),
        ("distilled", {"surrogate.probe-every": 2}),
        ("exact", {"trunk.exact-gradient": True}),
        ("exact", {"trunk.exact-gradient": True, "trunk.wire-dtype": "int8"}),
    ],
)
def test_bytes_of_probes_and_exact_gradients_are_those_on_the_wire(
    checkpoint: Callable[[str], Path], kind: str, keys: dict[str, Any]
) -> None:
    folder, run = checkpoint("llama"), run_config(**{"surrogate.kind": kind, **keys})
    plan = make_plan(AutoConfig.from_pretrained(folder), run)
    config = TrunkConfig.model_validate({"metrics": {"enabled": False}, "server": {"exact-gradient": True}})
    with server.embedded(hold_layers(folder, 2, 2), config=config) as address:
        expected = Expected.from_checkpoint(folder, 2, 2)
        with TrunkConnection(address, expected, wire_dtype=run.trunk.wire_dtype) as trunk:
            client = load_ends(folder, 2, 2, trunk, surrogate=run.surrogate.planned, surrogate_layers=1)
            model = adapters.attach(client, run.lora, train_bottom=True, seed=0).train()
            if kind == "distilled":
                train.make_distiller(model, 1e-3, run.surrogate.probe_every)
            ids = torch.randint(99, (BATCH, LENGTH))
            loss.accumulate(model, [{"input_ids": ids, "labels": ids}] * 2)
            sent, received = trunk.bytes_sent, trunk.bytes_received
    if run.trunk.wire_dtype == "int8":  # how many channels are kept depends on the numbers
        assert 0.95 * 2 * plan.request_bytes < sent <= 2 * plan.request_bytes
    else:
        assert abs(sent - 2 * plan.request_bytes) <= 1  # half a probe is rounded
        assert abs(received - 2 * plan.reply_bytes) <= 1


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", True), ("int8", False)])
def test_request_bytes_are_exact_or_for_int8_a_close_bound(dtype: str, exact: bool) -> None:
    lengths, code = [3, 200, 1], wire.NAMES[dtype]
    rows = torch.randn(sum(lengths), 320)
    sent = wire.encode_request(wire.Packed(rows, lengths, None), code).ByteSize()
    bound = request_bytes(lengths, code, 320)
    assert sent == bound if exact else sent <= bound <= 1.05 * sent


def test_more_on_the_node_costs_more_and_micro_batches_in_flight_too(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    plans = [make_plan(config, run) for run in splits(config, run_config())]
    assert [(p.bottom_layers, p.trunk_layers, p.top_layers) for p in plans] == [(1, 4, 1), (2, 2, 2)]
    assert plans[0].node.total < plans[1].node.total
    whole = plans[0].full_weights
    assert all(plan.node.weights < whole for plan in plans)
    waiting = make_plan(config, run_config(**{"train.accumulation": 4, "trunk.in-flight": 3})).node.activations
    assert 1.2 < waiting / plans[1].node.activations < 3
    distilled = make_plan(config, run_config(**{"surrogate.kind": "distilled"})).node
    layer = (distilled.training - plans[1].node.training) / 3
    assert layer == plans[1].trunk_weights / 2


def test_mixtures_of_experts_and_bfloat16_are_planned() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=5, vocab_size=99, num_local_experts=4)
    single, half = (make_plan(config, run_config(**{"model.dtype": dtype})) for dtype in ("float32", "bfloat16"))
    assert single.node.weights == 2 * half.node.weights
    assert 0 < half.node.activations < single.node.activations


def test_a_model_whose_code_needs_numbers_is_not_planned() -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=6, vocab_size=99)
    with pytest.raises(SplitError, match=r"the memory of mpt cannot be planned, .* leave split\.client-memory empty"):
        make_plan(config, run_config())


def test_a_classifier_is_planned_with_its_head_in_training(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    labels = {"task": "sequence-classification", "data.text": "note", "data.labels": "a,b,c"}
    plan, causal = make_plan(config, run_config(**labels)), make_plan(config, run_config())
    head = 16 * 3 * config.hidden_size
    assert plan.node.training == causal.node.training + head
    assert plan.node.activations < causal.node.activations


def test_the_deepest_split_that_fits_is_chosen_and_said(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    run = run_config(**{"model.name": str(checkpoint("llama"))})
    assert choose_split(run) is run

    def chosen(num_bytes: float) -> tuple[int, int]:
        text = f"{num_bytes / 1e6:.3f}MB"
        split = run.split.model_copy(update={"client_memory": text})
        got = choose_split(run.model_copy(update={"split": split})).split
        return got.bottom_layers, got.top_layers

    needed = make_plan(config, run_config(**{"split.bottom-layers": 1, "split.top-layers": 2})).node.total
    assert chosen(needed + PROCESS_BYTES + 1e4) == (1, 2)
    assert chosen(needed + PROCESS_BYTES - 1e4) == (1, 1)
    assert chosen(10e9) == (2, 2)  # one layer of the trunk is the surrogate's, one is nobody's but the trunk's
    assert "split.bottom-layers=2 and split.top-layers=2 of 6 layers" in caplog.text
    split = with_split(run, 10).split
    assert (split.bottom_layers, split.top_layers) == (2, 8)  # where further layers are worth most
    with pytest.raises(ConfigError, match=r"split\.client-memory='100\.000MB': one layer at each end needs"):
        chosen(100e6)
    all_kept = run.surrogate.model_copy(update={"layers": 4})
    with pytest.raises(SplitError, match="leave no trunk beside the surrogate"):
        run = run.model_copy(update={"surrogate": all_kept})
        chosen(10e9)


def test_sizes_splits_and_models_that_are_none_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert [num_bytes(text) for text in ("4GB", "0.5 GiB", "300mb")] == [4 * 10**9, 2**29, 3 * 10**8]
    for text in ("4", "GB", "4 apples", "1.2.3GB", "much", "1e400 GB", "9" * 400 + "GB"):
        with pytest.raises(ConfigError, match=rf"split\.client-memory: expected a number and MB, .* not '{text}'"):
            RunConfig.from_flat({"split.client-memory": text})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no configuration can be read"):
        read_config(str(tmp_path))
    run = run_config(**{"model.name": str(checkpoint("llama"))})
    with pytest.raises(ConfigError, match=r"--split '4': expected layers"):
        rows_of(run, ["4"], Link(1e8, 0.02))
    assert [row["split"] for row in rows_of(run, ["1+2", "3+1"], Link(1e8, 0.02))] == ["1+3+2", "3+2+1"]


def test_a_step_takes_transfers_latency_and_computation_overlapped_as_far_as_they_can(
    checkpoint: Callable[[str], Path],
) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))

    def plan(**keys: Any) -> Plan:
        return make_plan(config, run_config(**keys))

    one = plan()
    link = Link(8e3, 0.5)  # 1 kB/s
    assert one.step_s(link) == pytest.approx((one.request_bytes + one.reply_bytes) / 1e3 + 0.5)
    busy = Link(8e12, 0.0, node_flops=one.node_flop, trunk_flops=one.trunk_flop / 3)
    assert one.step_s(busy) == pytest.approx(4.0, rel=1e-3)
    four = {"train.accumulation": 4}
    assert plan(**four, **{"trunk.in-flight": 1}).step_s(busy) == pytest.approx(16.0, rel=1e-3)
    assert plan(**four, **{"trunk.in-flight": 4}).step_s(busy) == pytest.approx(7.0, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "mpt", "opt-projected", "minimax"])
def test_what_the_trunk_keeps_of_a_token_is_planned_to_the_byte(name: str, tmp_path: Path) -> None:
    family = next(f for f in DECODERS if f.name == name)
    family.save(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = on_meta(family.config(), examine(family.config()), dtype)
        planned = key_value_bytes(model, range(2, 4))
        measured = bytes_per_token(load_trunk(tmp_path, 2, 2, dtype=dtype))
        assert planned == measured
        assert (planned == 0) == (name == "minimax")
        assert model.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_what_the_trunk_keeps_is_planned_for_every_family(family: Family, tmp_path: Path) -> None:
    family.save(tmp_path)
    model = on_meta(family.config(), examine(family.config()), torch.float32)
    assert key_value_bytes(model, range(2, 4)) == bytes_per_token(load_trunk(tmp_path, 2, 2))


def test_a_row_says_what_the_trunk_keeps_of_a_token(checkpoint: Callable[[str], Path]) -> None:
    [row] = rows_of(run_config(**{"model.name": str(checkpoint("llama"))}), ["2+2"], Link(1e8, 0.02))
    assert row["cache B/token"] == bytes_per_token(load_trunk(checkpoint("llama"), 2, 2))
