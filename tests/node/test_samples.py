"""Held-out prompts answered after a round: by the whole model's tokens, on the node's disk, and only means leave."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, run_app
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fl_split.config import Lora, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import load_examples
from fl_split.errors import ConfigError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import IGNORED
from fl_split.model.slots import trunk_calls_of
from fl_split.model.trunk import LocalTrunk
from fl_split.node import personal
from fl_split.node.expected import Expected
from fl_split.node.samples import Sample, answer_heldout, keep, means
from fl_split.node.trial import Gain
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def replies(grid: InProcessGrid) -> list[dict[str, Any]]:
    return [dict(reply.content["metrics"]) for reply in grid.replies.values()]


def test_answers_stay_on_the_node_and_their_means_are_sent(demo_model: Path, tmp_path: Path) -> None:
    grid = run_app(tmp_path, **{"data.samples": 3, "trunk.wire-dtype": "float32", "train.keep": "last"})
    for number in range(2):
        own = entries(tmp_path / "x" / "nodes" / str(number))
        assert [entry["round"] for entry in own] == [1, 1, 1, 2, 2, 2]
        sent = [metrics for metrics in replies(grid) if metrics["partition-id"] == number]
        for i, metrics in enumerate(sent):
            of_round = [entry for entry in own if entry["round"] == i + 1]
            for key, name in (("sample-exact-match", "exact_match"), ("sample-rouge-l", "rouge_l")):
                assert metrics[key] == pytest.approx(sum(entry[name] for entry in of_round) / 3)
    words = [entry[name] for entry in own for name in ("prompt", "reference", "answer") if len(entry[name]) > 3]
    told = "".join(str(message.content) for message in (*grid.replies.values(), *grid.instructions))
    assert words and not any(word in told or repr(word)[1:-1] in told for word in words)
    kept_by_server = [path for path in (tmp_path / "x").iterdir() if path.is_file()]
    assert kept_by_server and not any(word.encode() in p.read_bytes() for p in kept_by_server for word in words)


def test_they_are_of_the_mixture_that_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: list[bool] = []

    def answer(model: Any, *rest: Any) -> list[Sample]:
        mixed.append(len(model.active_adapters) > 1)
        return [Sample("p", "r", "a", 0.0, 0.0)]

    monkeypatch.setattr("fl_split.node.steps.answer_heldout", answer)
    monkeypatch.setattr(personal, "gain", lambda *losses: Gain(mean=1.0, error=0.0))  # of whatever is tried first
    shared = {"aggregation.personal": True, "aggregation.share": "top", "aggregation.min-nodes": 3}
    short = {"data.samples": 1, "data.holdout": 0.5, "data.partitioner": "iid", "surrogate.kind": "none"}
    run_app(tmp_path, nodes=3, **shared, **short)
    assert mixed == [False] * 3 + [True] * 3  # in the first round there are no others


def test_they_are_the_whole_models_answers(demo_model: Path, tmp_path: Path) -> None:
    run_app(tmp_path, **{"data.samples": 2, "trunk.wire-dtype": "float32", "train.keep": "last"})
    folder = tmp_path / "x" / "nodes" / "0"
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    full: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model), folder / "adapter").eval()
    data = RunConfig.from_flat({"data.max-length": 48, "data.holdout": 0.02}).data
    node = NodeConfig(partition_id=0, num_partitions=2)
    examples = load_examples(data, node, tokenizer, 0).heldout
    for entry, held_out in zip(entries(folder)[2:], examples, strict=False):
        labels = held_out["labels"]
        ids = torch.tensor([held_out["input_ids"][: labels.count(IGNORED)]])
        out = full.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        whole = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert entry["answer"] and whole.startswith(entry["answer"])


class Letters:
    """A tokenizer of one letter a token."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(96 + i % 26) if i > 2 else " " for i in ids)


@pytest.fixture
def model(checkpoint: Callable[[str], Path], held: HeldLayers) -> Any:
    ends = load_ends(checkpoint("llama"), 2, 2, LocalTrunk(held.model), surrogate="blocks", surrogate_layers=1)
    return adapters.attach(ends, Lora(), train_bottom=True, seed=0)


def example(ids: list[int], targets: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "labels": [i if n in targets else IGNORED for n, i in enumerate(ids)]}


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_it_works_without_streams_as_well_and_leaves_the_model_as_it_was(
    model: Any, held: HeldLayers, checkpoint: Callable[[str], Path], cache_mb: int
) -> None:
    """Of a conversation the last answer is asked for, of a text the second half."""
    config = TrunkConfig.model_validate({"limits": {"cache-mb": cache_mb}})
    calls = trunk_calls_of(model)
    before = calls.trunk
    given = [example([5, 6, 7, 8, 9, 10], [1, 4]), example([5, 6, 7, 8], [0, 1, 2, 3]), example([9, 8, 7], [2])]
    with server.embedded(held, config=config) as address:
        with TrunkConnection(address, Expected.from_checkpoint(checkpoint("llama"), 2, 2), wire_dtype="float32") as way:
            way.connect()
            assert way.offers_streams == (cache_mb > 0)
            samples = answer_heldout(model, way, Letters(), given, 2)  # type: ignore[arg-type]
    assert [(s.prompt, s.reference) for s in samples] == [("efgh", "i"), ("ef", "gh"), ("ih", "g")]
    assert calls.trunk is before
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert Letters().decode(whole[0, 4:].tolist(), True).startswith(samples[0].answer[:9])


def test_scores_know_words_of_any_alphabet() -> None:
    from fl_split.node.samples import check_scorer

    score = check_scorer().score("die Ärzte: größer", "Ärzte größer")["rougeL"]
    assert score.fmeasure == pytest.approx(0.8)


def test_means_are_all_that_is_given_away() -> None:
    samples = [Sample("p", "r", "r", 1.0, 1.0), Sample("p", "r", "x", 0.0, 0.5)]
    assert means(samples) == {"sample-exact-match": 0.5, "sample-rouge-l": 0.75}
    assert means([]) == {}


def test_a_round_that_is_done_again_replaces_its_samples(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    for server_round, answer in ((1, "a"), (2, "lost"), (2, "größer")):
        keep(file, server_round, [Sample("p", "r", answer, 0.0, 0.0)])
    assert [(e["round"], e["answer"]) for e in entries(tmp_path)] == [(1, "a"), (2, "größer")]
    assert file.stat().st_mode & 0o077 == 0


def test_a_missing_scorer_is_named_before_the_round(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'fl-split\[samples\]'"):
        answer_heldout(None, None, None, [], 1)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="data.samples needs a package"):
        run_app(tmp_path, **{"data.samples": 1})


def test_a_classifier_has_no_answers() -> None:
    with pytest.raises(ConfigError, match="data.samples is for language models"):
        RunConfig.from_flat(
            {"task": "sequence-classification", "data.text": "t", "data.labels": "a,b", "data.samples": 1}
        )
