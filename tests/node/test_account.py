"""The account of `dp.record-*`: right against other accountants, never forgotten, ends training when it is used up."""

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, run_app

from fl_split import demo
from fl_split.config import UNCOVERED, Dp, NodeConfig, RunConfig
from fl_split.data.store import in_memory
from fl_split.errors import ConfigError, NodeStateError, RoundFailed
from fl_split.node import steps
from fl_split.node.account import NAME, Account, Charge, epsilon_of, read_charges
from fl_split.node.record_dp import begin
from fl_split.node.state import NodeFolder

pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
SETTINGS = [(0.032, 1.0, 90, 5e-5), (0.032, 1.0, 600, 5e-5), (0.064, 1.0, 90, 2e-4), (0.05, 0.7, 200, 1e-5)]


def dp(noise: float = 1.0, limit: float = 0.0, delta: float = 1e-5) -> Dp:
    keys = {"record-noise-multiplier": noise, "record-max-epsilon": limit, "record-delta": delta}
    return Dp.model_validate(keys)


# ------------------------------------------------------------------------------------------------------ epsilon


@pytest.mark.parametrize(("sampling", "noise", "steps", "delta"), SETTINGS)
def test_epsilon_is_opacus_own(sampling: float, noise: float, steps: int, delta: float) -> None:
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    prv, rdp = accountants.PRVAccountant(), accountants.RDPAccountant()
    prv.history = rdp.history = [(noise, sampling, steps)]
    ours = epsilon_of([(sampling, noise, steps)], delta)
    assert ours == pytest.approx(prv.get_epsilon(delta, eps_error=0.005), rel=0.005)
    assert ours < rdp.get_epsilon(delta)


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (8.0, 40)])
def test_epsilon_of_all_examples_in_every_step_is_that_of_the_formula(noise: float, steps: int) -> None:
    """Gaussian mechanisms in sequence: delta(epsilon) in closed form (arXiv 1805.06530)."""
    mu = math.sqrt(steps) / noise
    epsilon = epsilon_of([(1.0, noise, steps)], 1e-5)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    delta = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_epsilon_is_of_all_steps_however_they_were_charged() -> None:
    assert epsilon_of([], 1e-5) == epsilon_of([(0.1, 1.0, 0)], 1e-5) == 0
    together = epsilon_of([(0.05, 1.0, 30)], 1e-5)
    assert epsilon_of([(0.05, 1.0, 10), (0.05, 1.0, 20)], 1e-5) == together
    assert epsilon_of([(0.05, 1.0, 30), (0.04, 2.0, 10)], 1e-5) > together


def test_epsilon_without_its_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"not installed \(dp_accounting\): pip install 'fl-split\[dp\]'"):
        epsilon_of([(0.1, 1.0, 1)], 1e-5)


# ---------------------------------------------------------------------------------------------------- the file


def test_a_charge_is_kept_with_what_it_came_to(tmp_path: Path) -> None:
    first = Account(tmp_path).charge(dp(), 1, 10, 0.05)
    second = Account(tmp_path).charge(dp(), 2, 20, 0.05)
    assert read_charges(tmp_path) == [first, second]
    assert 0 < first.epsilon < second.epsilon == epsilon_of([(0.05, 1.0, 30)], 1e-5)
    assert str(second) == f"epsilon {second.epsilon:.2f} at delta 1e-05 for one training example; {UNCOVERED}"


def test_max_epsilon_allows_as_many_steps_as_it_says_and_no_more(tmp_path: Path) -> None:
    limit = epsilon_of([(0.05, 1.0, 37)], 1e-5) + 1e-6
    steps = [Account(tmp_path).charge(dp(limit=limit), number, 25, 0.05).steps for number in (1, 2, 3)]
    assert steps == [25, 12, 0]
    assert max(charge.epsilon for charge in read_charges(tmp_path)) <= limit < epsilon_of([(0.05, 1.0, 38)], 1e-5)


@pytest.mark.parametrize("text", ["", "[{", '[{"round": 1}]', "3"])
def test_an_account_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(NodeStateError, match=r"dp-account\.json cannot be read .*so what was spent is unknown"):
        Account(tmp_path)


def test_rounds_with_and_without_noise_do_not_mix(tmp_path: Path) -> None:
    account = Account(tmp_path)
    account.check(dp(), 0)
    account.check(Dp(), 3)
    with pytest.raises(NodeStateError, match=r"round 3 of this node was trained without dp\.record-noise-multiplier"):
        account.check(dp(), 3)
    account.charge(dp(), 3, 1, 0.05)
    account.check(dp(), 3)
    with pytest.raises(NodeStateError, match=r"earlier rounds .* were trained with dp\.record-noise-multiplier"):
        account.check(Dp(), 3)


def test_nothing_is_charged_where_delta_is_too_large_or_nobody_asked(tmp_path: Path) -> None:
    rows = in_memory([{"input_ids": [1, 2], "labels": [-100, 2], "key": 0, "cut": 0}] * 100)  # type: ignore[typeddict-unknown-key]
    tokenizer: Any = None
    with pytest.raises(ConfigError, match=r"dp\.record-delta=0\.01 is too large"):
        begin(RunConfig.from_flat({**ON, "dp.record-delta": 0.01}), rows, tokenizer, Account(tmp_path), 1)
    assert begin(RunConfig(), rows, tokenizer, Account(tmp_path), 1) is None
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from fl_split.config import RunConfig
from fl_split.node import record_dp
from fl_split.node.account import Account
from fl_split.data.store import in_memory

config = RunConfig.from_flat({"dp.record-noise-multiplier": 1.0, "train.keep": "last", "surrogate.kind": "none"})
rows = [{"input_ids": [1, 2], "labels": [-100, 2], "key": 0, "cut": 0}] * 160
private = record_dp.begin(config, in_memory(rows), None, Account(Path(sys.argv[1])), 1)
os.kill(os.getpid(), signal.SIGKILL)  # before the first step
"""


def test_a_kill_loses_nothing_of_what_was_charged(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    Account(tmp_path).charge(dp(), 1, 30, 0.05)  # the round is done again
    charges = read_charges(tmp_path)
    assert [(c.round, c.steps, c.sampling) for c in charges] == [(1, 30, 0.05)] * 2
    assert charges[-1].epsilon == epsilon_of([(0.05, 1.0, 60)], 1e-5)


# ------------------------------------------------------------------------------------------------- whole rounds

ON: dict[str, Any] = {"dp.record-noise-multiplier": 1.0, "train.keep": "last", "surrogate.kind": "none",
                      "train.batch-size": 4, "data.max-length": 32}  # fmt: skip
Run = Callable[..., InProcessGrid]


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def kept(root: Path, number: int) -> dict[str, torch.Tensor]:
    run_id = json.loads((root / "run.json").read_text())["run-id"]
    saved = NodeFolder(root / "nodes" / "0", run_id).load_before(number + 1)
    assert saved is not None and saved.number == number
    return saved.adapter


def test_a_run_shows_its_epsilon_and_withholds_what_was_computed_without_noise(
    demo_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_app(tmp_path, **{**ON, "surrogate.kind": "blocks", "aggregation.share": "both", "train.accumulation": 2})
    root = tmp_path / "x"
    for entry in (e for e in metrics(root) if "partition-id" in e):
        charge = read_charges(root / "nodes" / str(entry["partition-id"]))[entry["round"] - 1]
        assert entry["record-epsilon"] == charge.epsilon > 0 and entry["record-delta"] == 1e-5
        assert charge.sampling == pytest.approx(8 / entry["num-examples"])
        withheld = {key for key, value in entry.items() if value is None}
        assert withheld == {"bad-rows", "truncated-examples", "truncated-tokens", "train-loss", "train-tokens",
                            "tokens-per-s", "activation-bytes", "cached-sequences"}  # fmt: skip
    card = (root / "nodes" / "0" / "adapter" / "README.md").read_text()
    assert f"| differential privacy | {read_charges(root / 'nodes' / '0')[-1]} |" in card
    said = [message for message in caplog.messages if re.search(r"epsilon( [0-9]|\n)", message)]
    assert len(said) == 2 * (2 + 1) and all(UNCOVERED in message for message in said)


def test_without_it_nothing_of_it_is_there(demo_model: Path, tmp_path: Path) -> None:
    run_app(tmp_path, **{"num-server-rounds": 1, "data.max-length": 32})
    assert not any("record-epsilon" in entry for entry in metrics(tmp_path / "x"))
    assert not list(tmp_path.rglob(NAME))
    assert "differential privacy" not in (tmp_path / "x" / "nodes" / "0" / "adapter" / "README.md").read_text()


def test_a_round_that_is_done_again_is_charged_again(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_app(tmp_path, **ON, **{"num-server-rounds": 1})
    with monkeypatch.context() as patched, pytest.raises(RoundFailed):
        patched.setattr(steps, "train_round", lambda *args: 1 / 0)
        run_app(tmp_path, **ON, **{"run.resume": True, "num-server-rounds": 2})
    assert [c.round for c in read_charges(tmp_path / "x" / "nodes" / "0")] == [1, 2]
    run_app(tmp_path, **ON, **{"run.resume": True, "num-server-rounds": 2})
    charges = read_charges(tmp_path / "x" / "nodes" / "0")
    assert [(c.round, c.steps) for c in charges] == [(1, 2), (2, 2), (2, 2)]
    last = [e for e in metrics(tmp_path / "x") if e.get("partition-id") == 0][-1]
    assert last["record-epsilon"] == epsilon_of([(charges[0].sampling, 1.0, 6)], 1e-5)


def test_a_node_that_has_spent_it_all_trains_no_more_and_the_run_goes_on(
    demo_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_app(tmp_path, **ON, **{"num-server-rounds": 1})
    [first] = read_charges(tmp_path / "x" / "nodes" / "0")
    limit = epsilon_of([(first.sampling, 1.0, 3)], 1e-5) + 1e-6
    run_app(tmp_path, "y", **ON, **{"num-server-rounds": 3, "dp.record-max-epsilon": limit})
    assert [c.steps for c in read_charges(tmp_path / "y" / "nodes" / "0")] == [2, 1, 0]
    assert max(e["record-epsilon"] for e in metrics(tmp_path / "y") if e.get("partition-id") == 0) <= limit
    assert all(torch.equal(value, kept(tmp_path / "y", 2)[name]) for name, value in kept(tmp_path / "y", 3).items())
    assert "allows 1 of this round's 2 steps: the adapter is not trained any further after them" in caplog.text
    assert "allows 0 of this round's 2 steps: the adapter stays as it is" in caplog.text


def test_an_institution_switches_it_on_for_itself(demo_model: Path, tmp_path: Path) -> None:
    plain = {key: value for key, value in ON.items() if not key.startswith("dp.")} | {"num-server-rounds": 1}
    own = {"dp.record-noise-multiplier": 2, "dp.record-delta": 1e-6,
           "data-path": str(demo.data_folder() / "hospital-north.jsonl")}  # fmt: skip
    run_app(tmp_path, **plain, node_config=[own])
    [charge] = read_charges(tmp_path / "x" / "nodes" / "0")
    assert (charge.noise, charge.delta) == (2.0, 1e-6)
    of_nodes = [entry for entry in metrics(tmp_path / "x") if "partition-id" in entry]
    assert [entry.get("record-delta") for entry in of_nodes] == [1e-6, None]
    with pytest.raises(RoundFailed, match="earlier rounds of this node were trained with"):
        again = {**plain, "run.resume": True, "num-server-rounds": 2}
        run_app(tmp_path, **again, node_config=[{"data-path": own["data-path"]}])
    with pytest.raises(RoundFailed, match=r"record-noise-multiplier does not go with train\.keep='best'"):
        run_app(tmp_path, "y", **{**plain, "train.keep": "best"}, node_config=[own])


def test_a_nodes_own_values_come_before_the_runs() -> None:
    of_run = RunConfig.from_flat({**ON, "dp.record-clip": 3.0, "dp.record-max-epsilon": 9.0})
    node = NodeConfig.from_flat({"partition-id": 0, "dp.record-max-epsilon": 2.0})
    assert node.with_record_dp(of_run).dp == of_run.dp.model_copy(update={"record_max_epsilon": 2.0})
    assert NodeConfig(partition_id=0).with_record_dp(of_run) is of_run
    assert Charge(1, 2, 0.5, 1.0, 1e-5, 3.0).record() == {"record-epsilon": 3.0, "record-delta": 1e-5}
