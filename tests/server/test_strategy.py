"""What is shared and how it is combined, through the whole app in this process."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import InProcessGrid, run_app, trained_node
from flwr.app import Error, Message
from flwr.serverapp.strategy import strategy_utils
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import client_app
from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import AggregationError, ConfigError, RoundFailed
from fl_split.model import adapters
from fl_split.node.evaluate import evaluate
from fl_split.node.steps import RoundResult
from fl_split.node.train import train_round
from fl_split.server.strategy import _check_numbers

Run = Callable[..., InProcessGrid]


class PoorGrid(InProcessGrid):
    """One on which some nodes fail, never answer, or leave: round -> what becomes of which node."""

    troubles: ClassVar[dict[int, dict[int, str]]] = {}  # round -> node -> "fails", "offline", "silent" or "leaves"

    def trouble(self, message: Message) -> str:
        server_round = int(message.content["config"]["server-round"])
        return self.troubles.get(server_round, {}).get(message.metadata.dst_node_id, "")

    def get_node_ids(self) -> list[int]:
        self.looks = getattr(self, "looks", 0) + 1
        gone = self.troubles.get(0, {}) if self.looks > 1 else {}
        return [node for node in self.contexts if node not in gone]

    def answer(self, message: Message) -> Message:
        trouble = self.trouble(message)
        if trouble == "fails":
            return Message(Error(2, "ValueError: the disk is full"), reply_to=message)
        if trouble == "offline":  # an error that the SuperLink makes up: it comes from node 1, itself
            reply = Message(Error(5, "Error: Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return reply
        return super().answer(message)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        ids = super().push_messages(asked)
        self.silent = {i for i, message in zip(ids, asked, strict=True) if self.trouble(message) == "silent"}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return super().pull_messages([i for i in message_ids if i not in self.silent])


@pytest.fixture
def run(demo_model: Path, tmp_path: Path) -> Run:
    """Run the app in this process on the demo, with few short steps."""

    def run(
        name: str = "x",
        *,
        nodes: int = 2,
        ranks: tuple[int, ...] = (),
        grid_class: type[InProcessGrid] = InProcessGrid,
        **changes: Any,
    ) -> InProcessGrid:
        defaults = {
            "train.batch-size": 4,
            "data.max-length": 32,
            "surrogate.kind": "identity",
            "aggregation.share": "top",
        }
        own = [{"lora.rank": rank} for rank in ranks]
        return run_app(tmp_path, name, nodes=nodes, grid_class=grid_class, node_config=own, **{**defaults, **changes})

    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shared(folder: Path, number: int = 2) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"round-{number:04d}" / "shared.safetensors")


def sent(grid: InProcessGrid, number: int) -> list[dict[str, Tensor]]:
    """What nodes shared in a round, by partition."""
    replies = [r.content for r in grid.replies.values()][2 * (number - 1) : 2 * number]
    replies.sort(key=lambda content: content["metrics"]["partition-id"])
    return [content["arrays"].to_torch_state_dict() for content in replies]


@pytest.mark.parametrize(("tensors", "private"), [("a-only", ".lora_B."), ("b-only", ".lora_A.")])
def test_only_the_named_tensors_leave_the_node(run: Run, tmp_path: Path, tensors: str, private: str) -> None:
    grid = run(**{"aggregation.tensors": tensors})
    for reply in grid.replies.values():
        names = set(reply.content["arrays"])
        assert names and not any(private in name for name in names)
    adapters = [load_file(tmp_path / "x" / "nodes" / str(i) / "adapter" / "adapter_model.safetensors") for i in (0, 1)]
    same = {n for n in adapters[0] if torch.equal(adapters[0][n], adapters[1][n])}
    top_a = {n for n in adapters[0] if ".lora_A." in n and ("layers.6" in n or "layers.7" in n)}
    assert same == (top_a if tensors == "b-only" else set())  # FFA-LoRA: A stays where it began


def effect(state: dict[str, Tensor], name: str, scaling: float) -> Tensor:
    return scaling * state[name.replace("lora_A", "lora_B")].double() @ state[name].double()


def test_svd_gives_nodes_of_different_ranks_the_mean_of_their_products(run: Run, tmp_path: Path) -> None:
    grid = run(ranks=(4, 8), **{"aggregation.combine": "svd", "aggregation.weighting": "equal"})
    a, b = sent(grid, 1)
    name = next(n for n in a if ".lora_A." in n)
    assert (len(a[name]), len(b[name])) == (4, 8)
    mean = (effect(a, name, 16 / 4) + effect(b, name, 16 / 8)) / 2  # alpha = 16 on both
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    best = u[:, :8] @ torch.diag(s[:8]) @ v[:8]
    received = grid.instructions[2].content["arrays"].to_torch_state_dict()
    torch.testing.assert_close(effect(received, name, 1.0), best, rtol=1e-3, atol=1e-6)
    assert metrics(tmp_path / "x")[-1]["shared-bytes"] > 0


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("combine", ["stack", "exact"])
def test_export_carries_what_was_added_to_the_model(
    run: Run, tmp_path: Path, combine: str, variant: str, demo_model: Path
) -> None:
    ranks = (4, 8) if combine == "stack" else (8, 8)
    grid = run(ranks=ranks, **{"aggregation.combine": combine, "lora.variant": variant})
    received = grid.instructions[2].content["arrays"].to_torch_state_dict()
    residual = {n: x for n, x in received.items() if "residual" in n}
    assert residual
    folder = tmp_path / "x" / "nodes" / "0" / "adapter"
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model), folder).eval()
    ids = torch.randint(3, full.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = trained_node(tmp_path / "x", 0, demo_model, received, ranks[0])(input_ids=ids).logits
        own = trained_node(tmp_path / "x", 0, demo_model, {}, ranks[0])(input_ids=ids).logits
        torch.testing.assert_close(full(input_ids=ids).logits, whole, rtol=0, atol=1e-4)
    assert (whole - own).abs().max() > 0.01


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_resumed_run_equals_an_undisturbed_one_with_the_servers_own_optimizer(
    run: Run, tmp_path: Path, strategy: str
) -> None:
    run(**{"aggregation.strategy": strategy})
    whole = shared(tmp_path / "x")
    assert whole and {value.dtype for value in whole.values()} == {torch.float32}  # FedAdam's are float64
    shutil.rmtree(tmp_path / "x" / "checkpoints" / "round-0002")  # killed before its record of round 2
    run(**{"aggregation.strategy": strategy, "run.resume": True})
    again = shared(tmp_path / "x")
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)
    state = load_file(tmp_path / "x" / "checkpoints" / "round-0002" / "server.safetensors")
    assert any(value.abs().max() > 0 for value in state.values())


def test_clipped_and_noised_updates_have_an_epsilon_that_resume_does_not_forget(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    changes = {"dp.mode": "client-fixed", "dp.clipping-norm": 0.05, "aggregation.weighting": "equal"}
    grid = run(**changes, **{"num-server-rounds": 1})
    start = grid.instructions[0].content["arrays"].to_torch_state_dict()
    for state in sent(grid, 1):
        moved = math.sqrt(sum(float((state[n] - start[n]).square().sum()) for n in state))
        assert 0.04 < moved < 0.0501
    run(**changes, **{"run.resume": True})
    first, second = (e["epsilon"] for e in metrics(tmp_path / "x") if "epsilon" in e)
    assert 0 < first < second


def test_server_side_clipping_bounds_the_round(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    grid = run(**{"dp.mode": "server-fixed", "dp.clipping-norm": 1e-3, "dp.noise-multiplier": 1e-3,
                  "aggregation.weighting": "equal", "num-server-rounds": 1})  # fmt: skip
    start, end = grid.instructions[0].content["arrays"].to_torch_state_dict(), shared(tmp_path / "x", 1)
    assert 1e-4 < math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in end)) < 1.2e-3


@pytest.mark.parametrize(
    ("mode", "multiplier", "noise"),
    [
        ("client-fixed", 1.0, 1.0), ("server-fixed", 1.0, 1.0),
        # Flower's count of clipped updates has noise of nodes / 20 = 0.1, and a part of the budget (arXiv 1905.03871)
        ("client-adaptive", 0.1, (0.1**-2 - (2 * 0.1) ** -2) ** -0.5),
        ("server-adaptive", 0.1, (0.1**-2 - (2 * 0.1) ** -2) ** -0.5),
    ],
)  # fmt: skip
def test_noise_is_as_large_as_asked_for_and_an_update_of_nothing_is_no_error(
    run: Run, tmp_path: Path, mode: str, multiplier: float, noise: float
) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    still = {"train.bottom-lr": 0.0, "train.top-lr": 0.0, "num-server-rounds": 1, "train.steps": 1}
    private = {"dp.mode": mode, "dp.noise-multiplier": multiplier, "aggregation.weighting": "equal"}
    grid = run(**still, **private)
    start, end = grid.instructions[0].content["arrays"].to_torch_state_dict(), shared(tmp_path / "x", 1)
    for state in sent(grid, 1):
        assert all((state[n] - start[n]).abs().max() < 1e-6 for n in start)
    server = load_file(tmp_path / "x" / "checkpoints" / "round-0001" / "server.safetensors")
    moved = torch.cat([(end[n] - start[n]).flatten() for n in end])
    assert moved.std().item() == pytest.approx(noise * server["clipping-norm"].item() / 2, rel=0.05)


def test_spent_privacy_budget_ends_the_run_and_keeps_its_rounds(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    changes = {"dp.mode": "client-fixed", "aggregation.weighting": "equal", "dp.max-epsilon": 6.0}
    run(**changes, **{"num-server-rounds": 9, "train.steps": 1})
    entries = metrics(tmp_path / "x")
    assert 1 <= entries[-1]["round"] < 9 and entries[-1]["epsilon"] <= 6


def test_adaptive_clipping_moves_its_norm_and_remembers_it(run: Run, tmp_path: Path) -> None:
    run(
        **{
            "dp.mode": "client-adaptive",
            "dp.clipping-norm": 0.05,
            "dp.noise-multiplier": 0.1,
            "aggregation.weighting": "equal",
        }
    )
    state = load_file(tmp_path / "x" / "checkpoints" / "round-0002" / "server.safetensors")
    assert state["clipping-norm"].item() != 0.05
    assert "epsilon" not in metrics(tmp_path / "x")[-1]


@pytest.mark.parametrize(("strategy", "expected"), [("fedprox", 0.5), ("fedavg", 0.0)])
def test_proximal_mu_reaches_the_node(
    run: Run, strategy: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def run_round(*args: Any) -> RoundResult:
        seen.append(args[-1].proximal_mu)
        return honest(*args)

    honest = client_app.run_round
    monkeypatch.setattr(client_app, "run_round", run_round)
    run(**{"aggregation.strategy": strategy, "aggregation.proximal-mu": 0.5, "num-server-rounds": 1, "train.steps": 1})
    assert seen == [expected, expected]


def test_evaluation_tells_the_base_the_shared_part_and_the_whole_apart(run: Run, tmp_path: Path) -> None:
    run(**{"train.steps": 8})
    first, second = (e for e in metrics(tmp_path / "x") if e.get("partition-id") == 0)
    assert first["heldout-loss-base"] == first["heldout-loss-shared"] == first["heldout-loss-before"]
    assert second["heldout-loss-base"] == first["heldout-loss-base"]  # measured once a run
    assert second["heldout-loss-shared"] < second["heldout-loss-base"]  # the others helped
    assert second["heldout-loss-before"] < second["heldout-loss-shared"]  # and so did the private bottom


def test_a_alone_is_the_base_and_takes_no_pass_of_its_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[dict[str, float]] = []
    monkeypatch.setattr("fl_split.node.ready.evaluate", lambda *args: passes.append(evaluate(*args)) or passes[-1])
    run(**{"aggregation.tensors": "a-only"})
    assert len(passes) == 2 * (3 + 2)  # base, before and after on two nodes; base once a run
    for entry in (entry for entry in metrics(tmp_path / "x") if "partition-id" in entry):
        assert entry["heldout-loss-shared"] == entry["heldout-loss-base"]


def test_different_ranks_are_refused_where_factors_are_averaged(run: Run) -> None:
    with pytest.raises(AggregationError, match="alpha/rank is 2 on node .* use 'svd' or 'stack'"):
        run(ranks=(4, 8))


def test_different_ranks_are_no_matter_where_nothing_is_shared(run: Run, tmp_path: Path) -> None:
    run(ranks=(4, 8), **{"aggregation.share": "none", "num-server-rounds": 1})
    assert len(metrics(tmp_path / "x")) == 3


@pytest.mark.parametrize("combine", ["mean", "svd", "stack"])
def test_wrong_scaling_is_refused_by_the_name_of_its_node(
    run: Run, combine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_round(config: RunConfig, node: NodeConfig, *args: Any) -> RoundResult:
        result = honest(config, node, *args)
        return replace(result, scaling=1.0) if node.partition_id == 1 else result

    honest = client_app.run_round
    monkeypatch.setattr(client_app, "run_round", run_round)
    with pytest.raises(AggregationError, match=r"node 1001 says that alpha/rank is 1, but lora\.alpha=16 .*rank 8"):
        run(**{"aggregation.combine": combine})


# ---------------------------------------------------------------------------------------- nodes that fail or leave


def poor_grid(**troubles: dict[int, str]) -> type[PoorGrid]:
    """`PoorGrid` with troubles by round, such as ``round_2={1000: "fails"}``; ``round_0``: who leaves after a look."""
    by_round = {int(name.removeprefix("round_")): who for name, who in troubles.items()}
    return type("Grid", (PoorGrid,), {"troubles": by_round})


THREE = {"data.partitioner": "iid"}  # the demo's two files for more nodes


def test_nodes_that_fail_are_named_even_if_flower_answers_for_them(run: Run) -> None:
    grid = poor_grid(round_1={1000: "fails", 1002: "offline"})
    with pytest.raises(RoundFailed, match="1 nodes finished") as failed:
        run(nodes=3, grid_class=grid, **THREE)
    assert str(failed.value).splitlines()[1:] == [
        "  the node with Flower's id 1000: ValueError: the disk is full",
        "  the node with Flower's id 1002: Error: Node Unavailable",
    ]


def test_round_does_not_wait_longer_than_its_timeout_for_a_node_that_never_answers(run: Run, tmp_path: Path) -> None:
    grid = poor_grid(round_1={1001: "silent"})
    started = time.monotonic()
    with pytest.raises(RoundFailed, match=r"id 1001: did not answer within run\.round-timeout=0\.25"):
        run(grid_class=grid, **{"run.round-timeout": 0.25})
    assert time.monotonic() - started < 60
    run("y", grid_class=grid, **{"run.round-timeout": 0.25, "aggregation.min-nodes": 1, "num-server-rounds": 1})
    assert [entry.get("partition-id") for entry in metrics(tmp_path / "y")] == [0, None]


def test_node_that_leaves_just_before_it_is_asked_is_not_waited_for_without_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("Flower waits for a node without end")

    monkeypatch.setattr(strategy_utils, "sleep", sleep)
    with pytest.raises(RoundFailed, match="1 of the 2 nodes that aggregation.min-nodes asks for"):
        run(grid_class=poor_grid(round_0={1001: "leaves"}), **{"run.node-wait-s": 0.0})
    assert [entry["round"] for entry in metrics(tmp_path / "x")] == [1, 1, 1]


def test_a_node_that_shares_what_is_not_finite_is_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_round(config: RunConfig, node: NodeConfig, *args: Any) -> RoundResult:
        result = node_round(config, node, *args)
        bad = {name: torch.full_like(value, torch.nan) for name, value in result.shared.items()}
        return replace(result, shared=bad) if node.partition_id == 1 else result

    node_round = client_app.run_round
    monkeypatch.setattr(client_app, "run_round", run_round)
    run(**{"num-server-rounds": 1, "aggregation.min-nodes": 1})
    assert all(bool(torch.isfinite(value).all()) for value in shared(tmp_path / "x", 1).values())
    assert "round 1 goes on without node 1: sent weights that are not finite" in caplog.text
    with pytest.raises(RoundFailed, match="1 nodes finished.*\n.*node 1: sent weights that are not finite"):
        run("y", **{"num-server-rounds": 1})


@pytest.mark.parametrize("combine", ["mean", "svd", "stack"])
def test_node_that_missed_a_round_catches_up(
    run: Run, tmp_path: Path, combine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[dict[str, Tensor]] = []  # scaling * B A of the top's modules, when a node begins to train

    def spy(model: PeftModel, *args: Any) -> Any:
        layers = {
            n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapters.part_of(model, n) == "top"
        }
        starts.append({n: sum(m.get_delta_weight(a).detach() for a in m.active_adapters) for n, m in layers.items()})
        return train_round(model, *args)

    monkeypatch.setattr("fl_split.node.steps.train_round", spy)
    changes = {"aggregation.combine": combine, "num-server-rounds": 3}
    run(nodes=3, grid_class=poor_grid(round_2={1002: "fails"}), **THREE, **changes)
    nodes = [entry for entry in metrics(tmp_path / "x") if "partition-id" in entry]
    assert [(e["round"], e["partition-id"], e["rounds-missed"]) for e in nodes] == [
        (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 0), (2, 1, 0), (3, 0, 0), (3, 1, 0), (3, 2, 1),
    ]  # fmt: skip
    assert "round 2 goes on without node 2: ValueError: the disk is full" in caplog.text
    first, *others = starts[-3:]
    assert first and all(product.abs().max() > 0 for product in first.values())
    for other in others:
        for name, product in first.items():
            torch.testing.assert_close(other[name], product, rtol=1e-4, atol=1e-6)


def test_two_nodes_of_one_number_are_named() -> None:
    _check_numbers([{"partition-id": 0, "node": 7}, {"partition-id": 1, "node": 8}])
    with pytest.raises(ConfigError, match="nodes 7 and 9 both have partition-id=0: give each SuperNode a number"):
        _check_numbers([{"partition-id": 0, "node": 7}, {"partition-id": 0, "node": 9}])
