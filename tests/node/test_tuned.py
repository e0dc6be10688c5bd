"""What a node has trained answers: from its adapter folder and an address alone, in a terminal and in files."""

import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fl_split
from fl_split.cli import app
from fl_split.cli import node as node_verbs
from fl_split.config import Data, Lora, RunConfig
from fl_split.errors import ConfigError, DataError, NodeStateError, TrunkUnavailable
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import answers
from fl_split.node.answers import Sampling, answer, answer_batch, answer_file, until_stop
from fl_split.node.card import framing_of, write_recipe
from fl_split.node.ledger import read_ledger
from fl_split.node.tuned import Tuned, load_tuned
from fl_split.trunk import server
from fl_split.trunk.calls import Call
from fl_split.trunk.layers import hold_layers

QUESTIONS = ["What is asthma?", "How is it treated, and by whom is it found out at all?", "Who?"]


@pytest.fixture(scope="module")
def adapter(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the demo's model says."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    ends = load_ends(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), surrogate="identity")
    model = adapters.attach(ends, Lora(), train_bottom=True, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapters.export(model, folder, str(demo_model), "", "a card")
    write_recipe(
        folder, RunConfig.from_flat({"trunk.wire-dtype": "float32"}), AutoTokenizer.from_pretrained(demo_model)
    )
    return folder


@pytest.fixture(scope="module")
def address(demo_model: Path) -> Iterator[str]:
    with server.embedded(hold_layers(demo_model, 2, 2)) as address:
        yield address


@pytest.fixture
def tuned(adapter: Path, address: str) -> Iterator[Tuned]:
    with load_tuned(adapter, address) as tuned:
        yield tuned


@pytest.fixture(scope="module")
def full(demo_model: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model), adapter).eval()


def expected(full: Any, demo_model: Path, question: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids += tokenizer.encode(f"{question}\n", add_special_tokens=False)
    given = torch.tensor([ids])
    out = full.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=num_tokens, do_sample=False
    )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_it_answers_as_the_full_model_with_the_adapter(tuned: Tuned, full: Any, demo_model: Path) -> None:
    for question in QUESTIONS:
        made = answer(tuned, tuned.encode([{"role": "user", "content": question}]), Sampling(20))
        assert "".join(made) == expected(full, demo_model, question, 20)
        assert 0 < made.num_tokens <= 20
        assert made.reason == ("length" if made.num_tokens == 20 else "stop")


def test_the_public_name_says_what_leaves(adapter: Path, address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tuned = fl_split.load_tuned(adapter, address, fl_split.Credentials())
    out = tuned.model.generate(**tuned.tokenizer("What", return_tensors="pt"), max_new_tokens=2)
    tuned.close()
    assert out.shape[0] == 1
    assert "hidden states of every prompt and of every answer go to the trunk" in caplog.text


def test_every_byte_of_a_question_is_in_a_ledger_beside_the_adapter(
    address: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: Counter[str] = Counter()
    receive = Call.receive

    async def spy(self: Call) -> bytes | None:
        data = await receive(self)
        got[self.method] += len(data or b"")
        return data

    monkeypatch.setattr(Call, "receive", spy)
    copy = Path(shutil.copytree(adapter, tmp_path / "mine"))
    with load_tuned(f"{copy}/", address) as tuned:
        "".join(answer(tuned, tuned.encode([{"role": "user", "content": QUESTIONS[0]}]), Sampling(3)))
    told = read_ledger(tmp_path / "mine.ledger.jsonl")
    trunk = f"trunk {address}"
    assert told.bytes == {(trunk, "generation"): got["Decode"], (trunk, "question"): got["Describe"]}
    assert got["Decode"] > 1000 and told.rounds == {0} and told.calls[trunk, "question"] == 2
    with load_tuned(copy, address, ledger=tmp_path / "else" / "where"):
        assert read_ledger(tmp_path / "else" / "where").calls[trunk, "question"] == 2


def test_what_cannot_be_written_down_is_not_asked(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NodeStateError, match=r"name another place \(--ledger\)"):
        load_tuned(adapter, "127.0.0.1:1", ledger=tmp_path / "file" / "ledger.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NodeStateError, match="cannot be written .*not written down is not sent"):
        load_tuned(adapter, "127.0.0.1:1", ledger=tmp_path / "folder")


def test_sampling_is_seeded(tuned: Tuned) -> None:
    ids = tuned.encode([{"role": "user", "content": QUESTIONS[0]}])
    texts = ["".join(answer(tuned, ids, Sampling(12, 2.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_seeded_answer_depends_on_no_other(tuned: Tuned) -> None:
    ids = tuned.encode([{"role": "user", "content": QUESTIONS[0]}])
    alone = {seed: "".join(answer(tuned, ids, Sampling(12, 3.0, seed=seed))) for seed in (1, -2, 2**70)}
    assert len(set(alone.values())) == 3
    assert "".join(answer(tuned, ids, Sampling(12, 3.0, seed=1, lookup=3))) == alone[1]
    found: list[tuple[int | None, str]] = []

    def ask(seed: int | None) -> None:
        found.append((seed, "".join(answer(tuned, ids, Sampling(12, 3.0, seed=seed)))))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (*alone, *alone, None, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(text == alone[seed] for seed, text in found if seed is not None)
    unseeded = [text for seed, text in found if seed is None]
    assert unseeded[0] != unseeded[1]


def test_what_a_file_draws_is_the_same_in_other_batches(
    tuned: Tuned, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    questions = jsonl([{"question": QUESTIONS[0]}] * 3)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    answer_file(tuned, questions, whole, "question", Sampling(10, 3.0, seed=3), 2)
    lines = whole.read_text().splitlines(keepends=True)
    assert len({*lines}) == 3  # equal questions do not draw the same
    parts.write_text(lines[0] + lines[1][:9])  # cut off in the middle of a line, and of a batch
    assert answer_file(tuned, questions, parts, "question", Sampling(10, 3.0, seed=3), 2) == 2
    assert parts.read_text() == whole.read_text()


def test_guessing_from_the_prompt_changes_no_token(tuned: Tuned) -> None:
    ids = tuned.encode([{"role": "user", "content": QUESTIONS[1]}])
    assert "".join(answer(tuned, ids, Sampling(24, lookup=5))) == "".join(answer(tuned, ids, Sampling(24)))


def test_an_answer_can_be_cut_short(tuned: Tuned) -> None:
    ids = tuned.encode([{"role": "user", "content": QUESTIONS[0]}])
    made = answer(tuned, ids, Sampling(200))
    next(iter(made))
    made.cancel()
    "".join(made)
    assert made.num_tokens < 200


def test_stop_strings_end_an_answer_and_are_not_in_it(tuned: Tuned) -> None:
    ids = tuned.encode([{"role": "user", "content": QUESTIONS[0]}])
    whole = "".join(answer(tuned, ids, Sampling(30)))
    stop = whole[8:11]
    found = "".join(answer(tuned, ids, Sampling(30, stop=(stop,))))
    assert found == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab<", "e", "nd>x"], ["<end>"], "ab"),
        (["ab<", "e", "x"], ["<end>"], "ab<ex"),
        (["ab<e"], ["<end>"], "ab<e"),
        (["a", "b", "c"], ["c", "b"], "a"),
    ],
)
def test_text_is_passed_on_up_to_a_stop_string(pieces: list[str], stop: list[str], text: str) -> None:
    assert "".join(until_stop(iter(pieces), stop)) == text


def test_framing_is_that_of_the_training(tuned: Tuned) -> None:
    turns = [{"role": "user", "content": "first"}, {"role": "user", "content": "second"}]
    assert tuned.encode(turns) == tuned.encode_text("second\n")  # it was trained on single questions
    tuned.framing = "Q: {prompt} A:"
    assert tuned.encode(turns) == tuned.encode_text("Q: second A:")
    tuned.framing = "text"
    assert tuned.encode(turns) == tuned.encode_text("second")
    tuned.framing = "chat"
    tuned.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    text = "user:first;user:second;A:"
    assert tuned.encode(turns) == tuned.tokenizer.encode(text, add_special_tokens=False)
    tuned.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="chat template refuses"):
        tuned.encode(turns)
    with pytest.raises(DataError, match="expected messages"):
        tuned.encode([])


@pytest.mark.parametrize(
    ("data", "chat", "framing"),
    [
        ({}, "", "{prompt}\n"),
        ({}, "{{ 1 }}", "chat"),
        ({"template": "plain"}, "{{ 1 }}", "{prompt}\n"),
        ({"template": "Q: {prompt} A: {response}!"}, "", "Q: {prompt} A: "),
        ({"messages": "chat"}, "{{ 1 }}", "chat"),
        ({"text": "note"}, "{{ 1 }}", "text"),
    ],
)
def test_recipe_says_how_examples_were_written(demo_model: Path, data: dict[str, str], chat: str, framing: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.chat_template = chat or None
    assert framing_of(Data.model_validate(data), tokenizer) == framing


# ---------------------------------------------------------------------------------------------------------- files


def test_a_file_is_answered_and_gone_on_with(
    tuned: Tuned, full: Any, demo_model: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    questions = jsonl([{"question": q, "id": i} for i, q in enumerate(QUESTIONS)])
    out, seen = tmp_path / "answers.jsonl", []
    sampling = Sampling(10)
    assert answer_file(tuned, questions, out, "question", sampling, 2, lambda *done: seen.append(done)) == 3
    assert seen == [(0, 3), (2, 3), (3, 3)]
    whole = out.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["answer"] for row in rows] == [expected(full, demo_model, q, 10) for q in QUESTIONS]
    assert [row["id"] for row in rows] == [0, 1, 2]
    lines = whole.splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:9])  # cut off within a line
    assert answer_file(tuned, questions, out, "question", sampling, 2) == 2
    assert out.read_text() == whole
    assert answer_file(tuned, questions, out, "question", sampling, 2) == 0


def test_what_is_no_question_is_named_by_its_line(tuned: Tuned, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def ask(questions: Path, column: str = "question") -> None:
        answer_file(tuned, questions, out, column, Sampling(2), 2)

    with pytest.raises(DataError, match="line 2 has no text and no messages in 'question'"):
        ask(jsonl([{"question": "a"}, {"question": 3}]))
    with pytest.raises(DataError, match="--in .* cannot be read"):
        ask(tmp_path / "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a"}\nprivate words\n')
    with pytest.raises(DataError, match="line 2 is not a JSON object") as error:
        ask(bad)
    assert "private" not in str(error.value)
    ask(jsonl([{"question": "a"}]))
    with pytest.raises(DataError, match="answers to other questions"):
        ask(jsonl([{"question": "b"}]))
    for written, match in (("no json\n", "is no file of answers"), ('{"question": "a"}\n', "lines without an answer")):
        out.write_text(written)
        with pytest.raises(DataError, match=match):
            ask(jsonl([{"question": "a"}]))
    with pytest.raises(DataError, match="line 1: a prompt has"):
        ask(jsonl([{"question": "a " * 300}]))
    with pytest.raises(DataError, match="--in and --out are both"):
        ask(out)
    out = tmp_path / "none" / "out.jsonl"
    with pytest.raises(DataError, match=r"--out .* cannot be written \(FileNotFoundError\)"):
        ask(jsonl([{"question": "a"}]))


def test_a_line_ends_at_its_end_only(tuned: Tuned, tmp_path: Path) -> None:
    """JSON may hold what Python takes for the end of a line, and half a letter."""
    questions, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text('{"question": "a\u2028b"}\n{"question": "\\ud800"}\n', encoding="utf-8")
    assert answer_file(tuned, questions, out, "question", Sampling(2), 2) == 2
    assert [json.loads(line)["question"] for line in out.read_text("utf-8").split("\n")[:-1]] == ["a\u2028b", "\ud800"]
    assert answer_file(tuned, questions, out, "question", Sampling(2), 2) == 0


# ------------------------------------------------------------------------------------------------------- terminal


def test_interrupting_an_answer_ends_that_answer(
    adapter: Path, address: str, full: Any, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_, cut = answers.answer, []

    def interrupted(*args: Any) -> Any:
        made = answer_(*args)

        def texts() -> Iterator[str]:
            yield next(iter(made))
            raise KeyboardInterrupt

        if not cut:
            cut.append(made)
            return replace(made, texts=texts(), cancel=lambda: cut.append("cancelled"))
        return made

    monkeypatch.setattr(answers, "answer", interrupted)
    options = ["chat", str(adapter), address, "--max-tokens", "12"]
    result = CliRunner().invoke(app, options, input=f"{QUESTIONS[0]}\n{QUESTIONS[2]}\n")
    assert result.exit_code == 0, result.output
    assert cut[1:] == ["cancelled"] and "(cut short)" in result.stderr
    assert expected(full, demo_model, QUESTIONS[2], 12).strip() in result.stdout


def test_interrupting_a_question_ends_the_conversation(
    adapter: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert CliRunner().invoke(app, ["chat", str(adapter), address]).exit_code == 0


def test_chat_in_a_terminal(
    adapter: Path, address: str, full: Any, demo_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["chat", str(adapter), address, "--max-tokens", "12"]
    result = CliRunner().invoke(app, options, input=f"{QUESTIONS[0]}\n{QUESTIONS[2]}\n")
    assert result.exit_code == 0, result.output
    for question in (QUESTIONS[0], QUESTIONS[2]):
        assert expected(full, demo_model, question, 12).strip() in result.stdout
    assert result.stdout.startswith(expected(full, demo_model, QUESTIONS[0], 12) + "\n")  # no "> " in a file
    assert "tokens/s)" in result.stderr
    assert "go to the trunk" in caplog.text


def test_a_question_that_fails_is_not_the_end_of_a_talk(
    adapter: Path, address: str, full: Any, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["chat", str(adapter), address, "--max-tokens", "12"]
    talk = f"{'much too long ' * 400}\n{QUESTIONS[2]}\n"
    piped = CliRunner().invoke(app, options, input=talk)
    assert (piped.exit_code, piped.stdout) == (1, "") and "error: a prompt has" in piped.stderr
    monkeypatch.setattr(node_verbs, "_is_terminal", lambda: True)
    result = CliRunner().invoke(app, options, input=talk)
    assert result.exit_code == 0 and "that question is forgotten" in result.stderr
    assert expected(full, demo_model, QUESTIONS[2], 12) in result.stdout


def test_generate_in_a_terminal(adapter: Path, address: str, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    questions, out = jsonl([{"q": q} for q in QUESTIONS]), tmp_path / "answers.jsonl"
    options = ["generate", str(adapter), address, "--in", str(questions), "--out", str(out), "--prompt", "q"]
    result = CliRunner().invoke(app, [*options, "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 3


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_adapter_is_named(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="holds no adapter"):
        load_tuned(tmp_path, address)


def test_a_classifier_has_no_answers(adapter: Path, address: str, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ConfigError, match="is of a classifier"):
        load_tuned(tmp_path, address)


def test_a_damaged_recipe_is_named(adapter: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (tmp_path / "fl-split.json").write_text("{")
    with pytest.raises(ConfigError, match="fl-split.json cannot be read"):
        load_tuned(tmp_path, address)


def test_a_trunk_of_another_split_is_refused(adapter: Path, demo_model: Path) -> None:
    with server.embedded(hold_layers(demo_model, 1, 1)) as other:
        with pytest.raises(ConfigError, match="changes layer 1, and this trunk holds layers 1 to"):
            load_tuned(adapter, other)


def test_a_trunk_of_a_deeper_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=16, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with server.embedded(hold_layers(tmp_path, 2, 2)) as other:
        with pytest.raises(ConfigError, match=r"the trunk holds layers 2 to 13, and .* has 8"):
            load_tuned(adapter, other)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def no_layers_of_it(folder: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name(key): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"cannot be read \(FileNotFoundError\)"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"1" * 99), "model.safetensors cannot be"),
    "cut config": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config.json cannot be read"),
    "no base": (lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path=None), "set --base"),
    "base gone": (
        lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path="/nowhere"),
        "the base model is not found, --base names another place: .*there is no such folder",
    ),
    "dtype": (lambda f: rewrite(f / "fl-split.json", dtype="float99"), r"fl-split.json cannot be read \(ValueError"),
    "wire": (lambda f: rewrite(f / "fl-split.json", **{"wire-dtype": 3}), r"fl-split.json cannot be read"),
    "no layer": (lambda f: no_layers_of_it(f, lambda key: key.replace("layers", "h")), "changes none of this model's"),
    "layer 9": (lambda f: no_layers_of_it(f, lambda key: key.replace("s.0.", "s.9.")), "or others than it has"),
    "rank": (lambda f: rewrite(f / "adapter_config.json", r=3), "does not fit .* it was trained on another model"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_cannot_be_used_is_named(adapter: Path, address: str, tmp_path: Path, how: str) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    damage, message = BROKEN[how]
    damage(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message):
        load_tuned(tmp_path / "adapter", address)


def test_a_base_without_its_tokenizer_is_named(adapter: Path, address: str, demo_model: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_model, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        load_tuned(adapter, address, base=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("ids", "max_tokens", "match"),
    [
        ([], 5, "the prompt is empty"),
        ([5] * 256, 5, "has 256 tokens: .* at most 256, its answer"),
        ([5], 0, "at least 1"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named(tuned: Tuned, ids: list[int], max_tokens: int, match: str) -> None:
    with pytest.raises(DataError, match=match):
        answer(tuned, ids, Sampling(max_tokens))
    with pytest.raises(DataError, match=match):
        answer_batch(tuned, [ids], Sampling(max_tokens))


def test_an_answer_ends_where_the_model_does(tuned: Tuned) -> None:
    made = answer(tuned, [5] * 253, Sampling(50))
    assert len(list(made)) > 0
    assert (made.num_tokens, made.reason) == (3, "length")


def test_halves_of_letters_are_taken_for_question_marks(tuned: Tuned) -> None:
    assert tuned.encode_text("\ud800 a") == tuned.encode_text("? a")


def test_no_trunk_is_named(adapter: Path) -> None:
    with pytest.raises(TrunkUnavailable, match=r"no trunk answers at 127.0.0.1:1 \(UNAVAILABLE\)"):
        load_tuned(adapter, "127.0.0.1:1", timeout_s=2)


def test_what_goes_wrong_in_an_answer_reaches_its_reader(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise TrunkUnavailable("gone")

    monkeypatch.setattr(answers, "options_of", fail)
    with pytest.raises(TrunkUnavailable, match="gone"):
        "".join(answer(tuned, [1, 2], Sampling(2)))
