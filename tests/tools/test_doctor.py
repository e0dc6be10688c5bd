"""What a run would fail for, said before it starts; every line with its remedy and without a row's content."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_split.cli import app
from fl_split.config import NodeConfig, RunConfig, read_values
from fl_split.errors import ConfigError
from fl_split.node.build import warn_of_room
from fl_split.plan import fits_here, versions
from fl_split.plan.fits_here import check_room
from fl_split.plan.versions import check_versions
from fl_split.tools.doctor import diagnose
from fl_split.trunk.layers import hold_layers
from fl_split.trunk.server import embedded

SECRET = "Zanzibar"


def statuses(config: RunConfig, node: NodeConfig | None = None, **options: Any) -> dict[str, tuple[str, str]]:
    return {check.name: (check.status, check.text) for check in diagnose(config, node or NodeConfig(), **options)}


def test_the_demo_passes_and_each_check_says_what_it_saw(tmp_path: Path, demo_model: Path) -> None:
    found = statuses(RunConfig.from_flat({"run.dir": str(tmp_path), "data.max-length": 64}), max_rows=50)
    assert {status for status, _ in found.values()} == {"pass"}
    assert "2 + 4 + 2 layers" in found["model"][1]
    assert found["data"][1] == "the first 50 rows: 45 examples to train on, 5 held out"
    assert "the loss counts" in found["targets"][1]
    assert "embedded" in found["trunk"][1]


def test_bad_rows_and_cut_examples_are_warned_of(jsonl: Callable[..., Path], tmp_path: Path, demo_model: Path) -> None:
    good = {"question": "who?", "answer": f"{SECRET} " * 30}
    path = jsonl([good] * 5 + [{"question": SECRET, "answer": ""}])
    found = statuses(RunConfig.from_flat({"run.dir": str(tmp_path), "data.path": str(path), "data.max-length": 20}))
    assert found["rows"] == ("warn", "1 are left out: 1 empty (rows.jsonl line 6); correct them, or accept their loss")
    assert found["lengths"][0] == "warn"
    assert "5 of 5 are cut" in found["lengths"][1]
    assert SECRET not in str(found)


def test_what_a_run_would_fail_for_fails_here(jsonl: Callable[..., Path], tmp_path: Path, demo_model: Path) -> None:
    path = jsonl([{"note": SECRET, "ill": 1}] * 3)
    base = {"run.dir": str(tmp_path), "data.path": str(path), "trunk.timeout-s": 0.5}
    found = statuses(RunConfig.from_flat({**base, "trunk.address": "127.0.0.1:1"}))
    assert found["data"][0] == found["trunk"][0] == "fail"
    assert found["data"][1].endswith("others, which 'fl-split doctor' names on the node: ill, note")
    assert "no column data.prompt='question'" in found["data"][1]
    assert "no trunk answers at 127.0.0.1:1" in found["trunk"][1]
    assert SECRET not in str(found)
    assert statuses(RunConfig.from_flat({**base, "model.name": "/nowhere"}))["model"][0] == "fail"
    assert "leave no trunk" in statuses(RunConfig.from_flat({**base, "split.top-layers": 6}))["model"][1]


def test_weights_or_tokenizer_that_are_not_there_fail(
    checkpoint: Callable[[str], Path], tmp_path: Path, demo_model: Path
) -> None:
    config = RunConfig.from_flat({"run.dir": str(tmp_path), "model.name": str(checkpoint("llama"))})
    found = statuses(config)
    assert found["model"][0] == "pass"
    assert found["tokenizer"][0] == "fail"
    assert "no tokenizer can be loaded" in found["tokenizer"][1]
    (tmp_path / "config.json").write_text((demo_model / "config.json").read_text())
    lacking = statuses(RunConfig.from_flat({"run.dir": str(tmp_path), "model.name": str(tmp_path)}))
    assert lacking["model"][0] == "fail"
    assert "lacks weights of this node's layers" in lacking["model"][1]


def test_another_trunk_fails_and_the_right_one_passes(tmp_path: Path, demo_model: Path) -> None:
    with embedded(hold_layers(demo_model, 2, 2)) as address:
        node = NodeConfig(trunk_address=address)
        assert statuses(RunConfig.from_flat({"run.dir": str(tmp_path)}), node, max_rows=5)["trunk"][0] == "pass"
        other = RunConfig.from_flat({"run.dir": str(tmp_path), "split.top-layers": 1})
        status, text = statuses(other, node, max_rows=5)["trunk"]
    assert status == "fail"
    assert "make split.bottom-layers and split.top-layers the same" in text


def test_versions_are_compared_with_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=999", "no-such-package", 'pytest; extra == "dev"', "flwr"]
    monkeypatch.setattr(versions, "requires", lambda name: asked)
    (check,) = check_versions()
    assert check.status == "fail"
    assert "torch>=999 is wanted" in check.text
    assert "no-such-package is not installed" in check.text

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", missing)
    assert next(check_versions()).status == "warn"


def test_too_little_memory_or_disk_fails_with_a_remedy_and_is_said_before_the_first_round(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig.from_flat({"run.dir": str(tmp_path)})
    assert [check.status for check in check_room(config, NodeConfig())] == ["pass", "pass"]
    monkeypatch.setattr(fits_here.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fits_here.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(fits_here.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    memory, disk = check_room(config, NodeConfig())
    assert (memory.status, disk.status) == ("fail", "fail")
    assert "split.client-memory" in memory.text
    assert "set run.dir or out-dir" in disk.text
    warn_of_room(config, NodeConfig())
    assert "memory: a node needs about" in caplog.text
    monkeypatch.setattr(fits_here.os, "access", lambda path, mode: False)
    assert "cannot be written to" in list(check_room(config, NodeConfig()))[1].text
    (unknown,) = check_room(RunConfig.from_flat({"split.top-layers": 7}), NodeConfig())
    assert unknown.status == "warn"


def test_the_commands_take_what_flwr_takes_and_exit_with_1_on_failure(tmp_path: Path, demo_model: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[run]\ndir = "{tmp_path}"\n[data]\nmax-length = 64\n')
    doctor_args = [
        "doctor",
        "--config",
        str(file),
        "-c",
        "train.batch-size=2 data.max-length=32",
        "--json",
        "--rows",
        "9",
    ]
    good = CliRunner().invoke(app, doctor_args)
    assert good.exit_code == 0, good.output
    checks = [json.loads(line) for line in good.output.splitlines() if line.startswith("{")]
    assert {check["status"] for check in checks} == {"pass"}
    bad = CliRunner().invoke(app, ["doctor", "--config", str(file), "--node-config", 'data-path="/nowhere"'])
    assert bad.exit_code == 1
    assert "fail  data       data-path='/nowhere' matches no file" in bad.output
    plan = CliRunner().invoke(app, ["plan", "--model", "demo", "--split", "1+2", "--json", "-c", "surrogate.layers=1"])
    assert json.loads(plan.output.splitlines()[-1])["split"] == "1+5+2"
    assert "1+6+1" in CliRunner().invoke(app, ["plan", "--config", str(file)]).output


def test_files_and_values_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert read_values(None, ["train.steps=3 run.name='a b'"]) == {"train.steps": 3, "run.name": "a b"}
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read as TOML"):
        read_values(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(ConfigError, match=r"bad\.toml cannot be read as TOML"):
        read_values(tmp_path / "bad.toml", [])
    with pytest.raises(ConfigError, match="wrong key=value"):
        read_values(None, ["run.name=mine"])
