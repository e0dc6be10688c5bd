"""A run whose nodes mask what they share, as the server sees it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcessGrid, run_app
from flwr.app import Error, Message
from safetensors.torch import load_file

from fl_split.errors import AggregationError, RoundFailed

Run = Callable[..., InProcessGrid]
SHORT = {"aggregation.share": "top", "surrogate.kind": "none", "data.max-length": 32, "data.partitioner": "iid"}


@pytest.fixture
def run(demo_model: Path, tmp_path: Path) -> Run:
    return lambda name="x", **changes: run_app(tmp_path, name, nodes=3, **{**SHORT, **changes})


def shared(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "round-0002" / "shared.safetensors")


def losses(folder: Path) -> list[float]:
    """Of the adapters that nodes export: where they are personal, of the mixture."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = {(entry["round"], entry["partition-id"]): entry for entry in entries if "partition-id" in entry}
    assert len(found) == 6
    return [found[key]["heldout-loss-after"] for key in sorted(found)]


def of_type(grid: InProcessGrid, kind: str) -> list[Message]:
    return [reply for reply in grid.replies.values() if reply.metadata.message_type == kind]


PERSONAL = {"aggregation.personal": True, "aggregation.min-nodes": 3}


@pytest.mark.parametrize(
    "changes", [{}, {"aggregation.strategy": "fedadam"}, PERSONAL], ids=["mean", "fedadam", "personal"]
)
def test_masked_run_is_the_run_in_clear_and_its_messages_say_nothing(
    run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run("clear", **changes)
    grid = run("masked", **changes, **{"aggregation.secure": True})
    expected, got = shared(tmp_path / "clear"), shared(tmp_path / "masked")
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert losses(tmp_path / "masked") == pytest.approx(losses(tmp_path / "clear"), rel=1e-4)
    replies = of_type(grid, "train")
    assert len(replies) == 6 and len(of_type(grid, "query.keys")) == 6  # what is left in them is the mean
    publics = [bytes(reply.content["key"]["public"]) for reply in of_type(grid, "query.keys")]
    assert len(set(publics)) == 6  # a new key for each node and round


class Lossy(InProcessGrid):
    """A grid in which node 1002 does not answer one kind of message."""

    kind = "train"

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == self.kind and message.metadata.dst_node_id == 1002:
            return Message(Error(5, "gone"), reply_to=message)
        reply = super().answer(message)
        if reply.metadata.message_type == "train" and not reply.has_error():
            sent = [array.numpy() for array in reply.content["arrays"].values()]
            assert all(array.dtype == np.int64 for array in sent)
        return reply


def test_a_node_that_is_lost_after_its_key_fails_the_round(run: Run) -> None:
    changes: dict[str, Any] = {"grid_class": Lossy, "aggregation.secure": True, "aggregation.min-nodes": 2}
    with pytest.raises(RoundFailed, match=r"(?s)sum needs every node that has sent a key.*1002: gone"):
        run(**changes)


def test_a_node_without_a_key_fails_the_round_before_anybody_trains(run: Run) -> None:
    keyless = type("Keyless", (Lossy,), {"kind": "query.keys"})
    with pytest.raises(RoundFailed, match=r"(?s)2 of 3 nodes have sent a key for their masks, and all must.*gone"):
        run(grid_class=keyless, **{"aggregation.secure": True})


def test_a_node_that_sends_noise_is_found_out_by_the_sum(run: Run) -> None:
    class Noisy(InProcessGrid):
        def answer(self, message: Message) -> Message:
            reply = super().answer(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
                arrays = reply.content["arrays"]
                name = "secure-weight"
                arrays[name] = type(arrays[name])(arrays[name].numpy() + 12345)
            return reply

    with pytest.raises(AggregationError, match="masks of this round do not cancel"):
        run(grid_class=Noisy, **{"aggregation.secure": True})


def test_own_adapters_and_clipped_ones_are_masked_too(run: Run, tmp_path: Path) -> None:
    personal = {**PERSONAL, "aggregation.secure": True, "data.holdout": 0.5}
    private = {"dp.mode": "client-fixed", "dp.noise-multiplier": 0.01, "aggregation.weighting": "equal"}
    run(**personal, **private)
    lines = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    nodes = [entry for entry in lines if "gain-over-alone" in entry]
    assert len(nodes) == 6 and lines[-1]["epsilon"] > 0
    assert shared(tmp_path / "x")


def test_an_error_of_the_clipping_is_said_as_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: Message, *rest: object) -> Message:
        return Message(Error(6, "two of them"), reply_to=message)

    monkeypatch.setattr("client_app.fixedclipping_mod", fails)
    private = {"dp.mode": "client-fixed", "aggregation.weighting": "equal", "aggregation.min-nodes": 3}
    with pytest.raises(RoundFailed, match=r"0 nodes finished[\s\S]*two of them"):
        run(**private, **{"aggregation.secure": True})
