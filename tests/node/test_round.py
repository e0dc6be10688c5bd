"""A node's round as the app runs it: consent, what is kept between rounds, and what counts how much."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, run_app
from torch import Tensor

from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import FLSplitError
from fl_split.node.ready import Instructions
from fl_split.node.round import run_round
from fl_split.node.state import NodeFolder, SavedRound

Run = Callable[..., tuple[Path, InProcessGrid]]


@pytest.fixture(scope="module")
def run(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo's model, and two nodes of 39 and 9 examples to train on: a run's folder and what was said in it."""
    data = tmp_path_factory.mktemp("data")
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"question": f"number {i}?", "answer": f"it is {i}"} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data.path": str(data), "train.batch-size": 4, "train.scheduler": "constant", "data.max-length": 32}

    @cache
    def once(*changes: tuple[str, Any]) -> tuple[Path, InProcessGrid]:
        run_dir = tmp_path_factory.mktemp("run")
        return run_dir / "x", run_app(run_dir, **{**common, **dict(changes)})

    return lambda **changes: once(*sorted(changes.items()))


def kept(run_folder: Path, number: int) -> SavedRound:
    """What the first node has on its own disk of a round."""
    [run_id] = [state.name for state in (run_folder / "nodes" / "0" / "state").iterdir()]
    saved = NodeFolder(run_folder / "nodes" / "0", run_id).load_before(number + 1)
    assert saved is not None and saved.number == number
    return saved


def of_top(name: str) -> bool:
    return ".layers.6." in name or ".layers.7." in name


# ------------------------------------------------------------------------------------------------------- consent

NEEDED, GIVEN = "set allow-exact-gradient=true in --node-config", "/no-such-model"  # what the round then lacks


@pytest.mark.parametrize(
    ("kind", "own", "message"),
    [
        ("exact", {"data-path": "/mine"}, NEEDED),
        ("exact", {"out-dir": "/mine"}, NEEDED),
        ("exact", {"trunk-token-file": "/mine"}, NEEDED),  # its rows may be where the run's data.path says
        ("exact", {"data-path": "/mine", "allow-exact-gradient": True}, GIVEN),
        ("exact", {}, GIVEN),  # a simulation has nobody to ask
        ("blocks", {"data-path": "/mine"}, GIVEN),
    ],
)
def test_exact_gradients_need_the_consent_of_a_deployed_node(
    tmp_path: Path, kind: str, own: dict[str, Any], message: str
) -> None:
    of_run = {"surrogate.kind": kind, "trunk.exact-gradient": True, "model.name": GIVEN, "run.dir": str(tmp_path)}
    config = RunConfig.from_flat(of_run)
    node = NodeConfig.from_flat({"partition-id": 0, **own})
    with pytest.raises(FLSplitError, match=message):
        run_round(config, node, {}, Instructions(1, "x", "id", "127.0.0.1:9"))


# ----------------------------------------------------------------------------------------------- between rounds


def test_two_rounds_are_one_long_round_with_a_surrogate_that_learns(run: Run) -> None:
    """Adapter, surrogate, and what the optimizers of both remember."""
    learns = {"surrogate.kind": "distilled", "surrogate.layers": 1, "surrogate.distill-lr": 1e-3}
    long, _ = run(**learns, **{"num-server-rounds": 1, "train.steps": 4})
    short, _ = run(**learns)
    expected, first, last = kept(long, 1), kept(short, 1), kept(short, 2)
    for field in ("adapter", "optimizer", "surrogate", "surrogate_optimizer"):
        got, wanted = getattr(last, field), getattr(expected, field)
        assert wanted and got.keys() == wanted.keys(), field
        assert all(torch.equal(value, wanted[name]) for name, value in got.items()), field
    assert not any(torch.equal(value, first.surrogate[name]) for name, value in last.surrogate.items())


@pytest.mark.parametrize(("combine", "steps"), [("mean", 4), ("svd", 2), ("stack", 2)])
def test_moments_of_directions_that_are_gone_are_forgotten(run: Run, combine: str, steps: int) -> None:
    """`svd` and `stack` begin with other directions than those that the optimizer remembers; the bottom is private."""
    folder, _ = run(**SHARED, **{"aggregation.weighting": "equal", "aggregation.combine": combine})
    counts = {name: int(n) for name, n in kept(folder, 2).optimizer.items() if name.endswith("|step")}
    assert {n for name, n in counts.items() if of_top(name)} == {steps}
    assert {n for name, n in counts.items() if not of_top(name)} == {4}


# ------------------------------------------------------------------------------------------- with the other nodes

SHARED = {"aggregation.share": "top"}


def test_proximal_term_pulls_shared_weights_only(run: Run) -> None:
    changes = {**SHARED, "train.max-grad-norm": 1e9, "num-server-rounds": 1}
    plain, _ = run(**changes)
    pulled, _ = run(**changes, **{"aggregation.strategy": "fedprox", "aggregation.proximal-mu": 9.0})
    before, after = kept(plain, 1).adapter, kept(pulled, 1).adapter
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    # the second step is the first that is pulled: what the pull does to the top has not reached the bottom yet
    assert moved and all(of_top(name) for name in moved)


@pytest.mark.parametrize("combine", ["mean", "svd"])
@pytest.mark.parametrize(("weighting", "weights"), [("examples", (39 / 48, 9 / 48)), ("equal", (1 / 2, 1 / 2))])
def test_nodes_with_unequal_data_count_by_examples_or_equally(
    run: Run, weighting: str, weights: tuple[float, float], combine: str
) -> None:
    _, grid = run(**SHARED, **{"aggregation.weighting": weighting, "aggregation.combine": combine})
    replies = sorted(list(grid.replies.values())[:2], key=lambda reply: reply.metadata.src_node_id)
    assert [reply.content["metrics"]["num-examples"] for reply in replies] == [39, 9]
    parts = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
    together = grid.instructions[2].content["arrays"].to_torch_state_dict()
    name = next(name for name in together if ".lora_A." in name)

    def value(state: dict[str, Tensor], scaling: float) -> Tensor:
        """What is averaged: A by itself, or the product."""
        if combine == "mean":
            return state[name].double()
        return scaling * state[name.replace("lora_A", "lora_B")].double() @ state[name].double()

    expected = sum(weight * value(part, 2.0) for weight, part in zip(weights, parts, strict=True))
    if combine == "svd":
        u, s, v = torch.linalg.svd(expected, full_matrices=False)
        expected = u[:, :8] @ torch.diag(s[:8]) @ v[:8]
    torch.testing.assert_close(value(together, 1.0), expected, rtol=1e-3, atol=1e-6)
