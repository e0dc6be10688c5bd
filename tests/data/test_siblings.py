"""More shapes that files come in: read as they were meant, or refused for the true reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from fl_split.config import Data
from fl_split.data.load import Examples
from fl_split.data.readers import read_file
from fl_split.errors import DataError
from fl_split.model.loss import IGNORED

Load = Callable[..., Examples]

TABLE = [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(8)]
COLUMNS = {name: [row[name] for row in TABLE] for name in ("question", "answer")}
NUMBERED = {name: {str(i): value for i, value in enumerate(values)} for name, values in COLUMNS.items()}
OTHERS = [{"question": "other?", "answer": "other."}] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "nobody."}]


def read(path: Path) -> tuple[list[Any], list[str]]:
    """Answers, None for a bad row, and what was told."""
    notes: list[str] = []
    found = list(read_file(path, Data.model_validate({"prompt": "question", "response": "answer"}), notes.append))
    return [None if row.values is None else row.values["answer"] for row in found], notes


def written(tmp_path: Path, text: str, name: str = "rows.json", encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


# ------------------------------------------------------------------------------------------- one object around rows


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"data": TABLE}, "the list in it"),
        ({"version": "1", "tags": ["a", "b"], "examples": TABLE, "about": {"by": "x"}}, "the list in it"),
        ({"test": OTHERS, "train": TABLE}, "those of data.split='train'; 1 other lists are not read"),
        ({str(i): row for i, row in enumerate(TABLE)}, "the objects in it"),
        (COLUMNS, "made of the columns in it"),
        (NUMBERED, "made of the columns in it"),
    ],
    ids=["data", "with others", "parts", "by number", "columns", "pandas"],
)
def test_rows_that_one_object_wraps_are_read_and_said(
    tmp_path: Path, value: Any, what: str, name: str, indent: int | None
) -> None:
    path = written(tmp_path, json.dumps(value, indent=indent), name)
    assert read(path) == (COLUMNS["answer"], [f"{name} is one object; its rows are {what}"])


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"first": TABLE, "second": TABLE}, r"one object with 2 lists of rows: let data\.split name the one"),
        ({"columns": ["question"], "data": [["a"]]}, "no column data.prompt='question': its first row has 2 others"),
        ({"question": ["a", "b"], "answer": ["a"]}, "malformed: a list in data.prompt"),
        ({"question": {"0": "a"}, "answer": {"1": "a"}}, "malformed: an object in data.prompt"),
        ({"a": TABLE[0], "b": {"question": "x"}}, "no column data.prompt='question'"),
        ({}, "no column data.prompt='question'"),
    ],
)
def test_an_object_that_wraps_no_rows_is_refused_for_the_true_reason(
    load: Load, tmp_path: Path, value: Any, error: str
) -> None:
    with pytest.raises(DataError, match=error):
        load(written(tmp_path, json.dumps(value)))


def test_one_row_a_file_is_a_row_and_no_wrapping(load: Load, tmp_path: Path) -> None:
    for i, row in enumerate(TABLE):
        written(tmp_path, json.dumps({**row, "source": ["a"]}), f"{i}.json")
    report = load(tmp_path).report
    assert (report.num_rows, report.num_bad, report.notes) == (8, 0, [])


def test_a_wrapped_row_that_is_not_in_utf_8_costs_itself(tmp_path: Path) -> None:
    text = json.dumps({"data": [*TABLE[:3], {"question": "?", "answer": "caf\xe9"}, *TABLE[3:]]}, ensure_ascii=False)
    found, notes = read(written(tmp_path, text, encoding="latin-1"))
    assert found == [*COLUMNS["answer"][:3], None, *COLUMNS["answer"][3:]]
    assert len(notes) == 2 and "is not in UTF-8" in notes[1]


# ------------------------------------------------------------------------------------------------ commas and ends

LINES = list(map(json.dumps, TABLE))


@pytest.mark.parametrize(
    "text",
    [
        ",\n".join(LINES),
        ",\n".join(LINES) + ",\n",
        "[\n" + ",\n".join(LINES) + ",\n]",
        "[" + ",".join(LINES) + ",]",
        "".join(LINES),
        " ".join(LINES),
        "".join(LINES[:3]) + "\n" + "\n".join(LINES[3:]),
        json.dumps(TABLE[:5]) + json.dumps(TABLE[5:]),
        "\r".join(LINES),
        "\r\n\r\n".join(LINES),
        "".join(f"\x1e{line}\n" for line in LINES),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_is_read_whatever_stands_between_its_rows(tmp_path: Path, text: str, name: str) -> None:
    assert read(written(tmp_path, text, name)) == (COLUMNS["answer"], [])


def test_two_commas_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no JSON beyond line 1"):
        read(written(tmp_path, "[" + ",,".join(LINES) + "]"))


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", r"a pointer of Git LFS \('git lfs pull' fetches"),
        (b"<!DOCTYPE html><html>404", "a page of HTML"),
        (b"<html>", "a page of HTML"),
        (b"%PDF-1.4", "a .pdf file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an .xls file"),
        (b"SQLite format 3\0", "a database of SQLite"),
        (b"ARROW1\0\0", "an .arrow file"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_what_is_no_text_at_all_is_named(load: Load, tmp_path: Path, begin: bytes, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(begin)
    with pytest.raises(DataError, match=f"is {kind}.* by its first bytes"):
        load(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_text_with_few_zero_bytes_is_known_by_its_beginning(tmp_path: Path, encoding: str, form: str) -> None:
    texts = ["発熱がある" * 9, "日本語" * 20]
    lines = [json.dumps({"question": "質問", "answer": text}, ensure_ascii=False) for text in texts]
    if form == "csv":
        lines = ["question,answer", *(f"質問,{text}" for text in texts)]
    assert read(written(tmp_path, "\n".join(lines), f"rows.{form}", encoding))[0] == texts


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
@pytest.mark.parametrize("content", ["", "\ufeff", " \n\n", "[]", "question,answer\n"])
def test_a_file_without_rows_is_named(load: Load, tmp_path: Path, content: str, name: str) -> None:
    name = {"[]": "rows.json", "question,answer\n": "rows.csv"}.get(content, name)
    path = written(tmp_path, content, name)
    with pytest.raises(DataError, match=rf"0 usable examples of 0 rows of {path}: .*; {name} has no rows"):
        load(path)
    written(tmp_path, "\n".join(LINES), "more.jsonl")
    assert load(tmp_path).report.notes == [f"{name} has no rows"]


def test_a_column_that_differs_in_letters_or_spaces_is_named(load: Load, tmp_path: Path) -> None:
    for name in ("Question", " question", "QUESTION "):
        table = [{name: row["question"], "answer": row["answer"]} for row in TABLE]
        with pytest.raises(DataError, match=f"it has '{name}', and letters and spaces count"):
            load(written(tmp_path, "\n".join(map(json.dumps, table)), "rows.jsonl"))
        if name == name.strip():
            pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
            with pytest.raises(DataError, match=f"it has '{name}', and letters and spaces count"):
                load(tmp_path / "rows.parquet")


def test_parquet_with_two_columns_of_one_name_is_refused(load: Load, tmp_path: Path) -> None:
    columns = [pa.array(COLUMNS["question"]), pa.array(COLUMNS["answer"]), pa.array(COLUMNS["question"])]
    pq.write_table(pa.table(columns, names=["question", "answer", "answer"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="more than one column data.response='answer': keep one of them"):
        load(tmp_path / "rows.parquet")


# ----------------------------------------------------------------------------------------------------------- CSV


def test_quotes_after_a_space_are_quotes(tmp_path: Path) -> None:
    lines = ["question, answer", *(f'"{q}", "{a}, yes"' for q, a in zip(*COLUMNS.values(), strict=True))]
    assert read(written(tmp_path, "\n".join(lines), "rows.csv"))[0] == [f"{a}, yes" for a in COLUMNS["answer"]]


def test_quotes_after_a_backslash_are_text_and_said(tmp_path: Path) -> None:
    lines = ["question,answer", r'"a","say \"yes\", or no"', r'"b",""', r'"c","\"C:\\\" it is"']
    found, notes = read(written(tmp_path, "\n".join(lines), "rows.csv"))
    assert found[:2] == ['say "yes", or no', ""]
    assert notes == ['rows.csv is read with \\" for a quote in a text']
    lines = ["question,answer", r'"a","C:\"', r'"b","say ""yes"" C:\"']  # a backslash that is one
    assert read(written(tmp_path, "\n".join(lines), "rows.csv")) == (["C:\\", 'say "yes" C:\\'], [])


def test_the_first_line_again_is_no_row(load: Load, tmp_path: Path) -> None:
    rows = [f"{row['question']},{row['answer']}" for row in TABLE]
    path = written(tmp_path, "\n".join(["question,answer", *rows[:4], "question,answer", *rows[4:]]), "rows.csv")
    assert load(path).report.places == {"malformed: the line that names the columns, again": ["rows.csv line 6"]}


@pytest.mark.parametrize("truths", [("TRUE", "FALSE"), ("True", "False"), ("true", "false")])
@pytest.mark.parametrize("labels", ["0,1", "false,true"])
def test_truths_in_any_letters_are_labels(load: Load, tmp_path: Path, truths: tuple[str, str], labels: str) -> None:
    lines = ["text,label", *(f"text number {i},{truths[i % 2]}" for i in range(10))]
    found = load(written(tmp_path, "\n".join(lines), "rows.csv"), text="text", label="label", labels=labels)
    sides = [example["labels"] for example in (*found.train, *found.heldout)]
    assert (found.report.num_bad, sorted(sides)) == (0, [0] * 5 + [1] * 5)


def test_one_class_alone_is_told(load: Load, tmp_path: Path) -> None:
    lines = ["text,label", *(f"text number {i},0" for i in range(10))]
    found = load(written(tmp_path, "\n".join(lines), "rows.csv"), text="text", label="label", labels="0,1")
    assert found.report.all_notes() == ["all examples are of one class, of those that data.labels names"]


# --------------------------------------------------------------------------------------------- texts and columns


@pytest.mark.parametrize("blank", ["", " \n\t", "\u00a0", "\u200b\ufeff", "\x00"])
def test_text_of_nothing_visible_is_empty(load: Load, tmp_path: Path, blank: str) -> None:
    path = written(tmp_path, "\n".join([*LINES, json.dumps({"question": "?", "answer": blank})]), "rows.jsonl")
    assert load(path).report.places == {"empty": ["rows.jsonl line 9"]}


def test_columns_that_are_not_read_are_named_on_the_node(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    table = [{**row, "context": "a text that was forgotten", "note": ""} for row in TABLE]
    report = load(written(tmp_path, "\n".join(map(json.dumps, table)), "rows.jsonl")).report
    assert report.unread_columns() == "columns that are not read: context"
    assert "columns that are not read: context" in caplog.text
    assert not report.all_notes()  # which errors repeat to the server
    assert load(written(tmp_path, "\n".join(LINES), "rows.jsonl")).report.unread_columns() == ""


def test_nothing_as_pandas_writes_it_in_json_is_empty(load: Load, tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join([*LINES, '{"question": "?", "answer": NaN}']), "rows.jsonl")
    assert load(path).report.places == {"empty": ["rows.jsonl line 9"]}


@pytest.mark.parametrize("nothing", ["NA", "NULL", " nan ", "\\N", "<NA>", "#N/A", "None"])
def test_texts_that_programs_write_for_nothing_are_told(load: Load, tmp_path: Path, nothing: str) -> None:
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in TABLE)]
    path = written(tmp_path, "\n".join([*lines, f"a?,{nothing}", f"{nothing},b"]), "rows.csv")
    [note] = load(path).report.all_notes()
    assert note.startswith("2 texts are nothing but NA, NULL, nan or the like")
    assert not load(written(tmp_path, "\n".join([*lines, f"a?,{nothing} it is"]), "rows.csv")).report.all_notes()
    labelled = ["text,label", f"{nothing},0", "a,1", "b,0"]
    told = load(written(tmp_path, "\n".join(labelled), "l.csv"), text="text", label="label", labels="0,1").report
    assert told.all_notes()[0].startswith("1 texts are nothing but NA")


def test_rows_that_differ_in_line_ends_and_outer_spaces_are_equal(load: Load, tmp_path: Path) -> None:
    """The same table, exported on Windows and on Linux, must not be on both sides."""
    texts = [f"first {i}\nsecond" for i in range(30)]
    rows = [{"question": text, "answer": text} for text in texts]
    rows += [{"question": f"{text} ", "answer": text.replace("\n", "\r\n") + "\r\n"} for text in texts]
    found = load(written(tmp_path, "\n".join(map(json.dumps, rows)), "rows.jsonl"))
    assert found.report.num_copies == 30
    train, heldout = (set(part.keys.tolist()) for part in (found.train, found.heldout))
    assert len(train) + len(heldout) == 30 and not train & heldout


# --------------------------------------------------------------------------------------------------------- chats

SAID = [
    TALK,
    {"messages": TALK},
    {"id": 7, "turns": TALK},
    {"role": ["user", "assistant"], "content": ["who?", "nobody."]},
    [{"role": m["role"], "text": m["content"]} for m in TALK],
    [{"speaker": m["role"].upper(), "value": m["content"]} for m in TALK],
    [{"author": "human", "text": "who?"}, {"author": "bot", "content": "nobody.", "text": None}],
    [{"role": "user", "parts": [{"text": "who?"}]}, {"role": "model", "parts": ["nobody."]}],  # Gemini
    [{"sender": "human", "text": "who?"}, {"sender": "assistant", "text": "nobody."}],  # Claude
    [{"role": "USER", "message": "who?"}, {"role": "CHATBOT", "message": "nobody."}],  # Cohere
    [{"type": "human", "content": "who?"}, {"type": "ai", "content": "nobody."}],  # LangChain
    [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "who?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "nobody."}]},
    ],  # OpenAI's responses
    str(TALK),  # pandas' to_csv
    repr({"messages": TALK}),
]


@pytest.mark.parametrize("talk", SAID, ids=str)
def test_chats_in_other_shapes_are_read_alike(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, talk: Any
) -> None:
    tokenizer.chat_template = CHATML
    found = load(jsonl([{"talk": talk}, {"talk": [*TALK, TALK[0]]}]), messages="talk")
    wanted = load(jsonl([{"talk": TALK}, {"talk": [*TALK, TALK[0]]}]), messages="talk")
    assert not found.report.bad
    ids = [sorted(example["input_ids"] for example in (*parts.train, *parts.heldout)) for parts in (found, wanted)]
    assert ids[0] == ids[1]


WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDED_BEFORE_THE_NEXT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHATML, True), (WITHOUT_END, False), (ENDED_BEFORE_THE_NEXT, False), (MARKED_WITHOUT_END, False)],
)
def test_a_template_that_teaches_no_end_is_told(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, template: str, ends: bool
) -> None:
    tokenizer.chat_template = template
    notes = load(jsonl([{"talk": TALK}, {"talk": [*TALK, *TALK]}]), messages="talk").report.all_notes()
    assert [note.partition(" nothing after the last answer")[0] for note in notes] == (
        [] if ends else ["2 chats whose template writes, or marks as the assistant's,"]
    )


def test_an_answer_of_null_and_a_call_of_old_are_context(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CHATML
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answered = [TALK[0], called, {"role": "function", "name": "f", "content": "42"}, TALK[1]]
    silent = [TALK[0], {**TALK[1], "content": None}]
    again = [*TALK, *TALK]
    report = load(jsonl([{"talk": talk} for talk in (answered, TALK, silent, again)]), messages="talk").report
    assert report.places == {"without an assistant message that answers": ["rows.jsonl line 3"]}


@pytest.mark.parametrize("marked", [False, True])
def test_messages_of_weight_0_are_not_learnt_or_it_is_said(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, marked: bool
) -> None:
    tokenizer.chat_template = CHATML
    if marked:
        said = (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
        )
        tokenizer.chat_template = CHATML.replace("{{ m.content }}", said + "{% endif %}")
    draft = {"role": "assistant", "content": "zebra zebra", "weight": 0}
    found = load(jsonl([{"talk": [TALK[0], draft, TALK[0], TALK[1]]}, {"talk": TALK}]), messages="talk")
    labels = [[token for token in example["labels"] if token != IGNORED] for example in (*found.train, *found.heldout)]
    assert any("zebra" in tokenizer.decode(row) for row in labels) == marked
    assert any("of weight 0" in note for note in found.report.all_notes()) == marked


# ------------------------------------------------------------------------------------------------ links and leftovers


@pytest.mark.parametrize("whole", [False, True])
def test_a_link_to_nothing_is_no_missing_row(load: Load, tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(LINES))
    (folder / "b.jsonl").symlink_to(tmp_path / "annex" / "key")  # git-annex, before 'get'
    with pytest.raises(
        DataError, match=r"b\.jsonl is a link to a file that is not there: fetch it, or remove the link"
    ):
        load(folder if whole else folder / "b.jsonl")


def test_a_linked_folder_is_named_as_left_out_and_locks_are_not(load: Load, tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "a.jsonl").write_text("\n".join(LINES))
    (folder / "~$a.csv").write_bytes(b"\x05who")  # Excel has a.csv open
    (other / "b.jsonl").write_text("\n".join(map(json.dumps, OTHERS)))
    (folder / "link").symlink_to(other)
    (folder / "file.jsonl").symlink_to(other / "b.jsonl")
    report = load(folder).report
    assert report.num_rows == 11
    assert len(report.notes) == 1 and report.notes[0].startswith("1 other files are not read: link;")


# ------------------------------------------------------------------------------------------------------ rights


def test_what_may_not_be_read_is_named_and_not_passed_over(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's refusals are played."""
    (tmp_path / "sub").mkdir()
    file, folder = written(tmp_path, "\n".join(LINES), "rows.jsonl"), tmp_path / "sub"
    look, open_file = os.scandir, Path.open

    def scandir(place: Any) -> Any:
        if str(place) == str(folder):
            raise PermissionError(13, "Permission denied", str(place))
        return look(place)

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *args, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=f"{folder} may not be read by this account: give it the right to"):
            load(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=f"{file} may not be read by this account: give it the right to"):
        load(file)
