"""Odd inputs as people have them: what is right is read, what is not is one row's fault and named."""

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from fl_split.config import Data, RunConfig
from fl_split.data.load import Examples
from fl_split.data.readers import read_file
from fl_split.errors import ConfigError, DataError
from fl_split.model.loss import IGNORED

SECRET = "Zanzibar"
QA = {"prompt": "question", "response": "answer"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (  # the invitation ends in a space
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # the invitation opens a thought
Load = Callable[..., Examples]


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"what is number {i}?", "answer": f"it is {i}."} for i in range(start, start + count)]


def chat(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def answers(path: Path, **keys: str) -> list[Any]:
    """What is read of each row, None for a bad one."""
    found = list(read_file(path, Data.model_validate({**QA, **keys}), lambda note: None))
    return [None if row.values is None else row.values["answer"] for row in found]


def tokens(examples: Examples) -> set[tuple[int, ...]]:
    return {tuple(example["input_ids"]) for example in (*examples.train, *examples.heldout)}


def counted(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    labels = [example["labels"] for example in (*examples.train, *examples.heldout)]
    return {tokenizer.decode([t for t in row if t != IGNORED]).replace(" ", "") for row in labels}


# ------------------------------------------------------------------------------------------------- JSON as it stands

ODD: list[Any] = [["a", "b"], {"a": 1}, 3, 1.5, True, None, [], {"deep": [{"er": [1]}]}]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("form", ["array", "pretty", "lines", "one-after-another"])
def test_a_value_of_another_type_is_one_bad_row_and_changes_no_other(
    load: Load, tmp_path: Path, odd: Any, form: str
) -> None:
    table: list[dict[str, Any]] = [*rows(5), {"question": "what?", "answer": odd}, *rows(4, 5)]
    texts = {
        "array": json.dumps(table),
        "pretty": json.dumps(table, indent=2),
        "lines": "\n".join(map(json.dumps, table)),
        "one-after-another": "\n".join(json.dumps(row, indent=2) for row in table),
    }
    path = tmp_path / "rows.json"
    path.write_text(texts[form])
    report = load(path).report
    assert (report.num_rows, report.num_bad) == (10, 1)
    (reason,) = report.bad
    assert report.places[reason] == [f"rows.json {'line' if form == 'lines' else 'row'} 6"]
    assert reason.startswith("empty" if odd is None else "malformed: ")
    assert answers(path) == [row["answer"] for row in table]


def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path) -> None:
    texts = ["2020-01-01", "12:30", "1e3", "007", "null", "true", "NaN", '["a"]', "a\x00b", "ab", "\U0001f600"]
    table = [{"question": f"{i}?", "answer": text} for i, text in enumerate(texts)]
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in table))
    assert answers(tmp_path / "a.json") == answers(tmp_path / "b.jsonl") == texts


@pytest.mark.parametrize("text", ["[{", '{"question": "a", "answer": "b"}', "x"], ids=["list", "object", "no JSON"])
def test_a_broken_first_line_is_one_bad_row(load: Load, tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    first = {"[{": f'["{SECRET}"', "x": "x"}.get(text, text[:-3])
    path.write_text("\n".join([first, *map(json.dumps, rows(6))]))
    assert load(path).report.places == {"malformed: no JSON": ["rows.jsonl line 1"]}


def test_a_list_that_breaks_off_is_named_by_its_line_and_never_quoted(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows(6), indent=0).replace('"it is 4."', f'"{SECRET}'))
    with pytest.raises(DataError, match=r"rows\.json is no JSON beyond line 20: mend it there") as error:
        load(path)
    assert SECRET not in str(error.value)


def test_long_lists_are_read_in_pieces(tmp_path: Path) -> None:
    table = [{"question": f"{i}?", "answer": 'ab\\"{[ü' * (i * 37 % 5000)} for i in range(80)]
    for indent in (None, 1):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(table, indent=indent))
        assert answers(path) == [row["answer"] for row in table]


def test_the_first_rows_may_lack_a_column_but_not_all(load: Load, jsonl: Callable[..., Path]) -> None:
    report = load(jsonl([{"note": SECRET}, *rows(5), {"question": "?"}])).report
    assert report.places == {
        "malformed: nothing in data.prompt": ["rows.jsonl line 1"],
        "malformed: nothing in data.response": ["rows.jsonl line 7"],
    }
    with pytest.raises(DataError, match="no column data.prompt='question'"):
        load(jsonl([{"note": SECRET}] * 200))


# ---------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_text_in_other_encodings_is_read_as_it_was_written(tmp_path: Path, encoding: str, form: str) -> None:
    texts = ["głowy", "żółć, ćma", "ąę", "naïve", "発熱", "\U0001f600"]
    table = [{"question": f"pytanie {i}?", "answer": text} for i, text in enumerate(texts)]
    if form == "csv":
        text = "question,answer\n" + "".join(f'{row["question"]},"{row["answer"]}"\n' for row in table)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in table]
        text = "\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]"
    path = tmp_path / f"rows.{form}"
    path.write_bytes(text.encode(encoding))
    assert answers(path) == texts


def test_an_encoding_other_than_utf_8_is_told(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(map(json.dumps, rows(6))).encode("utf-16"))
    load(path)
    assert "rows.jsonl is read as UTF-16, as its byte order mark says" in caplog.text


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_cp1252_is_refused_by_name_and_a_stray_byte_is_one_bad_row(load: Load, tmp_path: Path, form: str) -> None:
    def write(accents: int) -> Path:
        table = [{"question": f"{i}?", "answer": f"caf{'é' if i < accents else 'e'} {i}"} for i in range(30)]
        lines = [json.dumps(row, ensure_ascii=False) for row in table]
        text = "\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]"
        if form == "csv":
            text = "\n".join(["question,answer", *(f"{row['question']},{row['answer']}" for row in table)])
        path = tmp_path / f"rows.{form}"
        path.write_bytes(text.encode("cp1252"))
        return path

    with pytest.raises(DataError, match=r"30 not in UTF-8 .*fit cp1252 .*'iconv -f CP1252 -t UTF-8' converts it"):
        load(write(30))
    report = load(write(1)).report
    (place,) = report.places["not in UTF-8"]
    assert place in ("rows.csv line 2", "rows.jsonl line 1", "rows.json row 1")
    assert report.num_bad == 1
    (tmp_path / "rows.csv").write_bytes(b"question,answer\n" + b"\x81\x8d,x\n" * 9)
    with pytest.raises(DataError, match="and not in cp1252 either: save it again as UTF-8"):
        load(tmp_path / "rows.csv")


@pytest.mark.parametrize("bad", ["half \ud83d", "\ude00 half", "\udc80"])
def test_half_a_character_spoils_its_own_row_only(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, bad: str
) -> None:
    reason = "malformed: half a character (a lone surrogate)"
    for key in ("question", "answer"):
        path = jsonl([*rows(3), {**rows(1)[0], key: bad}, *rows(3, 3)])
        assert load(path).report.places == {reason: ["rows.jsonl line 4"]}
    tokenizer.chat_template = CHATML
    path = jsonl([{"talk": chat("who?", text)} for text in ("I.", "you.", bad)])
    assert load(path, messages="talk").report.places == {reason: ["rows.jsonl line 3"]}


def test_whatever_a_row_raises_is_that_rows_fault(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(tokenizer).encode

    def encode(self: Any, text: str, **options: Any) -> Any:
        if SECRET in text:
            raise TypeError(text)
        return real(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    path = jsonl([*rows(5), {"question": SECRET, "answer": SECRET}])
    assert load(path).report.places == {"malformed (TypeError)": ["rows.jsonl line 6"]}


# --------------------------------------------------------------------------------------------------------- CSV


def csv_file(tmp_path: Path, *lines: str, name: str = "rows.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = [f"what is {i}?,it is {i}; yes" for i in range(20)]


@pytest.mark.parametrize(
    ("stray", "line"),
    [
        ('what is it?,"20 inches', 6),  # never closed
        ('"what is it?,20 inches', 6),
        ('what is it?,"20" inches', 6),
        ('what is it?,"a ""b"" c', 6),
    ],
)
@pytest.mark.parametrize("later", ["", 'what is that?,"a, b"', 'what is that?,"30 inches'])
def test_a_quote_that_is_never_closed_costs_its_own_row(
    load: Load, tmp_path: Path, stray: str, line: int, later: str
) -> None:
    path = csv_file(tmp_path, "question,answer", *GOOD[:4], stray, *GOOD[4:16], *([later] if later else []), *GOOD[16:])
    report = load(path).report
    bad = 1 + (later.count('"') == 1)
    assert (report.num_rows - report.num_bad, report.num_bad) == (20 + bool(later) + 1 - bad, bad)
    places = [place for found in report.places.values() for place in found]
    assert places == [f"rows.csv line {line}", "rows.csv line 19"][:bad]


def test_texts_of_several_lines_stay_whole(load: Load, tmp_path: Path) -> None:
    text = '"first, line\nsecond, line\n\nthird ""quoted"", line"'
    path = csv_file(tmp_path, "question,answer", *(f"{i}?,{text}" for i in range(5)))
    assert answers(path) == ['first, line\nsecond, line\n\nthird "quoted", line'] * 5
    assert not load(path).report.notes


def test_a_record_that_swallowed_others_is_told(load: Load, tmp_path: Path) -> None:
    path = csv_file(
        tmp_path, "question,answer", *GOOD[:2], 'what?,"20 inches', *GOOD[2:9], 'what?,30 inches"', *GOOD[9:]
    )
    (note,) = load(path).report.notes
    assert note == "rows.csv line 4 to 12 are read as one row: if they are several, a quote is missing"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "before", [[], ["", ""], ["sep={}"], ["{}{}"]], ids=["nothing", "blank", "sep", "blank fields"]
)
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "ROWS.CSV"])
def test_delimiter_and_header_are_found(
    load: Load, tmp_path: Path, delimiter: str, before: list[str], name: str
) -> None:
    table = [delimiter.join(pair) for pair in [("question", "answer"), *((f"{i}?", f"it is {i}") for i in range(6))]]
    lines = [line.replace("{}", delimiter) for line in before]
    path = csv_file(tmp_path, *lines, *table, name=name)
    assert answers(path) == [f"it is {i}" for i in range(6)]
    usual = "\t" if name.endswith("tsv") else ","
    assert bool(load(path).report.notes) == (delimiter != usual)


def test_a_header_that_cannot_be_used_is_told_as_the_cause(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it has 3 others, some of them blank; the first line that"):
        load(csv_file(tmp_path, "note,,", "a,b,c"))
    with pytest.raises(DataError, match="names the column 'answer' more than once"):
        load(csv_file(tmp_path, "question,answer,answer", "a,b,c"))
    with pytest.raises(DataError, match="must name the columns, and has quotes that do not fit"):
        load(csv_file(tmp_path, 'question,"answer', "a,b"))
    with pytest.raises(DataError, match="has no column data.response='answer': it has 'Answer', and letters count"):
        load(csv_file(tmp_path, "question,Answer", "a,b"))
    with pytest.raises(DataError, match="has no column data.prompt='question': it has 1 others; the first line that"):
        load(csv_file(tmp_path, "Export of today", "question,answer", "a,b"))
    assert answers(csv_file(tmp_path, " question , answer ", "a,b")) == ["b"]


# -------------------------------------------------------------------------------------------- files and folders


def test_folders_are_read_through_and_what_is_left_out_is_named(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    table = [json.dumps(row) for row in rows(70)]
    text = ["\n".join(table[i : i + 10]) for i in range(0, 70, 10)]
    (folder / "a.jsonl").write_text(text[0])
    (folder / "B.JSONL").write_text(text[1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(text[2].encode()))
    (folder / "sub" / "d.ndjson").write_text(text[3])
    (folder / "sub" / "deep" / "e.JSON.BZ2").write_bytes(bz2.compress(text[4].encode()))
    (folder / "f.jsonl.xz").write_bytes(lzma.compress(text[5].encode()))
    with pa.output_stream(folder / "g.jsonl.zst", compression="zstd") as stream:
        stream.write(text[6].encode())
    (folder / ".hidden" / "h.jsonl").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "sub" / "old.xlsx").write_text("x")
    report = load(folder).report
    assert (report.num_rows, report.num_bad) == (70, 0)
    (note,) = report.notes
    assert note.startswith("2 other files are not read: notes.txt, old.xlsx; expected are .jsonl, ")
    assert report.path == f"{folder}/B.JSONL and 6 more"


def test_a_damaged_file_is_named_by_how_far_it_goes(load: Load, tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps({**row, "x": SECRET * i}) for i, row in enumerate(rows(500))).encode())
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(
            DataError, match=r"a\.jsonl\.gz cannot be read beyond .*: it is damaged, not complete"
        ) as error:
            load(tmp_path / "a.jsonl.gz")
        assert SECRET not in str(error.value)
    (tmp_path / "b.jsonl").write_bytes("\n".join(map(json.dumps, rows(5))).encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read beyond"):
        load(tmp_path / "b.jsonl")


@pytest.mark.parametrize("begin", [b"PK\x03\x04", b"PAR1", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"])
def test_what_is_no_text_by_its_first_bytes_is_told(load: Load, tmp_path: Path, begin: bytes) -> None:
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_bytes(begin + bytes(range(256)))
        with pytest.raises(DataError, match=r"is (a \.|compressed \(\.).* by its first bytes, whatever its name"):
            load(tmp_path / name)


def test_names_with_brackets_are_names(load: Load, jsonl: Callable[..., Path]) -> None:
    assert load(jsonl(rows(5), "notes [old].jsonl")).report.num_rows == 5


def test_parquet_and_saved_folders_give_each_value_as_it_stands(load: Load, tmp_path: Path) -> None:
    table = pa.table({"question": ["a?", "b?", "c?"], "answer": pa.array([b"x", b"\xff", b"z"]).view(pa.utf8())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").report.places == {"malformed": ["a.parquet row 2"]}
    days = [datetime.date(2020, 1, 1 + i) for i in range(3)]
    pq.write_table(pa.table({"question": ["a?", "b?", "c?"], "answer": days}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="3 malformed: a value of type date in data.response, where text is expected"):
        load(tmp_path / "b.parquet")
    datasets.Dataset.from_list(rows(5)).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").report.num_rows == 5


# ------------------------------------------------------------------------------------------------------- chats

TALK = chat("who has gout?", "the patient.")
SHAPES: dict[str, Any] = {
    "parts": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK],
    "several parts": [{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in TALK],
    "sharegpt": [{"from": ("human", "gpt")[i], "value": m["content"]} for i, m in enumerate(TALK)],
    "named": [{**m, "name": "bob"} for m in TALK],
    "filled up": [{**m, "tool_calls": None, "name": None} for m in TALK],
    "capitals": [{**m, "role": m["role"].title()} for m in TALK],
    "gemini": [{**m, "role": {"assistant": "model"}.get(m["role"], m["role"])} for m in TALK],
    "JSON in a string": json.dumps(TALK),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_common_shapes_of_chats_are_read_as_the_plain_one(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, shape: str
) -> None:
    tokenizer.chat_template = CHATML
    plain = [{"talk": chat(f"{i}?", "yes.")} for i in range(3)]
    found = load(jsonl([*plain, {"talk": SHAPES[shape]}]), messages="talk")
    assert not found.report.bad
    assert tokens(found) == tokens(load(jsonl([*plain, {"talk": TALK}]), messages="talk"))


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (chat(SECRET, SECRET)[1:], "without an assistant message that answers"),
        ([], "without an assistant message that answers"),
        ([{"role": "user", "content": [{"type": "image"}]}, *TALK[1:]], "with a message part that is no text"),
        ([[SECRET, SECRET]], "without a list of messages with role and content"),
        ({"messages": TALK, "drafts": TALK[:1]}, "without a list of messages with role and content"),
        (SECRET, "without a list of messages with role and content"),
        ([{"role": 1, "content": SECRET}], "without a list of messages with role and content"),
        ([{"user": SECRET, "assistant": SECRET}], "without a list of messages with role and content"),
        (None, "without a list of messages with role and content"),
    ],
)
def test_chats_of_no_known_shape_are_named_and_cost_nobody_else(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, talk: Any, reason: str
) -> None:
    tokenizer.chat_template = CHATML
    good = [{"talk": chat(f"{i}?", "yes.")} for i in range(3)]
    assert load(jsonl([*good, {"talk": talk}]), messages="talk").report.places == {reason: ["rows.jsonl line 4"]}


def test_a_chat_that_the_assistant_opens_is_learnt_from_its_first_answer_on(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CHATML
    talks = [[{"role": "assistant", "content": "hello."}, *chat(f"who {i}?", "the patient.")] for i in range(3)]
    assert counted(load(jsonl([{"talk": talk} for talk in talks]), messages="talk"), tokenizer) == {
        "thepatient.<|im_end|>\n"
    }


def test_tools_are_context_and_calls_are_learnt_and_what_a_template_drops_is_told(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    tokenizer.chat_template = template
    talks = [
        [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": None, "tool_calls": "look"},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "yes."},
        ]
        for i in range(3)
    ]
    path = jsonl([{"talk": talk} for talk in talks])
    found = load(path, messages="talk")
    assert counted(found, tokenizer) == {"look<|im_end|>\nyes.<|im_end|>\n"}
    assert not found.report.all_notes()
    tokenizer.chat_template = template.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}")
    notes = load(path, messages="talk").report.all_notes()
    assert notes == ["3 chats have messages that the chat template leaves out or rewrites"]


def test_the_first_token_of_an_answer_counts_though_it_begins_with_the_invitations_space(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = SPACED
    talks = [chat(f"Is {i} even?", ("Yes", "No")[i % 2]) for i in range(20)]
    found = load(jsonl([{"talk": talk} for talk in talks]), messages="talk")
    assert counted(found, tokenizer) == {"Yes</s>\n", "No</s>\n"}


def test_an_invitation_that_opens_a_thought_is_told_and_the_answer_learnt(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = THOUGHT
    texts = ["Yes", "<b>No</b>", "<think>\nwell\n</think>\nYes"]
    talks = [chat(f"Is {i} even?", text) for i, text in enumerate(texts)]
    talks.append(chat("Is 3 even?", "No", "Is 4?", "Yes"))
    found = load(jsonl([{"talk": talk} for talk in talks]), messages="talk")
    end = "<|im_end|>\n"
    assert counted(found, tokenizer) == {
        f"Yes{end}",
        f"<b>No</b>{end}",
        f"well\n</think>\nYes{end}",
        f"No{end}Yes{end}",
    }
    (note,) = found.report.all_notes()
    assert note.startswith("3 chats end otherwise than the chat template invites the assistant to speak")


# --------------------------------------------------------------------------------------------- prompt templates


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        ("plain", "<s>who?\nI.</s>", "I.</s>"),
        ("auto", "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n", "I.<|im_end|>\n"),
        ("chat", "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n", "I.<|im_end|>\n"),
        ("Q: {prompt}\nA: ", "<s>Q:who?\nA:I.</s>", "I.</s>"),
        ("{not a field} {prompt} | {response} |", "<s>{notafield}who?|I.|</s>", "I.|</s>"),
        ("<s>{prompt}\n{response}</s>", "<s>who?\nI.</s>", "I.</s>"),
    ],
)
def test_prompt_and_response_are_written_by_the_template_that_is_asked_for(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, template: str, text: str, answer: str
) -> None:
    tokenizer.chat_template = CHATML
    found = load(jsonl([{"question": "who?", "answer": "I."}, *rows(1)]), template=template)
    example = next(e for e in (*found.train, *found.heldout) if "who" in tokenizer.decode(e["input_ids"]))
    assert tokenizer.decode(example["input_ids"]).replace(" ", "") == text.replace(" ", "")
    counted = [token for token in example["labels"] if token != IGNORED]
    assert tokenizer.decode(counted).replace(" ", "") == answer


def test_the_default_template_goes_by_the_model_and_is_told(
    load: Load, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fl_split")
    path = jsonl(rows(4))
    assert load(path).report.template == 'plain: "<s>{prompt}\\n{response}</s>"'
    assert 'prompt and response are written as plain: "<s>{prompt}' in caplog.text
    assert load(path, template="a {prompt} b").report.template == 'data.template: "<s>a {prompt} b{response}</s>"'
    with pytest.raises(DataError, match=r"data\.template='chat' needs the tokenizer's chat template"):
        load(path, template="chat")
    tokenizer.chat_template = CHATML
    assert load(path).report.template.startswith("chat: the model's own chat template")
    assert not load(jsonl([{"note": f"{i}"} for i in range(3)]), text="note").report.template


def test_a_prompt_that_names_a_field_is_not_filled_in(load: Load, jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"question": f"{{response}} {{prompt}} {i}", "answer": f"{i}"} for i in range(4)])
    found = load(path, template="{prompt}\n{response}")
    assert tokens(found) == tokens(load(path, template="plain"))


@pytest.mark.parametrize("template", ["", "nothing", "{prompt}{prompt}", "{response} {prompt}"])
def test_templates_that_cannot_be_used_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template="):
        RunConfig.from_flat({"data.template": template})


def test_a_template_for_texts_without_a_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.template='plain' is for data.prompt and data.response, and data.text"):
        RunConfig.from_flat({"data.template": "plain", "data.text": "note"})


# ------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.0, 0.0, None], "0,1"),
        ([1, 0, None], "0.0,1.0"),
        ([True, False, None], "false,true"),
        ([True, False, None], "False,True"),
        ([True, False, None], "0,1"),
        (["True", "False", ""], "false,true"),
        (["1.0", "0.0", " "], "0,1"),
        ([" b ", "a", None], "a,b"),
        ([1.0, 0.0, float("nan")], "0,1"),
    ],
)
def test_labels_are_matched_however_a_column_came_to_hold_them(
    load: Load, tmp_path: Path, values: list[Any], labels: str
) -> None:
    texts = [f"note {i}" for i in range(12)]
    pq.write_table(pa.table({"text": texts, "label": [values[i % 3] for i in range(12)]}), tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet", text="text", labels=labels)
    assert found.report.bad == {"without a label": 4}
    assert sorted(example["labels"] for example in (*found.train, *found.heldout)) == [0] * 4 + [1] * 4


def test_labels_that_do_not_match_are_told_how_they_are_compared(load: Load, jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"text": f"note {i}", "label": 0.5} for i in range(4)])
    with pytest.raises(DataError, match="labels are compared as text, whole numbers with or without .0, and true"):
        load(path, text="text", labels="0,1")


# -------------------------------------------------------------------------------------------------------- sides


def sides(examples: Examples) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    return {tuple(e["input_ids"]) for e in examples.train}, {tuple(e["input_ids"]) for e in examples.heldout}


@pytest.mark.parametrize("count", [2, 3, 5, 42, 400])
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.9, 0.99])
def test_rows_that_are_added_move_no_other(
    load: Load, jsonl: Callable[..., Path], tmp_path: Path, count: int, holdout: float, caplog: pytest.LogCaptureFixture
) -> None:
    train, heldout = sides(load(jsonl(rows(count)), tmp_path / "store", holdout=holdout))
    assert train and heldout
    path = jsonl([*rows(7, 1000), *reversed(rows(count)), *rows(9, 2000)])
    grown = load(path, tmp_path / "store", holdout=holdout)
    assert train <= sides(grown)[0] and heldout <= sides(grown)[1]
    told = f"the data has changed since it was last read: {count + 16} rows, {count} before; each row that was there"
    assert told in caplog.text


def test_a_refusal_in_between_does_not_forget_who_was_moved(
    load: Load, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    train, heldout = sides(load(jsonl(rows(3)), tmp_path / "store", holdout=0.01))
    with pytest.raises(DataError, match="1 empty"):
        load(jsonl([*rows(3), {"question": "?", "answer": ""}]), tmp_path / "store", holdout=0.01, bad_rows="refuse")
    grown = sides(load(jsonl(rows(40)), tmp_path / "store", holdout=0.01))
    assert train <= grown[0] and heldout <= grown[1]


def test_equal_rows_are_on_one_side_and_counted(load: Load, jsonl: Callable[..., Path]) -> None:
    found = load(jsonl(rows(8) * 5))
    train, heldout = sides(found)
    assert train and heldout and not train & heldout
    assert found.report.num_copies == 32
    with pytest.raises(DataError, match="all 5 usable examples are of equal rows"):
        load(jsonl(rows(1) * 5))


def test_a_rows_side_is_the_same_in_every_form_of_the_data(
    load: Load, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    first = sides(load(jsonl([{**row, "id": i} for i, row in enumerate(rows(200))])))
    datasets.Dataset.from_list(rows(200)[::-1]).to_parquet(str(tmp_path / "a.parquet"))
    assert sides(load(tmp_path / "a.parquet")) == first
    cut = load(jsonl(rows(200)), max_length=24)
    assert [len(part) for part in (cut.train, cut.heldout)] == [len(part) for part in first]


def test_evaluation_is_capped_and_what_is_beyond_is_not_trained_on(load: Load, jsonl: Callable[..., Path]) -> None:
    path = jsonl(rows(300))
    whole, capped = load(path), load(path, holdout_max=5)
    assert len(capped.heldout) == 5 < capped.num_heldout == len(whole.heldout)
    assert sides(capped)[0] == sides(whole)[0] and sides(capped)[1] < sides(whole)[1]
    assert capped.heldout_id == load(path, holdout_max=5).heldout_id != whole.heldout_id
