"""What is replaced before anything is made of a row, and that nothing of it is sent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fl_split.config import Data, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import load_examples
from fl_split.data.redact import KINDS, Redactor, columns_of, redactor
from fl_split.errors import ConfigError
from fl_split.tools.audit.counts import share_found
from fl_split.tools.audit.text import plant

ALL = ",".join(KINDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("born 17.04.1953, seen 3/12/2024 and 2024-12-03", "born [date 1], seen [date 2] and [date 3]"),
        ("on 3 March 1999, on March 3, 1999", "on [date 1], on [date 2]"),
        ("write to a.b+c@x-y.example.org, see https://x.org/p?q=1 now", "write to [email 1], see [url 1] now"),
        ("call +49 30 1234567 or (030) 123-4567", "call [phone 1] or [phone 2]"),
        ("record 48-2093-71, case 1234567", "record [phone 1], case [number 1]"),
        ("17.04.1953 and again 17.04.1953", "[date 1] and again [date 1]"),
        ("take 2.5 mg 3 times, 1000 IU, pH 7.4, since 1999", "take 2.5 mg 3 times, 1000 IU, pH 7.4, since 1999"),
    ],
)
def test_patterns_that_come_with_it(text: str, expected: str) -> None:
    rules = redactor(Data(redact=ALL), NodeConfig())
    assert rules is not None and rules.text(text) == expected


def test_pseudonyms_hold_within_a_row_and_not_beyond() -> None:
    rules = Redactor({}, frozenset({"anna", "bo"}))
    row = {"question": "Anna met Bo", "answer": "Bo met ANNA and Annabel", "label": "Anna", "n": 3}
    columns = frozenset({"question", "answer", "n"})
    assert rules.row(row, columns) == {
        "question": "[name 1] met [name 2]",
        "answer": "[name 2] met [name 1] and Annabel",
        "label": "Anna",
        "n": 3,
    }
    assert rules.row({"question": "Bo"}, columns)["question"] == "[name 1]"
    assert rules.counts == {"name": 5}


def test_messages_keep_who_speaks() -> None:
    rules, chat = Redactor({}, frozenset({"user"})), [{"role": "user", "content": "a user"}, {"from": "user"}]
    assert rules.row({"messages": chat}, frozenset({"messages"}))["messages"] == [
        {"role": "user", "content": "a [name 1]"},
        {"from": "user"},
    ]
    assert columns_of(Data(messages="messages", prompt="", response="")) == {"messages"}


def own_rules(folder: Path) -> NodeConfig:
    (folder / "names.txt").write_text("Anna\nvan der Berg\n")
    file = folder / "rules.toml"
    file.write_text(f"words = '{folder / 'names.txt'}'\n[patterns]\nrecord = 'MRN-\\d+'\n")
    return NodeConfig(redact_rules=str(file))


def test_a_node_adds_rules_of_its_own(tmp_path: Path) -> None:
    rules = redactor(Data(redact="date"), own_rules(tmp_path))
    assert rules is not None
    assert rules.text("Anna Berg, MRN-17, 1.2.2003") == "[name 1] [name 2], [record 1], [date 1]"
    assert redactor(Data(), NodeConfig()) is None
    assert redactor(Data(redact="date"), NodeConfig()).identity != rules.identity  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("x = 1", "is not understood: expected"),
        ("", "is not understood: expected"),
        ("[patterns]\na = '('", "'a' is no regular expression"),
        ("[patterns]\na = 3", "'a' is no regular expression"),
        ("words = '/no/such/file'", "names|cannot be read"),
        ("]", "cannot be read"),
    ],
)
def test_wrong_rules_are_refused(tmp_path: Path, rules: str, message: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(rules)
    with pytest.raises(ConfigError, match=message):
        redactor(Data(), NodeConfig(redact_rules=str(file)))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="'dates' is none of email, url, date, phone, number"):
        RunConfig.from_flat({"data.redact": "email, dates"})
    assert set(RunConfig.from_flat({"data.redact": ALL}).data.redacted) == KINDS.keys()


def test_examples_hold_pseudonyms_only_and_counts_are_kept(
    demo_model: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    planted = plant(6, 0)
    file = jsonl({"question": record.text, "answer": f"{record.fields[1]} {i}"} for i, record in enumerate(planted))
    (tmp_path / "names.txt").write_text(" ".join(record.fields[0] for record in planted))
    rules = tmp_path / "rules.toml"
    rules.write_text(f"words = '{tmp_path / 'names.txt'}'")
    node = NodeConfig(data_path=str(file), redact_rules=str(rules))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    for store in (None, tmp_path / "store", tmp_path / "store"):  # the second time from disk
        found = load_examples(Data(redact=ALL), node, tokenizer, 0, store=store)
        ids = [torch.tensor(list(example["input_ids"])) for example in (*found.train, *found.heldout)]
        text = " ".join(str(tokenizer.decode(row)) for row in ids)
        assert not any(field in text for record in planted for field in record.fields)
        assert "[date 1]" in text and "[name 2]" in text
        assert found.report.redacted == {"date": 12, "email": 6, "name": 12, "phone": 6}
        assert found.report.say_redacted() == "12 date, 6 email, 12 name, 6 phone"
    plain = load_examples(Data(), NodeConfig(data_path=str(file)), tokenizer, 0, store=tmp_path / "store")
    assert planted[0].fields[1] in " ".join(
        str(tokenizer.decode(list(example["input_ids"]))) for example in (*plain.train, *plain.heldout)
    )


def test_an_audit_finds_nothing_of_what_was_replaced(demo_model: Path, tmp_path: Path) -> None:
    tokenizer, planted = AutoTokenizer.from_pretrained(demo_model), plant(4, 0)
    rules = Redactor(dict(KINDS), frozenset(word.casefold() for record in planted for word in record.fields[0].split()))
    sent = [torch.tensor(tokenizer.encode(rules.text(record.text), add_special_tokens=False)) for record in planted]
    assert share_found(sent, planted, tokenizer) == 0
    whole = [torch.tensor(tokenizer.encode(record.text, add_special_tokens=False)) for record in planted]
    assert share_found(whole, planted, tokenizer) == 1
