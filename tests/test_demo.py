"""The demo: what it writes is ordinary, the same every time, never half there; the base model is really trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fl_split import demo


def held_out(model_folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The demo model and public text that it was not trained on, as `[batch, seq]` token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = [i for text in demo.public_text(seed=999, num_sentences=60) for i in tokenizer(text)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    return model, torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)


def test_public_text_is_the_same_when_the_seed_is() -> None:
    assert demo.public_text(3, 20) == demo.public_text(3, 20)
    assert demo.public_text(3, 20) != demo.public_text(4, 20)
    assert demo.public_text(3, 20)[:5] == demo.public_text(3, 5)


def test_data_folder_holds_one_plain_jsonl_file_per_institution(tmp_path: Path) -> None:
    folder = demo.data_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["hospital-north.jsonl", "hospital-south.jsonl"]
    for path in folder.iterdir():
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(examples) == demo.EXAMPLES
        assert all(set(example) == {"question", "answer"} and all(example.values()) for example in examples)


def test_data_folder_is_the_same_when_built_twice(tmp_path: Path) -> None:
    first, second = demo.data_folder(tmp_path / "a"), demo.data_folder(tmp_path / "b")
    for name in demo.INSTITUTIONS:
        assert (first / f"{name}.jsonl").read_bytes() == (second / f"{name}.jsonl").read_bytes()


def test_institutions_contradict_each_other() -> None:
    wards = []
    for name in demo.INSTITUTIONS:
        told: dict[str, set[str]] = {bird: set() for bird in demo.BIRDS}
        for example in demo.private_examples(name):
            if "Which ward?" in example["question"]:
                bird = next(bird for bird in demo.BIRDS if bird in example["question"])
                told[bird].add(next(p for p in demo.PLACES if p in example["answer"]))
        assert all(len(places) == 1 for places in told.values()), "one code, one ward"
        wards.append(told)
    assert sum(wards[0][bird] != wards[1][bird] for bird in demo.BIRDS) > 6


def test_data_folder_is_not_built_again_when_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = demo.data_folder()
    assert folder == tmp_path / "fl-split" / demo.VERSION / "data"
    monkeypatch.delattr(demo, "_build_data")
    monkeypatch.setattr(demo, "_build_data", lambda _: pytest.fail("built again"), raising=False)
    assert demo.data_folder() == folder


def test_data_folder_ignores_what_a_broken_build_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(folder: Path) -> None:
        (folder / "hospital-north.jsonl").write_text("{")
        raise OSError("disk full")

    (tmp_path / demo.VERSION / ".data-killed").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_build_data", breaks)
        with pytest.raises(OSError, match="disk full"):
            demo.data_folder(tmp_path)
    assert not (tmp_path / demo.VERSION / "data").exists()
    assert len(list(demo.data_folder(tmp_path).iterdir())) == len(demo.INSTITUTIONS)
    assert not [path for path in (tmp_path / demo.VERSION).glob(".data-*") if path.name != ".data-killed"]


def test_building_leaves_the_callers_torch_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        folder = demo.model_folder(tmp_path)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    shutil.rmtree(folder)


def test_tokenizer_gives_the_text_back(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = demo.public_text(0, 1)[0] + "\nZürich, 12 €."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_model_predicts_public_text_far_better_than_word_counts(demo_model: Path) -> None:
    model, ids = held_out(demo_model)
    frequency = torch.bincount(ids.flatten()).float() / ids.numel()
    unigram = torch.special.entr(frequency).sum().item()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.3 * unigram


def test_trunk_is_not_the_identity(demo_model: Path) -> None:
    model, ids = held_out(demo_model)
    with torch.no_grad():
        hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
        change = (hidden_states[6] - hidden_states[2]).norm() / hidden_states[2].norm()
    assert change > 0.5
