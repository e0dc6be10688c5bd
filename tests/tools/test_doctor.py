"""What a run would fail for, said before it starts; every line with its remedy and without a row's content."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from fl_split import demo
from fl_split.cli import app
from fl_split.config import UNCOVERED, NodeConfig, RunConfig, read_values
from fl_split.errors import ConfigError
from fl_split.model.checkpoint import read_config
from fl_split.node.build import warn_of_room
from fl_split.plan import fits_here, versions
from fl_split.plan.fits_here import check_room
from fl_split.plan.plan import make_plan
from fl_split.plan.versions import check_versions
from fl_split.tools.doctor import diagnose, show_examples
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers
from fl_split.trunk.server import embedded

SECRET = "Zanzibar"


def statuses(config: RunConfig, node: NodeConfig | None = None, **options: Any) -> dict[str, tuple[str, str]]:
    return {check.name: (check.status, check.text) for check in diagnose(config, node or NodeConfig(), **options)}


def test_the_demo_passes_and_each_check_says_what_it_saw(tmp_path: Path, demo_model: Path) -> None:
    found = statuses(RunConfig.from_flat({"run.dir": str(tmp_path), "data.max-length": 64}), max_rows=50)
    assert {status for status, _ in found.values()} == {"pass"}
    assert "2 + 4 + 2 layers" in found["model"][1]
    assert found["data"][1].endswith("hospital-south.jsonl: 45 examples to train on, 5 held out")
    assert "the loss counts" in found["targets"][1]
    assert "embedded" in found["trunk"][1]


def test_what_epsilon_a_run_would_come_to_is_said_before(tmp_path: Path, demo_model: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'dp' is not installed")
    base: dict[str, Any] = {"run.dir": str(tmp_path), "data.max-length": 64, "train.keep": "last",
                            "surrogate.kind": "none"}  # fmt: skip
    on = {"dp.record-noise-multiplier": 1.0}
    checks = [c for c in diagnose(RunConfig.from_flat({**base, **on}), NodeConfig()) if c.name == "record-dp"]
    assert [c.status for c in checks] == ["pass", "pass"] and all(UNCOVERED in c.text for c in checks)
    epsilon = float(re.search(r"epsilon ([0-9.]+) at delta 1e-05 for one example after 90 steps", checks[0].text)[1])  # type: ignore[index]
    assert epsilon > 1
    own = {"data-path": str(demo.data_folder() / "hospital-north.jsonl"), "dp.record-max-epsilon": epsilon / 2}
    node = NodeConfig.from_flat({"partition-id": 0, **on, **own})
    status, text = statuses(RunConfig.from_flat(base), node)["record-dp"]
    assert status == "warn" and "ends training before" in text and UNCOVERED in text
    status, text = statuses(RunConfig.from_flat({**base, **on, "dp.record-delta": 0.5}))["record-dp"]
    assert status == "fail" and "dp.record-delta=0.5 is too large" in text
    status, text = statuses(RunConfig(), node)["record-dp"]
    assert status == "fail" and "does not go with surrogate.kind='auto'" in text
    assert "record-dp" not in statuses(RunConfig.from_flat(base), max_rows=50)


def test_limit_that_a_shared_bottom_exceeds_fails(demo_model: Path) -> None:
    config = RunConfig.from_flat({"surrogate.max-bytes": "1kB", "aggregation.share": "both"})
    last = list(diagnose(config, NodeConfig()))[-1]
    assert (last.status, last.name) == ("fail", "surrogate") and "surrogate.max-bytes=1kB" in last.text


def test_bad_rows_and_cut_examples_are_warned_of(jsonl: Callable[..., Path], tmp_path: Path, demo_model: Path) -> None:
    good = [{"question": f"who is {i}?", "answer": f"{SECRET} " * 30} for i in range(5)]
    path = jsonl([*good, {"question": SECRET, "answer": ""}])
    found = statuses(RunConfig.from_flat({"run.dir": str(tmp_path), "data.path": str(path), "data.max-length": 20}))
    assert found["rows"] == ("warn", "1 are left out: 1 empty (rows.jsonl line 6); correct them, or accept their loss")
    assert found["lengths"][0] == "warn"
    assert "5 of 5 are cut" in found["lengths"][1]
    assert int(found["lengths"][1].split("longest ")[1].split()[0]) > 60, "lengths are those before cutting"
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


def test_two_trunks_of_a_run_in_shares_are_both_asked(tmp_path: Path, demo_model: Path) -> None:
    keys = {"run.dir": str(tmp_path), "surrogate.kind": "shares", "data.max-length": 64, "trunk.timeout-s": 1.0}
    shares = TrunkConfig.model_validate({"server": {"gradient-shares": True}, "metrics": {"enabled": False}})
    held = hold_layers(demo_model, 2, 2)
    with embedded(held, config=shares) as one, embedded(held, config=shares) as other:
        run = RunConfig.from_flat({**keys, "trunk.address": one, "trunk.share-address": other})
        assert f"{one} and {other} answer" in statuses(run, max_rows=20)["trunk"][1]
        lone = RunConfig.from_flat({**keys, "trunk.address": one, "trunk.share-address": "127.0.0.1:1"})
        assert "no trunk answers at 127.0.0.1:1" in statuses(lone, max_rows=20)["trunk"][1]
        same = NodeConfig(trunk_share_address=one)
        assert "one operator would have both shares" in statuses(run, same, max_rows=20)["trunk"][1]


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


def test_a_second_adapter_needs_room_as_well(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for keys in ({}, {"aggregation.personal": True, "aggregation.share": "top", "aggregation.min-nodes": 3}):
        config = RunConfig.from_flat({"run.dir": str(tmp_path), **keys})
        plan, alone = make_plan(read_config("demo"), config), make_plan(read_config("demo"), RunConfig())
        assert plan.node.training == config.num_trainings * alone.node.training
        free = 3 * alone.node.training
        monkeypatch.setattr(fits_here.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert list(check_room(config, NodeConfig()))[1].status == ("fail" if keys else "pass")


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
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read \(FileNotFoundError\): expected a TOML file"):
        read_values(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(ConfigError, match=r"bad\.toml cannot be read as TOML"):
        read_values(tmp_path / "bad.toml", [])
    with pytest.raises(ConfigError, match="wrong key=value"):
        read_values(None, ["run.name=mine"])


def doctor(tmp_path: Path, model: Path, data: Path | str, **keys: Any) -> dict[str, tuple[str, str]]:
    values = {"run.dir": str(tmp_path), "model.name": str(model), "data.path": str(data), **keys}
    return statuses(RunConfig.from_flat(values))


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(count)]


@pytest.fixture
def copy(demo_model: Path, tmp_path: Path) -> Path:
    """The demo's model, to be spoilt."""
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


def test_a_models_faults_fail_with_their_remedies(copy: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl(rows(20))
    about = json.loads((copy / "config.json").read_text())

    def change(**keys: Any) -> dict[str, tuple[str, str]]:
        (copy / "config.json").write_text(json.dumps({**about, **keys}))
        return doctor(tmp_path, copy, path)

    assert "fit" not in change()
    assert change(vocab_size=300)["fit"][0] == "fail"
    assert "resize_token_embeddings" in change(vocab_size=300)["fit"][1]
    assert change(max_position_embeddings=8)["fit"][0] == "warn"
    quantized = change(quantization_config={"quant_method": "vptq"})["model"]
    assert quantized[0] == "fail" and "is quantized, and cannot be read here" in quantized[1]
    tokens = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokens, "pad_token": None, "eos_token": None}))
    assert "neither a pad token nor an end token" in change()["tokenizer"][1]
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokens, "eos_token": None}))
    assert change()["tokenizer"] == ("warn", "it has no end token, so that answers are learnt without an end")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "has its weights in .bin files, which can run code and are not read" in change()["model"][1]


@pytest.mark.parametrize("fault", ["another prefix", "another shape", "one is missing"])
def test_weights_that_are_not_the_configurations_fail(
    copy: Path, jsonl: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    weights, path = load_file(copy / "model.safetensors"), jsonl(rows(20))
    assert doctor(tmp_path, copy, path)["weights"][0] == "pass"
    if fault == "another prefix":
        weights = {f"inner.{name}": value for name, value in weights.items()}
    elif fault == "another shape":
        weights["model.layers.7.mlp.up_proj.weight"] = weights["model.layers.7.mlp.up_proj.weight"][:8].clone()
    else:
        del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found = doctor(tmp_path, copy, path)
    status, text = found["weights"]
    assert status == "fail" and "lacks weights that a node needs, or has them in another shape" in text
    assert found["data"][0] == "pass"


def test_a_trunk_that_cannot_be_streamed_fails_where_that_is_asked_for_alone(
    copy: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    weights, path = load_file(copy / "model.safetensors"), jsonl(rows(20))
    del weights["model.layers.5.input_layernorm.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    status, text = doctor(tmp_path, copy, path, **{"surrogate.kind": "streamed"})["weights"]
    assert status == "fail" and "cannot read layer 5 of this llama" in text
    found = doctor(tmp_path, copy, path)  # `auto` does as the run will
    assert "is 'blocks' here: the trunk's layers cannot be read one at a time" in found["surrogate"][1]
    assert found["weights"][0] == "pass"


def test_an_encoder_as_a_language_model_fails(tmp_path: Path, demo_model: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(num_hidden_layers=6, **small)).save_pretrained(tmp_path / "bert")
    status, text = doctor(tmp_path, tmp_path / "bert", "demo")["model"]
    assert status == "fail" and "bert is an encoder: each position sees the tokens after it" in text


def test_every_nodes_file_is_looked_at(jsonl: Callable[..., Path], tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "data").mkdir()
    folder = jsonl(rows(20), "data/a.jsonl")
    jsonl([{"note": SECRET}] * 3, "data/b.jsonl")
    config = RunConfig.from_flat({"run.dir": str(tmp_path), "data.path": str(folder.parent)})
    first, second = (check for check in diagnose(config, NodeConfig()) if check.name == "data")
    assert first.status == "pass" and first.text.startswith(f"node 0: 20 rows of {folder}: ")
    assert second.status == "fail" and second.text.startswith("node 1: ") and "b.jsonl has no column" in second.text


def test_copies_notes_and_template_are_told(jsonl: Callable[..., Path], tmp_path: Path, demo_model: Path) -> None:
    path = jsonl(rows(8) * 5)
    (path.parent / "notes.txt").write_text(SECRET)
    found = doctor(tmp_path, demo_model, path.parent, **{"data.holdout-max": 5})
    assert found["rows"][1].startswith("1 other files are not read: notes.txt; expected are")
    told = "32 of 40 examples are copies of others; equal ones are on one side, trained on or held out"
    assert found["copies"] == ("warn", told)
    assert found["template"][1] == 'prompt and response are written as plain: "<s>{prompt}\\n{response}</s>"'
    many = doctor(tmp_path, demo_model, jsonl(rows(200)), **{"data.holdout-max": 5})
    assert many["data"][1].endswith("held out, 5 of them evaluated") and "copies" not in many
    (path.parent / "rows.jsonl").unlink()
    alike = [{"question": "who?", "answer": f"{'the same ' * 9} {i}"} for i in range(60)]
    status, text = doctor(tmp_path, demo_model, jsonl(alike), **{"data.max-length": 12})["copies"]
    assert status == "warn" and "have the tokens of held-out ones, though their rows differ" in text


def test_keys_of_others_are_told_and_demo_data_is_for_the_demo(tmp_path: Path, demo_model: Path, copy: Path) -> None:
    node = NodeConfig.from_flat({"partition-id": 0, "other-app": 1})
    found = statuses(RunConfig.from_flat({"run.dir": str(tmp_path)}), node, max_rows=20)
    assert found["node"] == ("warn", "'other-app' is no key of fl-split's (the nearest is 'trunk-ca'), and left alone")
    status, text = doctor(tmp_path, copy, "demo")["data"]
    assert status == "fail" and "has no data-path, and the run's data.path='demo' is the demo's" in text


def test_examples_are_shown_with_what_the_loss_counts(jsonl: Callable[..., Path], tmp_path: Path, copy: Path) -> None:
    path = jsonl(rows(20))
    args = ["doctor", "--show", "2", "-c", f'model.name="{copy}" data.path="{path}" run.dir="{tmp_path}"']
    shown = CliRunner().invoke(app, args).output.partition("example 1, ")[2]
    assert "it is" not in shown.replace("«it is", ""), "every answer is marked"
    assert shown.count("«it is ") == shown.count("</s>»") == 2
    assert "tokens, " in shown and "of them counted:\n<s>" in shown
    chatml = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (copy / "chat_template.jinja").write_text(chatml + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert re.search(r"assistant: ?« ?it is \d+\.\s*»", CliRunner().invoke(app, args).output)
    path = jsonl([{"note": f"note {i}", "label": "ab"[i % 2]} for i in range(9)])
    keys = {"task": "sequence-classification", "data.text": "note", "data.labels": "a,b", "data.path": str(path)}
    config = RunConfig.from_flat({**keys, "model.name": str(copy), "run.dir": str(tmp_path)})
    assert re.search(r"example 1, \d+ tokens, label [ab]:\n<s> note \d", next(show_examples(config, NodeConfig(), 1)))
