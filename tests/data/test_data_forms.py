"""Forms of private data: saved folders, the hub, chats, bad rows; reports that name places and quote nothing."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import Examples, load_examples
from fl_split.errors import ConfigError, DataError
from fl_split.model.loss import IGNORED

SECRET = "Zanzibar"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant: {% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }} {% endif %}{% endfor %}"
)
THINKING = (  # only the last turn has room for thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Load = Callable[..., Examples]


@pytest.fixture
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Load:
    def load(path: Path | str, node: NodeConfig | None = None, store: Path | None = None, **keys: Any) -> Examples:
        config = Data.model_validate({"path": str(path), **keys})
        return load_examples(config, node or NodeConfig(), tokenizer, 0, store=store)

    return load


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(count)]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def everything(examples: Examples) -> list[list[int]]:
    return [example["input_ids"] for example in (*examples.train, *examples.heldout)]


def counted(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    labels = [example["labels"] for example in (*examples.train, *examples.heldout)]
    return {bare(tokenizer.decode([token for token in row if token != IGNORED])) for row in labels}


def bare(text: object) -> str:
    """Without spaces, of which the demo's tokenizer makes its own."""
    return str(text).replace(" ", "")


def test_a_saved_folder_is_read_like_jsonl_with_one_split_or_several(
    load: Load, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data = datasets.Dataset.from_list(rows(6))
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "dev": data.select([0, 1, 2])}).save_to_disk(str(tmp_path / "several"))
    expected = everything(load(jsonl(rows(6))))
    assert everything(load(tmp_path / "one")) == everything(load(tmp_path / "several")) == expected
    assert len(everything(load(tmp_path / "several", split="dev"))) == 3
    with pytest.raises(DataError, match=r"no data\.split='test': it has dev, train"):
        load(tmp_path / "several", split="test")
    (tmp_path / "one" / "state.json").write_text(SECRET)
    with pytest.raises(DataError, match="cannot be read as a saved dataset") as error:
        load(tmp_path / "one")
    assert SECRET not in str(error.value)


def test_a_hub_dataset_is_streamed_by_name_and_dealt_out(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((args, options))
        return iter(rows(10))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = [
        everything(load("someone/notes", NodeConfig(partition_id=i, num_partitions=3), subset="en", split="dev"))
        for i in range(3)
    ]
    assert asked[0] == (("someone/notes", "en"), {"split": "dev", "streaming": True})
    assert sorted(map(len, parts)) == [3, 3, 4]
    assert sorted(sum(parts, [])) == sorted(everything(load("someone/notes")))

    def fail(*args: Any, **options: Any) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="could not be read from the Hugging Face hub: ValueError") as error:
        load("someone/notes")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "</s>")])
def test_loss_counts_what_the_assistant_says_and_the_end_of_its_turns(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, template: str, end: str
) -> None:
    tokenizer.chat_template = template
    talks = [chat(f"who {has} gout?", "the patient.", "who has asthma?", "nobody.") for has in ("has", "had")]
    examples = load(jsonl([{"talk": talk} for talk in talks]), messages="talk")
    assert counted(examples, tokenizer) == {f"thepatient.{end}nobody.{end}"}
    written = {bare(tokenizer.apply_chat_template(talk, tokenize=False)) for talk in talks}
    assert {bare(tokenizer.decode(ids)) for ids in everything(examples)} == written


def test_templates_that_write_the_last_turn_otherwise_are_understood_or_refused(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = THINKING
    talks = [chat(f"who {has} gout?", "the patient.", "who has asthma?", "nobody.") for has in ("has", "had")]
    path = jsonl([{"talk": talk} for talk in talks])
    examples = load(path, messages="talk")
    thoughts = "<think>\n\n</think>\n\n"
    assert counted(examples, tokenizer) == {f"thepatient.<|im_end|>\n{thoughts}nobody.<|im_end|>\n"}
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else 'cut' }}")
    with pytest.raises(DataError, match=r"2 whose chat template rewrites earlier turns.*\{% generation %\}"):
        load(path, messages="talk")


def test_chats_that_cannot_be_used_are_counted_by_reason(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception(messages[0].content) }}{% endif %}" + CHATML
    )
    good = [{"talk": chat(who, "the patient.")} for who in ("who?", "whom?")]
    twice = [{"role": "system", "content": SECRET}, *chat("who?", "I.")]
    bad: list[Any] = [SECRET, [{"role": "assistant"}], chat(SECRET), chat(SECRET, " "), twice]
    load(jsonl([*good, *({"talk": talk} for talk in bad)]), messages="talk")
    assert "skipped 5 of 7 rows: 2 without a list of messages with role and content (rows.jsonl line 3" in caplog.text
    assert "2 without an assistant message" in caplog.text
    assert "1 refused by the chat template (TemplateError) (rows.jsonl line 7)" in caplog.text
    assert SECRET not in caplog.text


def test_chats_need_a_template_and_a_fast_tokenizer(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl([{"talk": chat("who?", "I.")}] * 3)
    with pytest.raises(DataError, match=r"data\.messages='talk' needs the tokenizer's chat template"):
        load(path, messages="talk")
    tokenizer.chat_template = CHATML
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="needs a fast tokenizer"):
        load(path, messages="talk")
    with pytest.raises(ConfigError, match=r"data\.text='a' and data\.messages='b'"):
        RunConfig.from_flat({"data.text": "a", "data.messages": "b"})


def test_bad_rows_are_skipped_and_counted_or_refused_by_place(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notes.jsonl"
    lines = [json.dumps(row) for row in rows(5)]
    lines[1:1] = [f'{{"question": "{SECRET}', "", f'["{SECRET}"]', '{"question": 3, "answer": "a"}']
    path.write_text("\n".join(lines))
    report = load(path).report
    assert (report.num_rows, report.num_bad) == (8, 3)
    named = (
        r"1 malformed: no JSON \(notes\.jsonl line 2\); 1 malformed: a list instead of an object with columns "
        r"\(notes\.jsonl line 4\); 1 malformed: a number in data\.prompt, where text is expected "
        r"\(notes\.jsonl line 5\)"
    )
    with pytest.raises(DataError, match=rf"of 8 rows, {named}.*data\.bad-rows='skip'") as error:
        load(path, **{"bad-rows": "refuse"})
    assert SECRET not in str(error.value) + caplog.text


def test_csv_rows_of_another_width_are_bad_rows_and_places_are_lines(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    good = '"what is\n3?",it is 3.\n4?,4\n'
    path.write_text(f"question,answer\n{good}{SECRET}\n5?,5,{SECRET}\n6?,6\n")
    examples = load(path)
    assert len(everything(examples)) == 3
    fields = "fields than the first line names"
    assert examples.report.places == {
        f"malformed: fewer {fields}": ["notes.csv line 5"],
        f"malformed: more {fields}": ["notes.csv line 6"],
    }
    path.write_text(f'question,answer\n{good}"6?"x,6\n')
    assert load(path).report.places == {"malformed: quotes that do not fit": ["notes.csv line 5"]}
    path.write_bytes(b"question,answer\n" + good.encode() + b"\xff,7\n")
    assert load(path).report.places == {"not in UTF-8": ["notes.csv line 5"]}


def test_a_csv_without_a_header_does_not_give_its_first_row_away(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(f"{SECRET},{SECRET} again\n1,2\n")
    with pytest.raises(DataError, match=r"no column data\.prompt='question': it has 2 others; the first line") as error:
        load(path)
    assert SECRET not in str(error.value)


def test_malformed_rows_of_what_is_dealt_out_are_counted_and_skipped_by_node_0(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    good = [json.dumps({**row, "clinic": "ab"[i % 2]}) for i, row in enumerate(rows(12))]
    path.write_text("\n".join([*good[:5], f'{{"{SECRET}', *good[5:]]))
    by_column = {"partitioner": "column", "partition-by": "clinic"}
    first, second = (load(path, NodeConfig(partition_id=i, num_partitions=2), **by_column) for i in (0, 1))
    assert first.report.places == {"malformed: no JSON": ["notes.jsonl line 6"]} and not second.report.places
    assert len(everything(first)) == len(everything(second)) == 6


def test_damaged_parquet_is_named_and_not_quoted(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    path.write_text(SECRET)
    with pytest.raises(DataError, match=r"notes\.parquet cannot be read beyond its beginning") as error:
        load(path)
    assert SECRET not in str(error.value)


def test_truncation_is_reported_in_examples_and_tokens(
    load: Load, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl([*rows(3), {"question": "who?", "answer": "word " * 50}])
    whole = sorted(map(len, everything(load(path, **{"max-length": 512}))))
    assert "max-length" not in caplog.text
    report = load(path, **{"max-length": 40}).report
    assert (report.num_truncated, report.num_cut) == (1, whole[-1] - 40)
    assert f"cut 1 of 4 examples to data.max-length=40: {whole[-1] - 40} tokens are lost" in caplog.text


def test_prepared_examples_serve_later_rounds_until_anything_changes(
    load: Load,
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, path = tmp_path / "store", jsonl([*rows(9), {"question": "", "answer": ""}])
    first = load(path, store=store)
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr("fl_split.data.load._make_all", lambda *args: pytest.fail("read again"))
        again = load(path, store=store, holdout=0.1, **{"group-by-length": True})
    assert everything(first) == everything(again) == everything(load(path))
    assert first.report == again.report
    assert "skipped 1 of 10 rows" in caplog.text
    assert {file.stat().st_mode & 0o077 for file in store.iterdir()} == {0}
    assert len(everything(load(path, store=store, **{"max-length": 20}))) == 9
    path.write_text(path.read_text() + json.dumps(rows(1)[0]) + "\n")
    assert len(everything(load(path, store=store))) == 10
    assert len(list(store.iterdir())) == 2


def test_a_preparation_that_fails_leaves_nothing_behind(load: Load, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl([*rows(4), {"question": "", "answer": ""}])
    store = tmp_path / "store"
    for _ in range(2):  # the second time must not find what the first refused
        with pytest.raises(DataError, match="1 empty"):
            load(path, store=store, **{"bad-rows": "refuse"})
    with pytest.raises(DataError, match="no column"):
        load(path, store=store, prompt="nothing")
    assert not list(store.glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat_however_many_rows_there_are(load: Load, tmp_path: Path) -> None:
    def anonymous_mb() -> float:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def grown_by(count: int) -> tuple[float, float]:
        """Memory that is not a mapped file, and the size of what is mapped."""
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                row = {"question": f"what is number {i}? " * 5, "answer": f"it is {i}. " * 12}
                file.write(json.dumps(row) + "\n")
        before = anonymous_mb()
        examples = load(path, store=tmp_path / f"store-{count}")
        for example in examples.train:
            assert example["input_ids"]
        size = sum(file.stat().st_size for file in (tmp_path / f"store-{count}").iterdir())
        return anonymous_mb() - before, size / 2**20

    grown_by(1000)  # what is allocated once
    grown, mapped = grown_by(30_000)
    assert mapped > 25
    assert grown < 0.2 * mapped, f"{grown:.0f} MB in memory for {mapped:.0f} MB of examples"
