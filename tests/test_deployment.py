"""The app as institutions run it: SuperLink, SuperNodes and trunk as processes of their own, with TLS and keys."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from federation import MARK, Federation, FederationError, Part, demo_data  # noqa: E402
from kills import left_arrays, run_with_kills  # noqa: E402

SHORT = {"num-server-rounds": 3, "train.steps": 6, "data.max-length": 48, "data.holdout": 0.05}


@pytest.fixture
def federation(demo_model: Path, tmp_path: Path) -> Iterator[Federation]:
    """Three nodes, two replicas. Batches of one call each: a result then does not depend on who else calls."""
    data = demo_data(tmp_path, 3)
    with Federation(tmp_path, data, trunk={"batching.enabled": False}) as up:
        yield up
    assert up.processes() == []


@pytest.mark.slow
def test_kills_of_node_trunk_and_server_app_lose_no_round_and_change_no_array(federation: Federation) -> None:
    calm = {**SHORT, "run.name": "calm", "aggregation.share": "top"}
    assert federation.wait(federation.submit(calm), 900)[0] == "finished:completed"
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    storm = run_with_kills(federation, {**calm, "run.name": "stormy"}, seed)
    assert len(storm.kills) == 3, storm
    assert storm.rounds_lost == 0, storm
    expected, found = left_arrays(federation, "calm"), left_arrays(federation, "stormy")
    assert found.keys() == expected.keys()
    assert any(name.startswith("round-0003") for name in found)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == [], f"{storm}: {len(different)} of {len(expected)} arrays differ"


@pytest.mark.slow
def test_two_runs_at_once_leave_each_what_the_other_leaves(federation: Federation) -> None:
    run = {**SHORT, "num-server-rounds": 2, "aggregation.share": "top"}
    numbers = [federation.submit({**run, "run.name": name}) for name in ("one", "other")]
    assert [federation.wait(number, 900)[0] for number in numbers] == ["finished:completed"] * 2
    one, other = left_arrays(federation, "one"), left_arrays(federation, "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_masked_adapters_come_out_of_a_real_superlink_as_their_mean_and_none_goes_in_clear(
    demo_model: Path, tmp_path: Path
) -> None:
    run = {**SHORT, "num-server-rounds": 2, "aggregation.share": "top", "aggregation.weighting": "equal"}
    with Federation(tmp_path, demo_data(tmp_path, 3), num_replicas=1, secure=True) as up:
        assert up.wait(up.submit({**run, "run.name": "masked"}), 900)[0] == "finished:completed"
        in_clear = up.submit({**run, "run.name": "in-clear", "aggregation.secure": False})
        assert up.wait(in_clear, 900)[0] == "finished:failed"
        assert "secure-peers" in " ".join(node.log.read_text() for node in up.executors)
    shared = load_file(tmp_path / "server" / "masked" / "checkpoints" / "round-0002" / "shared.safetensors")
    own = [
        load_file(next(tmp_path.glob(f"node-{i}/out/masked/state/*/round-0002/adapter.safetensors"))) for i in range(3)
    ]
    assert shared
    for name, value in shared.items():
        mean = torch.stack([each[name] for each in own]).mean(0)
        assert not torch.equal(own[0][name], mean)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-6)
    assert not list((tmp_path / "server" / "in-clear").glob("checkpoints/round-*"))


@pytest.mark.slow
def test_script_leaves_no_process_after_ctrl_c(demo_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "local_federation.py", "--folder", tmp_path, "--nodes", "2"]
    script = subprocess.Popen([*command, "--replicas", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout is not None
    while "is under way" not in (line := script.stdout.readline()):
        assert line, script.communicate()[1]
    assert marked(tmp_path)
    time.sleep(3)
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert (script.returncode, "everything has been stopped" in errors) == (130, True)
    assert marked(tmp_path) == []


def marked(folder: Path) -> list[psutil.Process]:
    """Processes of a federation in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(f"{folder}:") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_part_that_has_stopped_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    part = Part("trunk-0", [sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path, os.environ)
    part.start()
    while part.running():
        time.sleep(0.05)
    with pytest.raises(FederationError, match=r"(?s)trunk-0 has stopped; .*trunk-0.log:\n  no such model"):
        part.check()


def test_kill_ends_what_a_part_has_started(tmp_path: Path) -> None:
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    part = Part("node-0", [sys.executable, "-c", sleeper], tmp_path, os.environ)
    part.start()
    while not (below := psutil.Process(part.pid).children()):
        time.sleep(0.05)
    part.kill()
    assert not part.running()
    assert psutil.wait_procs(below, timeout=5)[1] == []


def test_files_of_a_federation_say_who_is_who_and_keep_secrets_from_others(tmp_path: Path) -> None:
    first = Federation(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    again = Federation(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"])  # the same keys once more
    secret = [*tmp_path.glob("keys/*.key"), *tmp_path.glob("node-*/supernode"), *tmp_path.glob("node-*/trunk.token")]
    assert len(secret) == 7
    assert {path.stat().st_mode & 0o777 for path in secret} == {0o600}
    tokens = {path.read_text() for path in tmp_path.glob("node-*/trunk.token")}
    assert len(tokens) == 2
    assert [entry["institution"] for entry in json.loads((tmp_path / "keys" / "tokens.json").read_text())] == [
        "node-0",
        "node-1",
    ]
    assert not any(token.strip() in (tmp_path / "keys" / "tokens.json").read_text() for token in tokens)
    node = (tmp_path / "node-1" / "node.toml").read_text()
    assert "partition-id = 1\n" in node and f'data-path = "{tmp_path}/b.jsonl"\n' in node
    assert len({first.superlink.log, *(part.log for part in (*first.nodes, *again.replicas))}) == 5
