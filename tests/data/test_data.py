"""Private examples: what is read, what the loss counts, what is held out, and errors without a word of it."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.examples import Example
from fl_split.data.load import Examples, load_examples
from fl_split.errors import ConfigError, DataError
from fl_split.model.loss import IGNORED

SECRET = "Zanzibar"


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Examples]:
    def load(path: Path | str, node: NodeConfig | None = None, seed: int = 0, **keys: Any) -> Examples:
        config = Data.model_validate({"path": str(path), **keys})
        return load_examples(config, node or NodeConfig(), tokenizer, seed)

    return load


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(start, start + count)]


def everything(examples: Examples) -> tuple[list[Example], list[Example]]:
    return list(examples.train), list(examples.heldout)


def test_loss_counts_the_response_and_the_end_only(
    load: Callable[..., Examples], jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = load(jsonl(rows(4)))
    for example in (*examples.train, *examples.heldout):
        counted = [label for label in example["labels"] if label != IGNORED]
        text = tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        question, answer = text.split("\n")
        assert question.startswith("what is number")
        assert tokenizer.decode(counted, skip_special_tokens=True) == answer
        assert counted[-1] == tokenizer.eos_token_id
        assert example["input_ids"][-len(counted) :] == counted


def test_plain_text_counts_every_token(load: Callable[..., Examples], jsonl: Callable[..., Path]) -> None:
    examples = load(jsonl([{"note": f"the note number {i}"} for i in range(4)]), text="note")
    example = examples.train[0]
    assert example["labels"][1:] == example["input_ids"][1:]


def test_texts_with_labels_have_a_class_each_and_are_padded_together(
    load: Callable[..., Examples], jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    notes = [{"note": f"the note {'again ' * i}", "kind": ("b", "a", 7)[i % 3]} for i in range(9)]
    examples = load(jsonl(notes), text="note", label="kind", labels="a, b,7", **{"max-length": 10})
    for example in (*examples.train, *examples.heldout):
        text = tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        assert len(example["input_ids"]) <= 10
        if len(example["input_ids"]) < 10:
            assert example["labels"] == (1, 0, 2)[text.count("again") % 3]
    (batch,) = heldout_batches(examples.train, tokenizer, 20)
    assert batch["labels"].shape == (len(examples.train),)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(examples.train), 10)


@pytest.mark.parametrize("wrong", [SECRET, 3, True])
def test_labels_that_are_not_of_the_run_are_refused_by_row_number_only(
    load: Callable[..., Examples], jsonl: Callable[..., Path], wrong: object
) -> None:
    notes: list[dict[str, object]] = [{"note": f"note {i}", "label": "a"} for i in range(4)]
    notes[2]["label"] = wrong
    with pytest.raises(
        DataError, match=r"1 with a label that data\.labels does not name \(rows\.jsonl line 3\)"
    ) as error:
        load(jsonl(notes), text="note", labels="a,b")
    assert SECRET not in str(error.value)
    with pytest.raises(DataError, match=r"no column data\.label='kind'"):
        load(jsonl(notes), text="note", label="kind", labels="a,b")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_csv_and_parquet_are_read_like_jsonl(
    load: Callable[..., Examples], jsonl: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    import datasets

    getattr(datasets.Dataset.from_list(rows(6)), f"to_{form}")(str(tmp_path / f"rows.{form}"))
    assert everything(load(tmp_path / f"rows.{form}")) == everything(load(jsonl(rows(6))))


def test_heldout_part_is_drawn_by_seed_and_apart(load: Callable[..., Examples], jsonl: Callable[..., Path]) -> None:
    path = jsonl(rows(300))
    first, again, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert everything(first) == everything(again)
    assert list(first.heldout) != list(other.heldout)
    assert 15 < len(first.heldout) < 45
    train = list(first.train)
    assert not any(example in train for example in first.heldout)
    assert len(first.train) + len(first.heldout) == 300


def test_one_file_per_partition_or_one_file_dealt_out(
    load: Callable[..., Examples], jsonl: Callable[..., Path]
) -> None:
    folder = jsonl(rows(10), "a.jsonl").parent
    jsonl(rows(10, 10), "b.jsonl")

    def texts(path: Path, i: int) -> list[list[int]]:
        examples = load(path, NodeConfig(partition_id=i, num_partitions=2))
        return [e["input_ids"] for e in (*examples.train, *examples.heldout)]

    assert sorted(texts(folder, 0)) == sorted(texts(folder / "a.jsonl", 0) + texts(folder / "a.jsonl", 1))
    assert not any(ids in texts(folder, 1) for ids in texts(folder, 0))
    assert len(texts(folder / "a.jsonl", 0)) == 5
    with pytest.raises(DataError, match=r"2 files, but the run has 3 nodes.*num-supernodes=2"):
        load(folder, NodeConfig(num_partitions=3))


def test_a_nodes_own_path_comes_first_and_is_all_its_own(
    load: Callable[..., Examples], jsonl: Callable[..., Path]
) -> None:
    folder = jsonl(rows(10), "a.jsonl").parent
    jsonl(rows(10, 10), "b.jsonl")
    examples = load("demo", NodeConfig(data_path=str(folder), partition_id=3, num_partitions=7))
    assert len(examples.train) + len(examples.heldout) == 20


def test_batches_are_endless_padded_and_resume_where_they_would_be(
    load: Callable[..., Examples], jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = load(jsonl(rows(12))).train

    def ids(first: int, count: int) -> list[list[list[int]]]:
        return [b["input_ids"].tolist() for b in islice(training_batches(examples, tokenizer, 4, 7, first), count)]

    assert ids(0, 9)[5:] == ids(20, 4)
    for batch in islice(training_batches(examples, tokenizer, 4, 7, 0), 3):
        assert ((batch["attention_mask"] == 1) | (batch["labels"] == IGNORED)).all()


def test_heldout_batches_hold_each_example_once(
    load: Callable[..., Examples], jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = load(jsonl(rows(11))).train
    assert sum(len(batch["input_ids"]) for batch in heldout_batches(examples, tokenizer, 4)) == len(examples)


def test_long_examples_are_cut_and_prompts_without_room_skipped(
    load: Callable[..., Examples], jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    long = {"question": "word " * 80, "answer": SECRET}
    examples = load(jsonl([*rows(5), long, {"question": "empty?", "answer": " "}]), **{"max-length": 48})
    assert all(len(example["input_ids"]) <= 48 for example in examples.train)
    assert "skipped 2 of 7 rows: 1 with nothing to learn within data.max-length (rows.jsonl line 6)" in caplog.text
    assert "1 empty (rows.jsonl line 7)" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{{"question": "{SECRET}", "answer": ', r"0 usable .* found 1 malformed: no JSON \(bad\.jsonl line 1\)"),
        (
            json.dumps({"prompt": SECRET, "answer": SECRET}),
            r"no column data\.prompt='question': its first row has 2 others, which",
        ),
        (
            json.dumps({SECRET: 1, "answer": "x"}),
            r"no column data\.prompt='question': its first row has 2 others, which",
        ),
        (json.dumps({"question": SECRET, "answer": SECRET}), "1 usable examples of 1 rows"),
        (json.dumps({"question": [SECRET], "answer": 3}), "0 usable examples of 1 rows"),
    ],
)
def test_bad_files_are_named_and_never_quoted(
    load: Callable[..., Examples], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_paths_that_match_nothing_or_the_wrong_kind_are_refused(load: Callable[..., Examples], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        load(tmp_path / "*.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"matches notes\.txt"):
        load(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match=r"data\.path='here' is relative"):
        load("here")
    with pytest.raises(DataError, match="data-path='/nowhere' matches no file"):
        load("demo", NodeConfig(data_path="/nowhere"))
