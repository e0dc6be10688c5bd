"""A node's own adapter beside one that is shared: each is that of its own run, and what is kept, said and refused."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, run_app
from flwr.app import ArrayRecord, Message
from safetensors.torch import load_file
from torch import Tensor

from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import ConfigError, FLSplitError, TrunkUnavailable
from fl_split.model.slots import trunk_calls_of
from fl_split.node import personal
from fl_split.node.round import PersonalRound
from fl_split.node.state import NodeFolder, SavedRound
from fl_split.node.trial import Gain

PERSONAL = {"aggregation.personal": True, "aggregation.share": "both", "aggregation.min-nodes": 3}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three nodes of 75 alike rows, two rounds: the run's folder."""
    data = tmp_path_factory.mktemp("data")
    for node in range(3):
        rows = [{"question": f"number {i}?", "answer": f"it is {i * 7 % 10}"} for i in range(node, 225, 3)]
        (data / f"{node}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data.path": str(data), "data.holdout": 0.4, "data.max-length": 32, "train.batch-size": 8}

    @cache
    def once(*changes: tuple[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("run")
        run_app(folder, nodes=3, **{**common, "train.steps": 3, **dict(changes)})
        return folder / "x"

    return lambda **changes: once(*sorted(changes.items()))


def kept(folder: Path, node: int) -> SavedRound:
    """What a node has on its own disk of the second round."""
    [run_id] = [state.name for state in (folder / "nodes" / str(node) / "state").iterdir()]
    saved = NodeFolder(folder / "nodes" / str(node), run_id).load_before(3)
    assert saved is not None and saved.number == 2
    return saved


def entries(folder: Path) -> list[dict[str, Any]]:
    """A node's metrics of the second round, by node."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["round"] == 2 and "partition-id" in entry]


# ---------------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize("combine", ["mean", "svd", "stack", "exact"])
def test_own_adapter_is_that_of_a_run_that_shares_nothing_bit_for_bit(run: Run, combine: str) -> None:
    alone, shared = run(), run(**PERSONAL, **{"aggregation.combine": combine})
    for node in range(3):
        expected, got = kept(alone, node), kept(shared, node)
        for field in ("adapter", "optimizer"):
            wanted, values = getattr(expected, field), getattr(got, field)
            assert wanted and wanted.keys() == values.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in values.items()), field


class Poisoned(InProcessGrid):
    """A server that sends what cannot be trained on."""

    def answer(self, message: Message) -> Message:
        arrays = message.content.array_records["arrays"].to_torch_state_dict()
        message.content["arrays"] = ArrayRecord({name: torch.full_like(x, torch.nan) for name, x in arrays.items()})
        return super().answer(message)


@pytest.mark.parametrize(("share", "why"), [("top", "the loss is not finite"), ("both", ".* holds NaN or infinite")])
def test_own_adapter_is_kept_when_what_is_shared_cannot_be_trained_on(
    run: Run, tmp_path: Path, share: str, why: str
) -> None:
    alone = run()
    told = json.loads((alone / "run.json").read_text())["config"]
    changes = {**told, **PERSONAL, "aggregation.share": share, "run.dir": str(tmp_path)}
    with pytest.raises(FLSplitError, match=rf"beside this node's own adapter, which is kept: {why}"):
        run_app(tmp_path, nodes=3, grid_class=Poisoned, **changes)
    for node in range(3):
        expected, got = kept(alone, node), kept(tmp_path / "x", node)
        assert all(torch.equal(value, expected.adapter[name]) for name, value in got.adapter.items())
        assert all(torch.equal(value, expected.optimizer[name]) for name, value in got.optimizer.items())
        assert all(torch.isfinite(value).all() for value in got.shared_adapter.values())


class Gone:
    """A trunk that does not answer any more."""

    def start(self, *_: object) -> "Future[Tensor]":
        raise TrunkUnavailable("no trunk answers")


@pytest.mark.parametrize("step", ["run_steps", "weigh"])
def test_own_adapter_is_kept_when_the_trunk_goes_away_before_the_round_ends(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    alone, usual, calls = run(), getattr(PersonalRound, step), Counter[int]()

    def unplugged(this: PersonalRound, *arguments: Any, **more: Any) -> Any:
        calls[this.node.partition_id] += 1
        last = {"run_steps": 4, "weigh": 2}[step]  # of the second round
        if calls[this.node.partition_id] == last:
            monkeypatch.setattr(trunk_calls_of(this.model.get_base_model()), "trunk", Gone())
        return usual(this, *arguments, **more)

    monkeypatch.setattr(PersonalRound, step, unplugged)
    told = json.loads((alone / "run.json").read_text())["config"]
    with pytest.raises(FLSplitError, match="beside this node's own adapter, which is kept: no trunk answers"):
        run_app(tmp_path, nodes=3, **{**told, **PERSONAL, "run.dir": str(tmp_path)})
    for node in range(3):
        expected, got = kept(alone, node), kept(tmp_path / "x", node)
        assert all(torch.equal(value, expected.adapter[name]) for name, value in got.adapter.items())
        assert all(torch.equal(value, expected.optimizer[name]) for name, value in got.optimizer.items())
        assert got.shared_adapter and got.scores["exported"]["round"] in (1, 2)


@pytest.mark.usefixtures("demo_model")
def test_own_adapter_is_kept_when_memory_is_too_little_for_the_second_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"number {i}?", "answer": f"it is {i % 10}"} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"data.path": f"{tmp_path}/a.jsonl", "num-server-rounds": 1, "train.steps": 1, "surrogate.kind": "none"}
    run_app(tmp_path, "alone", nodes=3, **short)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PersonalRound, "train_shared", full)
    with pytest.raises(FLSplitError, match="aggregation.min-nodes is 3"):
        run_app(tmp_path, "x", nodes=3, **short, **{**PERSONAL, "aggregation.share": "top"})
    for node in range(3):
        files = [list((tmp_path / name / f"nodes/{node}/state").glob("*/round-0001")) for name in ("alone", "x")]
        [expected], [got] = ([load_file(path / "adapter.safetensors") for path in paths] for paths in files)
        assert expected and all(torch.equal(value, expected[name]) for name, value in got.items())


def test_export_with_weight_0_is_that_of_a_run_that_shares_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "GRID", ())
    alone, shared = run(), run(**PERSONAL, **{"train.keep": "last"})
    for node in range(3):
        file = f"nodes/{node}/adapter/adapter_model.safetensors"
        expected, got = load_file(alone / file), load_file(shared / file)
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in got.items())
        assert entries(shared)[node]["gain-over-alone"] == 0


def test_metrics_say_what_the_others_are_worth_on_examples_that_chose_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personal, "gain", lambda alone, mixed: Gain(1.0))  # the first of the grid is chosen
    for entry in entries(run(**PERSONAL, **{"aggregation.combine": "stack", "num-server-rounds": 2})):
        assert (entry["shared-weight-bottom"], entry["shared-weight-top"]) == (0.25, 0.25)
        gain, error = entry["gain-over-alone"], entry["gain-over-alone-error"]
        assert gain == pytest.approx(entry["heldout-loss-alone"] - entry["heldout-loss-after"], abs=1e-4)
        assert gain != 0 and 0 < error < 0.1
        assert entry["heldout-loss-selection"] != entry["heldout-loss-after"]


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation.combine": "mean"},
        {"aggregation.combine": "svd"},
        {"aggregation.combine": "stack"},
        {"aggregation.combine": "exact"},
        {"aggregation.share": "top", "lora.dropout": 0.2},
        {"aggregation.strategy": "fedprox", "aggregation.proximal-mu": 10.0},
        {"aggregation.strategy": "fedavgm", "aggregation.server-lr": 1.5, "aggregation.server-momentum": 0.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_is_shared_is_that_of_a_run_without_bit_for_bit(run: Run, changes: dict[str, Any]) -> None:
    plain = run(**{**PERSONAL, **changes, "aggregation.personal": False})
    personal = run(**{**PERSONAL, **changes})
    file = "checkpoints/round-0002/shared.safetensors"
    expected, got = load_file(plain / file), load_file(personal / file)
    assert got and got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    for node in range(3):
        wanted, values = kept(plain, node), kept(personal, node)
        assert values.shared_adapter.keys() == wanted.adapter.keys() != set()
        assert all(torch.equal(value, wanted.adapter[name]) for name, value in values.shared_adapter.items())
        assert all(torch.equal(value, wanted.optimizer[name]) for name, value in values.shared_optimizer.items())
        assert any(not torch.equal(value, values.adapter[name]) for name, value in values.shared_adapter.items())


@pytest.mark.parametrize("share", ["both", "top"])
def test_loss_of_what_came_from_the_server_is_that_of_a_run_without(run: Run, share: str) -> None:
    few = {**PERSONAL, "aggregation.share": share, "data.holdout": 0.1}  # no halves: all is reported
    plain, shared = (entries(run(**{**few, "aggregation.personal": personal})) for personal in (False, True))
    for expected, got in zip(plain, shared, strict=True):
        assert got["heldout-loss-shared"] == expected["heldout-loss-shared"] != got["heldout-loss-base"]


def test_adapter_is_not_mixed_with_itself(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(personal, "weigh", lambda *_: asked.append(1) or ({}, (torch.ones(9), torch.ones(9))))
    told = json.loads((run() / "run.json").read_text())["config"]
    server = {"aggregation.strategy": "fedavgm", "num-server-rounds": 2}  # it sends all nodes what they begin with
    run_app(tmp_path, nodes=3, **{**told, **PERSONAL, **server, "run.dir": str(tmp_path)})
    assert len(asked) == 3  # not in the first round


@pytest.mark.usefixtures("demo_model")
def test_a_node_with_too_few_examples_to_choose_by_shares_with_others_that_have_enough(tmp_path: Path) -> None:
    for node, count in enumerate((90, 30, 90)):
        numbers = range(100 * node, 100 * node + count)
        rows = [{"question": f"number {i}?", "answer": f"it is {i % 10}"} for i in numbers]
        (tmp_path / f"{node}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"data.path": f"{tmp_path}/*.jsonl", "data.holdout": 0.4, "train.steps": 1, "surrogate.kind": "none"}
    run_app(tmp_path, nodes=3, **short, **{**PERSONAL, "aggregation.share": "top"})
    few, enough = entries(tmp_path / "x")[1], entries(tmp_path / "x")[2]
    assert few.keys() == enough.keys() and few["partition-id"] == 1
    assert few["heldout-loss-selection"] == few["heldout-loss-after"] == few["heldout-loss-alone"]
    assert enough["heldout-loss-selection"] != enough["heldout-loss-after"]


def test_scores_of_few_examples_are_withheld_by_how_many_each_is_of(run: Run, tmp_path: Path) -> None:
    asked = {**PERSONAL, "data.path": json.loads((run() / "run.json").read_text())["config"]["data.path"]}
    own = [{"metrics-least": 25}, {"metrics-least": 8}]  # 30 to 40 examples are held out
    run_app(tmp_path, nodes=3, node_config=own, **asked, **{"num-server-rounds": 1, "data.holdout": 0.4})
    lines = map(json.loads, (tmp_path / "x" / "metrics.jsonl").read_text().splitlines())
    nodes = {entry["partition-id"]: entry for entry in lines if "partition-id" in entry}
    for key in ("heldout-loss-after", "heldout-loss-selection", "gain-over-alone"):
        assert nodes[0][key] is None and nodes[1][key] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregation.share": "none"}, r"share='none': there is nothing to add"),
        ({"aggregation.tensors": "a-only"}, r"tensors='a-only': half of"),
        ({"lora.variant": "dora"}, r"variant='dora': its update"),
        ({"aggregation.min-nodes": 2}, r"min-nodes=2: the mean of two adapters shows each node the other's"),
        (
            {
                "aggregation.share-head": True,
                "task": "sequence-classification",
                "data.labels": "a,b",
                "data.text": "t",
            },
            r"share-head=true: a head is no product",
        ),
    ],
)
def test_what_breaks_the_promise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregation\.personal=true does not go with .*{message}"):
        RunConfig.from_flat({**PERSONAL, **changes})


def test_auto_is_personal_where_that_goes_together_with_what_is_shared() -> None:
    shares = {"aggregation.share": "top", "aggregation.min-nodes": 3}
    assert RunConfig.from_flat(shares).is_personal
    assert RunConfig.from_flat({**shares, "aggregation.strategy": "fedavgm"}).num_trainings == 2
    for other in (
        {"aggregation.share": "none"},
        {"aggregation.min-nodes": 2},
        {"aggregation.tensors": "a-only"},
        {"lora.variant": "dora"},
        {"aggregation.personal": False},
        {"dp.record-noise-multiplier": 1.0, "surrogate.kind": "none", "train.keep": "last"},
    ):
        config = RunConfig.from_flat({**shares, **other})
        assert not config.is_personal and config.num_trainings == 1


@pytest.mark.usefixtures("demo_model")
@pytest.mark.parametrize(("least", "said"), [(2, "no adapter of their own (aggregation.min"), (3, "an adapter")])
def test_auto_is_said_and_done(tmp_path: Path, caplog: pytest.LogCaptureFixture, least: int, said: str) -> None:
    caplog.set_level("INFO")
    rows = [{"question": f"number {i}?", "answer": "it is"} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"data.path": f"{tmp_path}/a.jsonl", "num-server-rounds": 1, "train.steps": 1, "surrogate.kind": "none"}
    run_app(tmp_path, nodes=3, **short, **{"aggregation.share": "top", "aggregation.min-nodes": least})
    assert f"sharing: aggregation.personal='auto', so nodes train {said}" in caplog.text
    lines = map(json.loads, (tmp_path / "x" / "metrics.jsonl").read_text().splitlines())
    assert any("gain-over-alone" in entry for entry in lines) == (least == 3)


def test_a_nodes_own_privacy_does_not_change_what_all_nodes_do() -> None:
    fits: dict[str, Any] = {"surrogate.kind": "none", "train.keep": "last", "aggregation.share": "top"}
    own = NodeConfig(record_noise_multiplier=1.0)
    assert not own.with_record_dp(RunConfig.from_flat(fits)).is_personal
    with pytest.raises(ConfigError, match=r"personal=true does not go with dp\.record-noise-multiplier: private"):
        own.with_record_dp(RunConfig.from_flat({**fits, "aggregation.min-nodes": 3}))


@pytest.mark.parametrize("value", ["maybe", 1])
def test_what_is_neither_yes_nor_no_nor_auto_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"  aggregation\.personal: expected true, false, or 'auto'$"):
        RunConfig.from_flat({"aggregation.personal": value})


def test_two_nodes_may_with_noise() -> None:
    noisy = {"dp.mode": "client-fixed", "aggregation.weighting": "equal", "aggregation.min-nodes": 2}
    assert RunConfig.from_flat({**PERSONAL, **noisy}).is_personal
