"""What a node refuses or tells before it trains: sides that moved, forgotten paths, models that do not fit."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from flwr.app import Context, RecordDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
)

import client_app
import server_app
from fl_split.config import Data, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.fits import check_fits, learned_positions
from fl_split.data.load import Examples, load_examples
from fl_split.errors import ConfigError, DataError, NodeStateError
from fl_split.node.build import check_demo_data
from fl_split.node.state import NodeFolder, SavedRound

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


@pytest.fixture
def run(demo_model: Path, tmp_path: Path) -> Run:
    """Run one node on a file, with few short steps; returns its metrics by round."""

    def run(data: Path, **changes: Any) -> list[dict[str, Any]]:
        config = {
            **RunConfig().to_flat(),
            "num-server-rounds": 1,
            "train.steps": 1,
            "train.batch-size": 4,
            "data.path": str(data),
            "data.max-length": 32,
            "surrogate.kind": "identity",
            "aggregation.min-nodes": 1,
            "trunk.in-flight": 1,
            "run.dir": str(tmp_path / "runs"),
            "run.name": "x",
            **changes,
        }
        grid = InProcessGrid(client_app.app, 1, config)
        server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
        return [dict(reply.content["metrics"]) for reply in grid.replies.values()]

    return run


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(start, start + count)]


def test_data_that_grows_is_told_and_the_base_scored_on_the_same_rows_as_the_rest(
    run: Run, jsonl: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = run(jsonl(rows(40)))
    (second,) = run(jsonl(rows(40)), **{"num-server-rounds": 2, "run.resume": True})
    assert second["heldout-loss-base"] == first["heldout-loss-base"]
    assert second["heldout-loss-before"] == first["heldout-loss-after"]
    assert "other examples are held out" not in caplog.text
    (third,) = run(jsonl(rows(80)), **{"num-server-rounds": 3, "run.resume": True})
    assert "the data has changed since it was last read: 80 rows, 40 before" in caplog.text
    assert "other examples are held out than in the last round: the base model is scored on them anew" in caplog.text
    (whole,) = run(jsonl(rows(80)), **{"run.name": "whole"})
    assert third["heldout-loss-base"] == pytest.approx(whole["heldout-loss-base"])
    assert third["heldout-loss-base"] != first["heldout-loss-base"]


def test_a_run_of_a_version_that_held_out_other_rows_is_refused(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, "run")
    folder.save(SavedRound(1, {"a": torch.ones(1)}, heldout_id=b"12345678"))
    saved = folder.load_before(2)
    assert saved is not None and saved.heldout_id == b"12345678"
    (numbers,) = tmp_path.rglob("numbers.safetensors")
    save_file({name: value for name, value in load_file(numbers).items() if name != "heldout-id"}, numbers)
    with pytest.raises(NodeStateError, match="begun by an older fl-split, which drew the held-out examples otherwise"):
        folder.load_before(2)


def test_a_run_of_a_version_that_shared_its_own_adapter_goes_on(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, "run")
    folder.save(SavedRound(1, {"a": torch.ones(1)}, shared_adapter={"b": torch.ones(1)}, heldout_id=b"12345678"))
    saved = folder.load_before(2)
    assert saved is not None and saved.shared_adapter == {"b": torch.ones(1)}
    for file in tmp_path.rglob("shared-*.safetensors"):
        file.unlink()
    saved = folder.load_before(2)
    assert saved is not None and (saved.adapter, saved.shared_adapter) == ({"a": torch.ones(1)}, {})


def test_evaluation_has_a_time_of_its_own_and_is_capped(run: Run, jsonl: Callable[..., Path]) -> None:
    path = jsonl(rows(400))
    (whole,) = run(path, **{"data.holdout": 0.5, "run.name": "a"})
    (capped,) = run(path, **{"data.holdout": 0.5, "data.holdout-max": 8, "run.name": "b"})
    assert whole["trunk-forward-s"] < whole["train-s"] < whole["evaluate-s"]
    assert 2 * capped["evaluate-s"] < whole["evaluate-s"]
    assert capped["num-examples"] == whole["num-examples"]


def test_the_card_names_data_and_prompt_format(run: Run, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl(rows(40))
    run(path)
    card = (tmp_path / "runs/x/nodes/0/adapter/README.md").read_text()
    assert f"| data, on the node | {path}, 40 rows |" in card
    assert '| prompt and response | `plain: "<s>{prompt}\\n{response}</s>"` |' in card


@pytest.mark.parametrize("said", [{"out-dir": "/x"}, {"trunk-address": "a:1"}])
def test_demo_data_is_refused_on_a_deployed_node(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no data-path, .* not an institution's: set data-path in --node-config"):
        check_demo_data(RunConfig(), NodeConfig.from_flat({"partition-id": 0, **said}))
    check_demo_data(RunConfig(), NodeConfig.from_flat({"partition-id": 0, "data-path": "/d", **said}))


def test_demo_data_is_for_the_demo_and_for_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = NodeConfig.from_flat({"partition-id": 0, "num-partitions": 2, "lora.rank": 2})
    check_demo_data(RunConfig(), simulated)
    with pytest.raises(ConfigError, match="for model.name='demo', not '/models/x': set data.path"):
        check_demo_data(RunConfig.from_flat({"model.name": "/models/x"}), simulated)
    check_demo_data(RunConfig.from_flat({"model.name": "/models/x", "data.path": "/d"}), simulated)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/flwr-clientapp"])
    with pytest.raises(ConfigError, match="set data-path in --node-config"):
        check_demo_data(RunConfig(), simulated)


@pytest.mark.parametrize("key", ["datapath", "data_path", "data-pth", "path", "Data-Path", "out_dir", "lora-rank"])
def test_keys_that_look_like_a_misspelt_one_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no key '{key}'; did you mean '(data-path|out-dir|lora.rank)'\?"):
        NodeConfig.from_flat({"partition-id": 0, key: "/d"})


def test_keys_of_other_apps_are_left_alone_and_known_as_such() -> None:
    node = NodeConfig.from_flat({"partition-id": 0, "other-app": 7})
    assert node.unknown == {"other-app": "trunk-ca"}
    assert not node.is_deployed


# ----------------------------------------------------------------------------------------------------- what fits


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase, jsonl: Callable[..., Path]) -> Examples:
    return load_examples(Data(path=str(jsonl(rows(20)))), NodeConfig(), tokenizer, 0)


def fits(examples: Examples, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, **keys: Any) -> list[str]:
    return check_fits(model, tokenizer, examples, Data(**keys))


def test_tokens_beyond_the_embeddings_are_refused_if_they_are_used(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, jsonl: Callable[..., Path]
) -> None:
    size = len(tokenizer)
    model = LlamaConfig(vocab_size=size)
    assert fits(examples, tokenizer, model) == []
    tokenizer.add_tokens(["<drug>"])
    (told,) = fits(examples, tokenizer, model)
    assert told == f"the tokenizer has {size + 1} tokens, the model embeddings for {size}; the examples use no others"
    path = jsonl([*rows(9), {"question": "<drug>?", "answer": "yes."}])
    using = load_examples(Data(path=str(path)), NodeConfig(), tokenizer, 0)
    with pytest.raises(DataError, match=rf"the tokenizer has {size + 1} tokens, .*resize_token_embeddings"):
        fits(using, tokenizer, model)
    tokenizer.pad_token = "<drug>"
    with pytest.raises(DataError, match=r"or padding does"):
        fits(examples, tokenizer, model)


def test_positions_that_begin_after_paddings_are_fewer() -> None:
    small = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    roberta = RobertaConfig(max_position_embeddings=18, **small)
    assert learned_positions(roberta) == 16
    model = RobertaModel(roberta)
    model(torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))


def test_tokens_as_many_as_positions_are_not_taken_for_them() -> None:
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    assert learned_positions(BertConfig(vocab_size=18, max_position_embeddings=18, pad_token_id=0, **small)) == 18


def test_lengths_beyond_learnt_positions_are_refused_and_beyond_rotary_ones_told(
    tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> None:
    learnt, rotary = GPT2Config(n_positions=16), LlamaConfig(max_position_embeddings=16)
    assert fits(examples, tokenizer, learnt, max_length=16) == []
    with pytest.raises(DataError, match="data.max-length=17 is beyond the 16 positions .* to 16 or less"):
        fits(examples, tokenizer, learnt, max_length=17)
    (told,) = fits(examples, tokenizer, rotary)
    assert "more than the 16 positions of this model" in told
    assert fits(examples, tokenizer, LlamaConfig(), max_length=9999) == []


def test_a_tokenizer_without_pad_and_end_token_is_refused(demo_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in about.items() if k not in ("pad_token", "eos_token")}))
    with pytest.raises(ConfigError, match='neither a pad token nor an end token.*"eos_token"'):
        prepare_tokenizer(AutoTokenizer.from_pretrained(tmp_path))


def test_a_long_text_is_cut_and_so_no_indexing_error_is_foretold(
    demo_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model, model_max_length=4)
    prepare_tokenizer(tokenizer).encode("more words than this model has positions for")
    assert caplog.messages == []
