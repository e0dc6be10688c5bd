"""The audit's attacks where the answer is known, its controls, and that it sends nothing."""

import json
import math
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from fl_split import demo, wire
from fl_split.cli import app
from fl_split.config import Lora, NodeConfig, RunConfig, Train
from fl_split.data.batches import prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.errors import DataError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loading import Boundaries
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.ledger import NAME, Ledger, read_ledger
from fl_split.plan.plan import choose_split
from fl_split.tools.audit import sequential
from fl_split.tools.audit.attack import Attacker, Outcome, add_noise
from fl_split.tools.audit.audit import _can_load_whole, verdict
from fl_split.tools.audit.bottom import Bottom, Listener, sent
from fl_split.tools.audit.counts import count, kinds_of, share_found, share_right
from fl_split.tools.audit.membership import auc_error, auc_of, membership
from fl_split.tools.audit.oneshot import Readings, noise_variance
from fl_split.tools.audit.page import NOISE, page
from fl_split.tools.audit.sequential import Exact, Prior, read_in_sequence
from fl_split.tools.audit.text import Planted, plant, public_ids
from fl_split.tools.gradcheck import Candidate, build


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(99, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers matter less than its embeddings, as in trained ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.08)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def attacker(folder: Path) -> Attacker:
    return Attacker.prepare(folder, (2, 2), random_ids(128, 16, 1), "bfloat16", whole=True)


@pytest.fixture(scope="module")
def truth() -> list[Tensor]:
    return [ids[:length] for ids, length in zip(random_ids(6, 12, 2), (12, 12, 9, 7, 12, 2), strict=True)]


def arrived(folder: Path, truth: list[Tensor], dtype: str = "bfloat16", drift: float = 0.0) -> list[Tensor]:
    """What a trunk gets of these tokens; with `drift`, from a bottom with an adapter."""
    listener = Listener()
    model = adapters.attach(load_ends(folder, 2, 2, listener, surrogate="identity"), Lora(), train_bottom=True, seed=0)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: drift * torch.randn(value.shape, generator=generator) if ".lora_B." in name else value
        for name, value in adapters.adapter_state(model).items()
    }
    adapters.load_adapter_state(model, state)
    return sent(model, listener, [ids.tolist() for ids in truth], dtype)


def test_bottom_gives_what_a_node_sends(folder: Path, truth: list[Tensor]) -> None:
    bottom = Bottom(folder, 2, 2)
    for rows, ids in zip(arrived(folder, truth, "float32"), truth, strict=True):
        torch.testing.assert_close(bottom.run(ids[None])[0], rows)
        cache = bottom.new_cache()
        bottom.run(ids[None, :-1], cache)
        ways = torch.stack([ids[-1:], ids[:1]], 1)
        found = torch.cat([hidden for _, hidden in bottom.candidates(ways, cache)], 1)
        torch.testing.assert_close(found[0, 0], rows[-1])
        assert cache.get_seq_length() == len(ids) - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_without_a_defence_every_token_is_read(folder: Path, truth: list[Tensor], dtype: str) -> None:
    attacker = Attacker.prepare(folder, (2, 2), random_ids(128, 16, 1), dtype, whole=False)
    outcome = attacker.read(arrived(folder, truth, dtype))
    assert outcome.drift == 0
    assert share_right(outcome.ids, truth) == 1
    assert share_right(outcome.one_shot, truth) > 0.5  # chance: 0.01


def test_the_list_widens_until_the_token_is_found(attacker: Attacker, folder: Path, truth: list[Tensor]) -> None:
    wrong = [Readings(torch.zeros(len(ids), 2, dtype=torch.long), torch.zeros(len(ids), 2)) for ids in truth]
    sequences = arrived(folder, truth)
    read = read_in_sequence(attacker.bottom, sequences, wrong, Exact(attacker.rounding))
    assert share_right(read, truth) == 1
    never = read_in_sequence(attacker.bottom, sequences, wrong, Exact(1e9))
    assert share_right(never, truth) < 0.1


def test_a_sequence_that_has_ended_is_not_searched_for(
    attacker: Attacker, folder: Path, truth: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[int] = []
    monkeypatch.setattr(sequential, "_widen", lambda *args: widened.append(args[-1]) or (args[-1], 0.0))
    sequences = arrived(folder, truth)
    right = [Readings(ids[:, None], torch.zeros(len(ids), 1)) for ids in truth]
    assert share_right(read_in_sequence(attacker.bottom, sequences, right, Exact(attacker.rounding)), truth) == 1
    assert widened == []


def test_an_unknown_adapter_is_seen_and_read_through(folder: Path) -> None:
    truth = list(random_ids(24, 16, 3))
    attacker = Attacker.prepare(folder, (2, 2), random_ids(128, 16, 1), "bfloat16", whole=False)
    sequences = arrived(folder, truth, drift=0.02)
    outcome = attacker.read(sequences)
    assert 0.02 < outcome.drift < 0.5
    assert share_right(outcome.ids, truth) > 0.9


def test_noise_is_as_large_as_it_says_and_passes_average_it_out() -> None:
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 3
    for passes in (1, 16):
        (noisy,) = add_noise([rows], 2.0, passes, torch.Generator().manual_seed(1))
        assert (noisy - rows).std().item() == pytest.approx(6 / math.sqrt(passes), rel=0.05)
    estimate = noise_variance(rows + 6 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1)), 2.0)
    assert estimate.mean().item() == pytest.approx(36, rel=0.05)


def test_under_noise_more_passes_and_the_prior_read_more(attacker: Attacker, folder: Path) -> None:
    truth = list(random_ids(8, 12, 4))
    rows = arrived(folder, truth)

    def read(passes: int) -> float:
        noisy = add_noise(rows, 2.0, passes, torch.Generator().manual_seed(0))
        return share_right(attacker.read(noisy, 2.0 / math.sqrt(passes)).ids, truth)

    assert read(100) > 0.95 > read(1)


def test_prior_is_the_base_model_after_the_row_it_goes_on_from(folder: Path) -> None:
    prior, model = Prior(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(prior.of(torch.tensor([[3, 4]])), torch.zeros(1, 2))
    prior.go_on(torch.tensor([0, 1]), torch.tensor([5, 6]))
    prior.go_on(torch.tensor([1, 1]), torch.tensor([7, 8]))
    with torch.no_grad():
        expected = model(torch.tensor([[6, 7], [6, 8]])).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(prior.of(torch.tensor([[1, 2], [1, 2]])), expected[:, 1:3])
    with torch.no_grad():
        expected = model(torch.tensor([[6, 7, 1]])).logits[0, :2].argmax(-1)
    assert torch.equal(prior.guesses([[6, 7, 1]])[0], expected)


def test_counts() -> None:
    readings = [Readings(torch.tensor([[1, 9], [5, 2]]), torch.zeros(2, 2))]
    truth = [torch.tensor([1, 2])]
    kinds = {"digits": torch.arange(10) == 2, "rare": torch.arange(10) > 7}
    figures = count(Outcome(readings, truth, 0.0), truth, kinds)
    assert (figures["one-shot-top-1"], figures["one-shot-top-10"], figures["sequence-top-1"]) == (0.5, 1.0, 1.0)
    assert (figures["readable"], figures["exact-sequences"], figures["digits"]) == (1.0, 1.0, 1.0)
    assert math.isnan(figures["rare"])
    worse = count(Outcome(readings, [torch.tensor([3, 3])], 0.0), truth, kinds)
    assert (worse["readable"], worse["digits"], worse["exact-sequences"]) == (0.5, 0.0, 0.0)


def test_planted_records_are_found_field_by_field(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    first, second = plant(2, 0)
    assert (first, second) == tuple(plant(2, 0)) and first != second
    assert all(field in first.text for field in first.fields)
    record = Planted("ab 12 cd", ("ab", "12"))
    ids = tokenizer.encode("ab 13 cd", add_special_tokens=False)
    assert share_found([torch.tensor(ids)], [record], tokenizer) == 0.5
    assert math.isnan(share_found([], [], tokenizer))


def test_kinds_of_tokens(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    public = torch.tensor([tokenizer.encode("a", add_special_tokens=False)])
    kinds = kinds_of(tokenizer, len(tokenizer) + 3, public)
    for text, kind in (("7", "digits"), ("B", "capitalised")):
        (token,) = tokenizer.encode(text, add_special_tokens=False)[-1:]
        assert kinds[kind][token] and not kinds[kind][public[0, 0]]
    assert not kinds["rare"][public[0, 0]] and kinds["rare"].sum() == len(tokenizer) + 2


@pytest.mark.parametrize("control", [0.95, 0.3, math.nan])
def test_an_audit_whose_control_fails_is_inconclusive(control: float) -> None:
    text = verdict({"readable": 0.99, "control-no-defence": control})
    assert text.startswith("inconclusive: without any defence") and "at least" not in text


def test_a_verdict_says_how_much_is_readable_and_rounds_down() -> None:
    text = verdict({"readable": 0.99999, "control-no-defence": 0.96})
    assert text == "at least 99.9 % of this node's tokens are readable by the trunk's operator"


def test_page_never_says_private() -> None:
    report = {"verdict": "at least 3.0 % ...", "readable": 0.03, "rare": math.nan, "adapter": True, "noise": 0.5}
    html = page(report)
    assert "At least 3.0 %" in html and "private" not in html and NOISE in html
    assert "not looked at" in html and ">yes<" in html and ">0.5<" in html


def test_public_text_comes_with_python_and_files_come_first(demo_model: Path, tmp_path: Path) -> None:
    ids = public_ids((), demo_model, 16, 0)
    assert ids.shape == (256, 16)
    file = tmp_path / "public.txt"
    file.write_text("one two three " * 2000)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert "two" in str(tokenizer.decode(public_ids((file,), demo_model, 16, 0)[0]))


def test_audit_of_the_demo_sends_nothing_and_writes_no_text(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    encoded: list[int] = []
    encode = wire.encode_request
    monkeypatch.setattr(wire, "encode_request", lambda *args: encoded.append(1) or encode(*args))
    out = tmp_path / "audit.html"
    words = ["audit", "--examples", "4", "--tokens", "24", "--canaries", "2", "--passes", "4"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads(out.with_suffix(".json").read_text())
    assert len(encoded) == 6  # through the wire's own encoding
    assert report["readable"] > 0.9 and report["control-no-defence"] > 0.95
    assert report["control-shuffled"] < 0.3 and report["control-prior-alone"] < 0.9
    assert report["verdict"].startswith("at least ")
    shown = out.read_text() + done.output
    assert not any(field in shown for record in plant(2, 0) for field in record.fields)


def test_the_whole_model_is_used_if_it_is_here_and_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut = Boundaries("layers", 6, 2, 4)
    assert _can_load_whole(folder, cut)
    assert not _can_load_whole(tmp_path, cut)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    assert not _can_load_whole(folder, cut) and "are left out: they would take" in caplog.text


def trained(demo_model: Path, folder: Path, config: RunConfig, own: NodeConfig, steps: int) -> Path:
    """An export of an adapter after so many steps on a node's own rows."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("exact"), Lora(rank=16))
    if steps:
        rows = load_examples(config.data, own, tokenizer, config.train.seed).train
        how = Train(steps=steps, batch_size=4, bottom_lr=2e-3, top_lr=4e-3)
        train.train_round(model, train.make_optimizer(model, how), training_batches(rows, tokenizer, 4, 0, 0), how)
    adapters.export(model, folder, str(demo_model))
    return folder


def test_an_adapter_that_knows_its_rows_by_heart_gives_them_away(demo_model: Path, jsonl: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [" ".join("".join(draw.choices("bcdfgaeiou", k=5)) for _ in range(7)) for _ in range(16)]
    rows = [{"question": text[:5], "answer": text[6:]} for text in words]  # which have nothing in common
    config = choose_split(RunConfig.from_flat({"data.holdout": 0.5, "data.max-length": 48}))
    own = NodeConfig(data_path=str(jsonl(rows)))
    blank = membership(config, own, demo_model, trained(demo_model, tmp_path / "blank", config, own, 0), 12)
    assert blank["membership-auc"] == 0.5  # as the base model: nothing can be told
    found = membership(config, own, demo_model, trained(demo_model, tmp_path / "full", config, own, 360), 12)
    assert found["membership-auc"] > 0.9 and found["membership-rows"] == 16
    assert found["membership-error"] < blank["membership-error"]
    with pytest.raises(DataError, match="too few rows to tell whether the adapter gives them away"):
        membership(config, own, demo_model, tmp_path / "full", 1)


def test_an_audit_asks_it_of_an_adapter_if_it_may(demo_model: Path, tmp_path: Path) -> None:
    own = NodeConfig(data_path=str(demo.data_folder() / "hospital-north.jsonl"))
    adapter = trained(demo_model, tmp_path / "blank", choose_split(RunConfig()), own, 0)
    words = ["audit", "--examples", "2", "--tokens", "8", "--canaries", "0", "--json", "--adapter", str(adapter)]
    words += ["--out", str(tmp_path / "a.html"), "--node-config", f"data-path={own.data_path!r}"]
    found = [json.loads(CliRunner().invoke(app, [*words, "--members", count]).stdout) for count in ("3", "0")]
    assert (found[0]["membership-auc"], found[0]["membership-rows"]) == (0.5, 6)
    assert "membership-auc" not in found[1]


def test_auc() -> None:
    assert auc_of(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == 7 / 8
    assert auc_of(torch.zeros(3), torch.zeros(2)) == 0.5
    assert auc_error(0.75, 100, 100) == pytest.approx(0.03443, abs=1e-5)  # by hand: Q1 = 0.6, Q2 = 0.642857
    assert auc_error(1.0, 10, 10) == 0.0


def counted_ledger(folder: Path) -> Path:
    ledger = Ledger(folder / NAME, 1)
    ledger.note("", "begin", 0, examples=10)
    for sent_now in (16, 15):
        digests = [str(i) for i in range(sent_now)]
        ledger.note("trunk t:1", "hidden-states", 100, sequences=sent_now, digests=digests)
    return folder / NAME


def test_passes_are_those_of_the_ledger(demo_model: Path, tmp_path: Path) -> None:
    file, out = counted_ledger(tmp_path), tmp_path / "audit.html"
    words = ["audit", "--examples", "2", "--tokens", "8", "--canaries", "0", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, [*words, "--ledger", str(file)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["passes"] == 3 and report["sent-again"] == 15 / 31
    assert report["ledger-head"] == read_ledger(file).head and report["ledger-head"] in out.read_text()
    assert math.isnan(report.get("membership-auc", math.nan))  # there is no adapter
    both = CliRunner().invoke(app, [*words, "--ledger", str(file), "--passes", "2"])
    assert both.exit_code == 1 and "--ledger and --passes both say how often" in both.stderr
    Ledger(tmp_path / "empty" / NAME).note("server", "metrics", 1)
    empty = CliRunner().invoke(app, [*words, "--ledger", str(tmp_path / "empty" / NAME)])
    assert empty.exit_code == 1 and "has no line of hidden states" in empty.stderr


def test_audit_names_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["audit", "--adapter", str(tmp_path), "--out", str(tmp_path / "a.html")])
    assert done.exit_code == 1 and "holds no adapter" in done.stderr
