"""`surrogate.kind = "auto"`: each branch of the rule, and that nodes which differ are combined."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import run_app
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from fl_split import demo
from fl_split.config import Kind, NodeConfig, RunConfig
from fl_split.data.load import Examples
from fl_split.errors import ConfigError, SplitError
from fl_split.model import ends
from fl_split.node import choice
from fl_split.node.choice import Choice, choose
from fl_split.plan.fits_here import Check
from fl_split.plan.plan import make_plan

QUICK: Callable[[RunConfig], float] = lambda config: 3.0  # noqa: E731
SECOND = {"trunk.share-address": "embedded"}
OWN = {"partition-id": 0, "data-path": "/mine"}


def chosen(folder: Path, own: dict[str, Any] | None = None, clock: Any = QUICK, **changes: Any) -> Choice:
    config = RunConfig.from_flat({"model.name": str(folder), "data.max-length": 32, "run.dir": "/tmp", **changes})
    return choose(config, NodeConfig.from_flat(own or {"partition-id": 0}), folder, clock)


def lacks(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Let memory be too small for these kinds."""
    monkeypatch.setattr(
        choice,
        "check_room",
        lambda config, node: [Check("fail" if config.surrogate.kind in kinds else "pass", "memory", "")],
    )


def test_default_is_auto() -> None:
    assert RunConfig().surrogate.kind == "auto"


@pytest.mark.parametrize(
    ("changes", "own", "kind"),
    [
        (SECOND, None, "shares"),  # a simulation has nobody to ask
        (SECOND, {**OWN, "allow-gradient-shares": True}, "shares"),
        (SECOND, OWN, "streamed"),
        (SECOND, {"partition-id": 0, "out-dir": "/mine"}, "streamed"),
        (SECOND, {"partition-id": 0, "trunk-ca": "/ca.crt"}, "streamed"),
        ({}, {**OWN, "allow-gradient-shares": True, "trunk-share-address": "there:1"}, "streamed"),
        ({"trunk.exact-gradient": True}, {**OWN, "allow-exact-gradient": True}, "streamed"),  # `exact` is never chosen
    ],
)
def test_no_gradient_leaves_without_the_words_that_it_needs(
    checkpoint: Callable[[str], Path], changes: dict[str, Any], own: dict[str, Any] | None, kind: Kind
) -> None:
    assert chosen(checkpoint("llama"), own, **changes).kind == kind


def test_layers_from_the_disk_where_they_are_there_and_fast_enough(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    found = chosen(folder, **{"run.round-timeout": 6.0})
    assert found == Choice("streamed", "the whole checkpoint is on this disk, and the steps of a round take about 3 s")
    late = chosen(folder, **{"run.round-timeout": 5.9})
    assert late.kind == "blocks"
    assert late.why.startswith("with 'streamed' the steps of a round would take about 3 s, more than 2.95 s")
    untimed = chosen(folder, clock=None)
    assert str(untimed).startswith(
        "surrogate.kind='auto' is 'streamed' here: the whole checkpoint is on this disk, if "
    )
    assert untimed.why.endswith("if a round takes at most 1800 s")


def test_checkpoint_without_the_trunk_leaves_blocks(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if ".layers.3." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    found = chosen(folder)
    assert found.kind == "blocks"
    assert found.why.startswith("the trunk's part of the checkpoint is not on this disk")


def test_layers_that_cannot_be_read_alone_leave_blocks(checkpoint: Callable[[str], Path]) -> None:
    def refused(config: RunConfig) -> float:
        raise SplitError("in another form")

    found = chosen(checkpoint("llama"), clock=refused)
    assert found.kind == "blocks"
    assert found.why.startswith("the trunk's layers cannot be read one at a time")


@pytest.mark.parametrize(
    ("without", "share", "kind"),
    [
        (("streamed",), "none", "blocks"),
        (("streamed", "blocks"), "none", "none"),
        (("streamed", "blocks"), "top", "none"),
        (("streamed", "blocks"), "bottom", "identity"),  # `none` has no bottom adapter to be combined
        (("streamed", "blocks"), "both", "identity"),
    ],
)
def test_too_little_memory_leaves_less(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    without: tuple[str, ...],
    share: str,
    kind: Kind,
) -> None:
    lacks(monkeypatch, *without)
    found = chosen(checkpoint("llama"), **{"aggregation.share": share})
    assert found.kind == kind
    assert found.why.startswith("memory does not suffice for what 'streamed' keeps of each layer")
    assert ("memory does not suffice for surrogate.layers=2" in found.why) == (len(without) == 2)


def test_memory_is_that_of_this_machine(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU's memory counts")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert chosen(checkpoint("llama")).kind == "none"


# -------------------------------------------------------------------------------------------------- whole rounds


def test_run_times_a_step_once_and_keeps_to_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []
    load = ends.load_ends
    monkeypatch.setattr("fl_split.node.build.load_ends", lambda *a, **k: loaded.append(k["surrogate"]) or load(*a, **k))
    caplog.set_level("INFO")
    run_app(tmp_path, **{"surrogate.kind": "auto"})
    assert loaded == ["streamed"] * 6  # of each of two nodes: once to time it, and in two rounds
    (kept,) = (tmp_path / "x" / "nodes" / "0" / "state").glob("*/choice.json")
    assert json.loads(kept.read_text())["kind"] == "streamed"
    assert caplog.text.count("surrogate.kind='auto' is 'streamed' here") == 2
    entries = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["bottom-trained"] for entry in entries if "partition-id" in entry] == [1] * 4


@pytest.mark.parametrize(("timeout", "kind"), [(3600.0, "streamed"), (0.001, "blocks")])
def test_a_trunk_of_one_layer_needs_no_word_about_layers(tmp_path: Path, timeout: float, kind: Kind) -> None:
    deep = {"split.bottom-layers": 3, "split.top-layers": 4, "run.round-timeout": timeout, "num-server-rounds": 1}
    run_app(tmp_path, **{"surrogate.kind": "auto", **deep})
    (kept,) = (tmp_path / "x" / "nodes" / "0" / "state").glob("*/choice.json")
    assert json.loads(kept.read_text())["kind"] == kind


def test_nodes_that_differ_share_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes with three kinds: what they share has the same names and is combined."""
    kinds: list[Kind] = ["streamed", "blocks", "identity"]
    monkeypatch.setattr(choice, "choose", lambda config, node, *_: Choice(kinds[node.partition_id], "told to"))
    data = str(demo.data_folder() / "hospital-south.jsonl")  # one file is dealt out to all
    shared = {"surrogate.kind": "auto", "aggregation.share": "both", "model.name": str(demo.model_folder())}
    grid = run_app(tmp_path, nodes=3, **shared, **{"data.path": data})
    replies = [reply.content["arrays"].to_torch_state_dict() for reply in grid.replies.values()]
    assert len(replies) == 6 and len({tuple(reply) for reply in replies}) == 1
    assert any(".layers.0." in name for name in replies[0])
    for number, kind in enumerate(kinds):
        (kept,) = (tmp_path / "x" / "nodes" / str(number) / "state").glob("*/choice.json")
        assert json.loads(kept.read_text())["kind"] == kind


def test_what_would_send_too_much_is_not_taken(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    plain = RunConfig.from_flat({"model.name": str(folder), "data.max-length": 32})
    plan = make_plan(AutoConfig.from_pretrained(folder), plain.with_kind("streamed"))
    once = (plan.request_bytes + plan.reply_bytes) * plain.train.steps

    def kind(num_bytes: int, **changes: Any) -> Choice:
        return chosen(folder, **SECOND, **{"surrogate.max-bytes": f"{num_bytes}B"}, **changes)

    assert kind(6 * once).kind == "shares"
    assert kind(5 * once).kind == kind(once).kind == "streamed"
    assert kind(2 * once - 1, **{"train.accumulation": 2}).kind == "none"
    found = kind(once - 1)
    assert found.kind == "none"
    assert f"would send and get {once / 1e6:.1f} MB in a round" in found.why
    assert f"more than surrogate.max-bytes={once - 1}B; what would help is a larger one" in found.why
    twice = {"aggregation.personal": True, "aggregation.share": "top", "aggregation.min-nodes": 3}
    assert [kind(2 * once - less, **twice).kind for less in (0, 1)] == ["streamed", "none"]
    with pytest.raises(ConfigError, match=r"surrogate\.max-bytes=1B, and aggregation\.share='bottom' needs a bottom"):
        kind(1, **{"aggregation.share": "bottom"})


def test_both_trainings_of_a_round_are_timed(
    load: Callable[..., Examples], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[float] = []
    monkeypatch.setattr(choice, "choose", lambda *args: said.append(args[-1](args[0])) or Choice("none", "told to"))
    monkeypatch.setattr(choice, "time", SimpleNamespace(monotonic=iter([0.0, 1.0] * 2).__next__))
    monkeypatch.setattr(choice, "accumulate", lambda *_: None)
    examples = load(demo.data_folder() / "hospital-south.jsonl")
    twice = {"aggregation.personal": True, "aggregation.share": "top", "aggregation.min-nodes": 3}
    for name, changes in (("once", {}), ("twice", twice)):
        config = RunConfig.from_flat({"train.steps": 5, "train.accumulation": 3, **changes})
        choice.settle(config, NodeConfig(), demo.model_folder(), tokenizer, examples, tmp_path / name)
    assert said == [15.0, 30.0]
