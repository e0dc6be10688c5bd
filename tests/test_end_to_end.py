"""The whole app: rounds, results on disk, resume, and a trunk that dies."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, run_app
from flwr.app import Context, RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import client_app
import server_app
from fl_split.config import Lora, RunConfig, Train
from fl_split.errors import ConfigError, NodeStateError, RoundFailed, SplitError, TrunkUnavailable
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.trunk import server
from fl_split.trunk.layers import hold_layers

Run = Callable[..., InProcessGrid]


@pytest.fixture
def run(demo_model: Path, tmp_path: Path) -> Run:
    """Run the app in this process on the demo, with few short steps."""

    def run(name: str = "x", *, nodes: int = 2, **changes: Any) -> InProcessGrid:
        # constant, so that a run of two rounds is the beginning of one of three
        defaults = {"train.steps": 3, "train.scheduler": "constant", "data.holdout": 0.05}
        return run_app(tmp_path, name, nodes=nodes, **{**defaults, **changes})

    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, node: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "nodes" / str(node) / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_demo_run_trains_each_node_and_exports_its_adapter(run: Run, tmp_path: Path, demo_model: Path) -> None:
    run("x", **{"train.steps": 15})
    entries = metrics(tmp_path / "x")
    assert [(e["round"], e.get("partition-id", "all")) for e in entries] == [
        (1, 0), (1, 1), (1, "all"), (2, 0), (2, 1), (2, "all"),
    ]  # fmt: skip
    for node in range(2):
        first, last = (e for e in entries if e.get("partition-id") == node)
        assert last["heldout-loss-after"] < first["heldout-loss-before"] - 0.5
        assert last["heldout-loss-before"] == pytest.approx(first["heldout-loss-after"])
        assert last["activation-bytes"] > 0
    assert not same(weights(tmp_path / "x", 0), weights(tmp_path / "x", 1))
    full = AutoModelForCausalLM.from_pretrained(demo_model)
    adapted = PeftModel.from_pretrained(full, tmp_path / "x" / "nodes" / "0" / "adapter")
    card = (tmp_path / "x" / "nodes" / "0" / "adapter" / "README.md").read_text()
    recipe = json.loads((tmp_path / "x" / "nodes" / "0" / "adapter" / "fl-split.json").read_text())
    assert recipe == {"framing": "{prompt}\n", "dtype": "float32", "wire-dtype": "bfloat16"}
    assert "| rounds | 2 of 2, 15 steps each |" in card
    assert adapted.peft_config["default"].layers_pattern == "layers"


def test_nodes_and_server_choose_the_same_split_and_packed_batches_train(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = {"split.client-memory": "10GB", "data.packing": True, "data.group-by-length": True}
    run("x", **{"num-server-rounds": 1, "data.max-length": 24, **options})
    assert caplog.text.count("split.bottom-layers=2 and split.top-layers=3 of 8 layers") == 3
    for entry in metrics(tmp_path / "x")[:2]:
        assert entry["bad-rows"] == 0
        assert entry["truncated-tokens"] >= entry["truncated-examples"] > 0
        assert entry["heldout-loss-after"] < entry["heldout-loss-before"]


def test_sharing_a_part_makes_it_equal_on_all_nodes_and_leaves_the_rest_private(run: Run, tmp_path: Path) -> None:
    grid = run("x", **{"aggregation.share": "top"})
    sent = [set(m.content["arrays"]) for m in grid.instructions]
    assert sent[0] == sent[1] == set()  # round 1: nodes start from the same seed
    assert sent[2] == sent[3] and all(".layers.6." in n or ".layers.7." in n for n in sent[2])
    shared = load_file(tmp_path / "x" / "checkpoints" / "round-0002" / "shared.safetensors")
    replies = [reply.content for reply in grid.replies.values()][2:]
    counts = torch.tensor([reply["metrics"]["num-examples"] for reply in replies], dtype=torch.float64)
    for name, value in shared.items():
        both = torch.stack([r["arrays"].to_torch_state_dict()[name].double() for r in replies])
        torch.testing.assert_close(
            value.double(), torch.tensordot(counts / counts.sum(), both, dims=1), rtol=0, atol=1e-6
        )


def test_run_resumed_after_a_kill_equals_an_undisturbed_one(run: Run, tmp_path: Path) -> None:
    run("whole", **{"aggregation.share": "top", "num-server-rounds": 3})
    run("cut", **{"aggregation.share": "top", "num-server-rounds": 2})
    # as if the server had been killed after the nodes' round 2 and before its own record of it
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "round-0002")
    run("cut", **{"aggregation.share": "top", "num-server-rounds": 3, "run.resume": True})
    for node in range(2):
        assert same(weights(tmp_path / "whole", node), weights(tmp_path / "cut", node))
    assert [e["round"] for e in metrics(tmp_path / "cut")] == [e["round"] for e in metrics(tmp_path / "whole")]


def test_a_resumed_run_has_its_own_configuration_on_server_and_nodes_and_one_numbering(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("x", **{"lora.rank": 4, "num-server-rounds": 1})
    given = {"run.dir": str(tmp_path), "run.name": "x", "run.resume": True, "num-server-rounds": 2}
    config = {**RunConfig().to_flat(), **given}
    grid = InProcessGrid(client_app.app, 2, config)
    grid.given = given
    caplog.set_level("INFO")
    caplog.clear()
    server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
    assert weights(tmp_path / "x", 0).popitem()[1].shape.count(4) == 1
    steps = [line for line in caplog.messages if "step 3/3" in line]  # 3, not the default of 30
    assert len(steps) == 2 and all("round 2/2" in line for line in steps)
    told = [line for line in caplog.messages if line.startswith("round ")]
    assert told[0] == "round 2/2: 2 nodes are asked" and all("2/2" in line for line in told)


def test_a_run_that_lost_its_models_name_to_flower_is_refused(run: Run, tmp_path: Path) -> None:
    config = {**RunConfig().to_flat(), "run.dir": str(tmp_path), "model.dtype": "bfloat16"}
    grid = InProcessGrid(client_app.app, 2, config)
    grid.given = {"run.dir": str(tmp_path), "model.dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"model\.dtype is given and model\.name is not"):
        server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))


def test_finished_run_resumed_does_nothing_and_says_where_everything_is(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("x", **{"num-server-rounds": 1})
    grid = run("x", **{"num-server-rounds": 1, "run.resume": True})
    assert not grid.instructions
    with pytest.raises(NodeStateError, match=r"run\.resume=true"):
        run("x")


def test_too_few_nodes_are_an_error_and_not_an_endless_wait(run: Run) -> None:
    with pytest.raises(RoundFailed, match=r"1 of the 2 nodes .*run\.node-wait-s=0"):
        run(nodes=1, **{"run.node-wait-s": 0.0})


def test_round_in_which_too_few_nodes_succeed_stops_the_run(run: Run, tmp_path: Path, jsonl: Any) -> None:
    good = jsonl([{"question": f"number {i}", "answer": f"{i}"} for i in range(10)], "data/a.jsonl".replace("/", "-"))
    (good.parent / "z.jsonl").write_text("{broken")
    with pytest.raises(RoundFailed, match=r"(?s)round 1: 1 nodes finished, but aggregation\.min-nodes is 2.*z\.jsonl"):
        run("x", **{"data.path": f"{good.parent}/*.jsonl"})
    assert metrics_or_none(tmp_path / "x") is None
    run("y", **{"data.path": f"{good.parent}/*.jsonl", "aggregation.min-nodes": 1, "num-server-rounds": 1})
    assert [e.get("partition-id") for e in metrics(tmp_path / "y")] == [0, None]


def metrics_or_none(folder: Path) -> list[dict[str, Any]] | None:
    return metrics(folder) if (folder / "metrics.jsonl").exists() else None


def test_impossible_split_is_refused_before_anything_starts(run: Run) -> None:
    with pytest.raises(SplitError, match=r"split\.bottom-layers=6 and split\.top-layers=2 leave no trunk"):
        run(**{"split.bottom-layers": 6})


def test_wrong_version_is_said_when_a_run_starts(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fl_split.plan.versions.requires", lambda name: ["torch>=999"])
    with pytest.raises(RoundFailed):
        run(nodes=0, **{"run.node-wait-s": 0.0})
    assert "versions: torch>=999 is wanted" in caplog.text


def test_missing_trunk_is_an_error_that_says_what_to_do(run: Run) -> None:
    with pytest.raises(RoundFailed, match=r"no trunk answers at 127\.0\.0\.1:9 .*fl-split trunk serve"):
        run(**{"trunk.address": "127.0.0.1:9", "trunk.timeout-s": 0.3})


def test_unmodified_transformers_trainer_trains_a_client(demo_model: Path, tmp_path: Path) -> None:
    client = load_ends(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)))
    model = adapters.attach(client, Lora(), train_bottom=True, seed=0)
    ids = torch.randint(3, client.config.vocab_size, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = adapters.adapter_state(model)
    options = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=5e-3, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    after = adapters.adapter_state(model)
    assert {adapters.part_of(model, n) for n in after if not torch.equal(after[n], before[n])} == {"bottom", "top"}


# -------------------------------------------------------------------------------------------- a trunk that dies


def serve(folder: str, port: int) -> None:
    with server.embedded(hold_layers(Path(folder), 2, 2), port):
        time.sleep(600)


@pytest.fixture
def trunk_process(demo_model: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A trunk in a process of its own: its address, and how to kill it (-9) and start another in its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = []

    def start() -> None:
        processes.append(spawn.Process(target=serve, args=(str(demo_model), port), daemon=True))
        processes[-1].start()

    def restart() -> None:
        os.kill(processes[-1].pid, signal.SIGKILL)
        processes[-1].join()
        start()

    start()
    yield f"127.0.0.1:{port}", restart
    processes[-1].kill()
    processes[-1].join()


def test_trunk_killed_and_restarted_in_mid_round_loses_no_step(
    demo_model: Path, trunk_process: tuple[str, Callable[[], None]]
) -> None:
    address, restart = trunk_process
    expected = Expected.from_checkpoint(demo_model, 2, 2)
    ids = torch.randint(3, 200, (6, 4, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    config = Train.model_validate({"steps": 6})

    def trained(disturb: Callable[[train.Step], None]) -> dict[str, torch.Tensor]:
        with TrunkConnection(address, expected, timeout_s=120) as trunk:
            model = adapters.attach(load_ends(demo_model, 2, 2, trunk), Lora(), train_bottom=True, seed=0)
            train.train_round(model, train.make_optimizer(model, config), iter(batches), config, on_step=disturb)
            return adapters.adapter_state(model)

    disturbed = trained(lambda step: restart() if step.number == 3 else None)
    assert same(disturbed, trained(lambda step: None))


def test_trunk_that_stays_away_is_an_error_within_the_time_limit(demo_model: Path) -> None:
    expected = Expected.from_checkpoint(demo_model, 2, 2)
    started = time.monotonic()
    with (
        TrunkConnection("127.0.0.1:9", expected, timeout_s=1) as trunk,
        pytest.raises(TrunkUnavailable, match="tried for 1 s"),
    ):
        trunk.connect()
    assert time.monotonic() - started < 10
