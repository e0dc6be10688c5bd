"""The names that users' own code may lean on, and the example that uses them."""

import importlib.resources
import re
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fl_split
from fl_split import demo

ROOT = Path(__file__).resolve().parent.parent


def test_exported_members() -> None:
    assert fl_split.__all__ == sorted(fl_split.__all__, key=lambda name: (name.islower(), name)) == dir(fl_split)
    assert set(fl_split.__all__) == {
        "Credentials", "Expected", "FLSplitError", "LocalTrunk", "Lora", "Trunk", "TrunkConnection", "__version__",
        "attach", "export", "load_ends", "load_trunk",
    }  # fmt: skip
    for name in set(fl_split.__all__) - {"__version__"}:
        assert getattr(fl_split, name).__name__ == name and getattr(fl_split, name).__doc__
    with pytest.raises(AttributeError, match="fl_split has no 'load_tops': expected one of Credentials, "):
        _ = fl_split.load_tops


def test_every_exported_member_is_documented() -> None:
    documented = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(set(fl_split.__all__) - {"__version__"})


def test_types_are_for_users_too() -> None:
    assert (importlib.resources.files("fl_split") / "py.typed").is_file()


def test_the_example_trains_and_exports_an_adapter_of_the_full_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "train_without_flower.py"))["main"](tmp_path)
    first, last = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out))
    assert last < first
    base = demo.model_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = demo.private_examples("hospital-north", seed=1, num_examples=32)  # other patients
    texts = [tokenizer(f"{row['question']} {row['answer']}", return_tensors="pt") for row in rows]

    def loss() -> float:
        with torch.no_grad():
            return sum(model(**text, labels=text["input_ids"]).loss.item() for text in texts) / len(texts)

    before = loss()
    model = PeftModel.from_pretrained(model, tmp_path)
    assert loss() < before - 0.5
