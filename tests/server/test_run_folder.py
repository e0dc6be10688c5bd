"""What is on disk: complete or not there, and found again."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_split.config import RunConfig
from fl_split.errors import ConfigError, NodeStateError
from fl_split.files import Rounds, write_atomic
from fl_split.node.state import NodeFolder, SavedRound
from fl_split.node.trial import Gain
from fl_split.server.run_folder import RunFolder, claimed, named

VERSIONS = {"fl-split": "test"}


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_flat({"run.dir": str(tmp_path), "run.name": "mine", **changes})


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2,), value)}


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomic(tmp_path / "f", text)
    assert (tmp_path / "f").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(os.name != "posix", reason="there are no named pipes")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(pipe.read_text)
        write_atomic(pipe, "one")
        assert read.result(10) == "one"
    assert pipe.is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synced")
def test_files_and_the_folders_that_name_them_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))))
    write_atomic(tmp_path / "f", "one")
    assert synced[0].parent == synced[1] == tmp_path
    synced.clear()
    Rounds(tmp_path / "rounds").save(1, {"x": tensors(1)}, keep=2)
    assert synced[0].name == "x.safetensors" and synced[1] == synced[0].parent
    assert synced[2:] == [tmp_path / "rounds", tmp_path]
    RunFolder.open(config(tmp_path), VERSIONS).finish_round(1, [{"round": 1}], tensors(1))
    assert {tmp_path / "mine", tmp_path / "mine" / "checkpoints"} <= set(synced)


def test_only_the_newest_rounds_are_kept(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    for number in (1, 2, 3):
        rounds.save(number, {"x": tensors(number)}, keep=2)
    assert rounds.finished() == [2, 3]
    assert torch.equal(rounds.load(3, "x")["a"], tensors(3)["a"])


def test_a_round_done_again_replaces_it_and_what_came_after(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    for number in (1, 2):
        rounds.save(number, {"x": tensors(number)}, keep=2)
    rounds.save(1, {"x": tensors(9)}, keep=2)
    assert rounds.finished() == [1]
    assert torch.equal(rounds.load(1, "x")["a"], tensors(9)["a"])


def test_a_half_written_round_is_not_taken_for_one(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    rounds.save(1, {"x": tensors(1)}, keep=2)
    (tmp_path / ".round-half").mkdir()
    (tmp_path / ".round-half" / "x.safetensors").write_text("half")
    assert rounds.finished() == [1]
    rounds.save(2, {"x": tensors(2)}, keep=2)
    assert not (tmp_path / ".round-half").exists()


def test_a_node_goes_on_from_the_newest_round_before_the_one_asked_for(tmp_path: Path) -> None:
    node = NodeFolder(tmp_path, "run-1")
    assert node.load_before(1) is None
    node.save(SavedRound(1, tensors(1), tensors(10), trial=Gain(1.0, 0.5)))
    node.save(SavedRound(2, tensors(2), tensors(20), tensors(30), trial=Gain(2.0, 9.0), trained_bottom=True))
    for asked, expected in ((3, 2), (5, 2), (2, 1)):  # the next; after rounds missed; the last one again
        found = node.load_before(asked)
        assert found is not None
        assert (found.number, found.trial.mean, found.trained_bottom) == (expected, expected, expected == 2)
        assert torch.equal(found.adapter["a"], tensors(expected)["a"])
    assert NodeFolder(tmp_path, "run-2").load_before(1) is None  # another run of the same name


@pytest.mark.parametrize(("gain", "trained"), [(Gain(0.02, 0.001, 0.1), True), (Gain(0.009, 0.001, 0.1), False)])
def test_a_bottom_that_an_older_version_left_untrained_stays_so_until_its_next_trial(
    tmp_path: Path, gain: Gain, trained: bool
) -> None:
    node = NodeFolder(tmp_path, "run-1")
    node.save(SavedRound(2, trial=gain, trained_bottom=True))
    file = next(tmp_path.glob("state/run-1/round-0002/numbers.safetensors"))
    numbers = load_file(file)
    del numbers["bottom-trained"]
    save_file(numbers, file)
    saved = node.load_before(3)
    assert saved is not None and saved.trained_bottom == trained


def test_a_node_ahead_of_its_server_says_so(tmp_path: Path) -> None:
    node = NodeFolder(tmp_path, "run-1")
    for number in (2, 3, 4, 5):
        node.save(SavedRound(number))
    with pytest.raises(NodeStateError, match=r"finished round 5 and is asked for round 2: .*another run\.name"):
        node.load_before(2)


def test_a_run_goes_on_after_its_last_finished_round(tmp_path: Path) -> None:
    run = RunFolder.open(config(tmp_path), VERSIONS)
    run.finish_round(1, [{"round": 1, "x": 1}], tensors(1))
    run.finish_round(2, [{"round": 2, "x": 2}], tensors(2))
    with run.metrics.open("a") as file:  # killed while it recorded round 3
        file.write('{"round": 3, "x": 3}\n{"round": 3, "x"')
    again = RunFolder.open(config(tmp_path, **{"run.resume": True, "num-server-rounds": 9}), VERSIONS)
    assert (again.run_id, again.num_finished) == (run.run_id, 2)
    assert torch.equal(again.shared()["a"], tensors(2)["a"])
    assert [json.loads(line)["round"] for line in again.metrics.read_text().splitlines()] == [1, 2]


def test_resume_of_a_run_that_is_not_there_begins_it_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.open(config(tmp_path, **{"run.resume": True}), VERSIONS)
    assert "has no finished round: this begins the run; check run.name" in caplog.text
    assert run.num_finished == 0
    assert run.shared() == {}


def test_a_folder_without_a_finished_round_is_for_the_corrected_retry(tmp_path: Path) -> None:
    failed = RunFolder.open(config(tmp_path, **{"lora.rank": 3}), VERSIONS)
    failed.metrics.write_text('{"round": 1, "x": 1}\n')  # killed before the round counted
    again = RunFolder.open(config(tmp_path), VERSIONS)
    assert (again.num_finished, again.config.lora.rank) == (0, 8)
    assert again.run_id != failed.run_id and again.metrics.read_text() == ""


def test_one_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with claimed(config(tmp_path)):
        with pytest.raises(NodeStateError, match=r"a run is under way in .*mine: wait for its end \('flwr ls'\)"):
            with claimed(config(tmp_path)):
                pass
        with claimed(config(tmp_path, **{"run.name": "other"})):
            pass
    with claimed(config(tmp_path)):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=.*cannot be made \(.*\): set run\.dir to a folder"):
        with claimed(config(tmp_path / "file")):
            pass


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    run = RunFolder.open(config(tmp_path), VERSIONS)
    run.finish_round(1, [{"round": 1, "x": float("nan"), "y": float("inf")}], tensors(1))
    assert json.loads(run.metrics.read_text()) == {"round": 1, "x": None, "y": None}
    assert str(run.read_metrics()) == "[{'round': 1, 'x': nan, 'y': nan}]"


def finished(tmp_path: Path, **changes: Any) -> None:
    RunFolder.open(config(tmp_path, **changes), VERSIONS).finish_round(1, [{"round": 1}], tensors(1))


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(NodeStateError, match=r"run\.resume=true to go on .* another run\.name"):
        RunFolder.open(config(tmp_path), VERSIONS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora.rank", 4, r"lora\.rank was 8 and is 4"),
        ("trunk.wire-dtype", "int8", r"trunk\.wire-dtype was 'bfloat16' and is 'int8'"),
    ],
)
def test_resume_with_another_configuration_is_refused_key_by_key(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    finished(tmp_path)
    with pytest.raises(NodeStateError, match=message):
        RunFolder.open(config(tmp_path, **{"run.resume": True, key: value}), VERSIONS)
    RunFolder.open(config(tmp_path, **{"run.resume": True, "trunk.timeout-s": 9.0}), VERSIONS)


def test_resume_uses_the_runs_own_configuration_for_what_is_not_given(tmp_path: Path) -> None:
    finished(tmp_path, **{"lora.rank": 4, "train.steps": 7, "num-server-rounds": 5})
    again = RunFolder.open(config(tmp_path, **{"run.resume": True, "num-server-rounds": 6}), VERSIONS)
    assert (again.config.lora.rank, again.config.train.steps, again.config.num_server_rounds) == (4, 7, 6)
    with pytest.raises(NodeStateError, match=r"lora\.rank was 4 and is 8; leave these out"):  # given, though a default
        RunFolder.open(config(tmp_path, **{"run.resume": True}), VERSIONS, {"run.resume": True, "lora.rank": 8})


def test_resume_with_fewer_nodes_is_refused_with_privacy_only(tmp_path: Path) -> None:
    private = {"dp.mode": "client-fixed", "aggregation.share": "top", "aggregation.weighting": "equal"}
    for name, options in (("plain", {}), ("private", private)):
        finished(tmp_path / name, **options)
    fewer = {"run.resume": True, "aggregation.min-nodes": 1}
    RunFolder.open(config(tmp_path / "plain", **fewer), VERSIONS)
    with pytest.raises(NodeStateError, match=r"aggregation\.min-nodes was 2 and is 1"):
        RunFolder.open(config(tmp_path / "private", **fewer), VERSIONS)


def test_resume_does_not_change_whether_nodes_train_adapters_of_their_own(tmp_path: Path) -> None:
    finished(tmp_path, **{"aggregation.share": "top", "aggregation.min-nodes": 3})
    with pytest.raises(NodeStateError, match=r"min-nodes=1: it was 3, and whether nodes train an adapter of their own"):
        RunFolder.open(config(tmp_path, **{"run.resume": True, "aggregation.min-nodes": 1}), VERSIONS)
    RunFolder.open(config(tmp_path, **{"run.resume": True, "aggregation.min-nodes": 4}), VERSIONS)


def test_a_run_without_a_name_gets_one(tmp_path: Path) -> None:
    run = RunFolder.open(named(RunConfig.from_flat({"run.dir": str(tmp_path)})), VERSIONS)
    assert run.root.parent == tmp_path and run.root.name == run.config.run.name != ""
    assert json.loads((run.root / "run.json").read_text())["versions"] == VERSIONS
