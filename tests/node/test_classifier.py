"""Sequence classification: the head is the node's own, and all else is as for language models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, trained_node
from families import CLASSIFIERS, DECODERS, LABELS, Family
from flwr.app import Context, RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import client_app
import server_app
from fl_split import demo
from fl_split.config import Aggregation, Lora, RunConfig, Train
from fl_split.errors import SplitError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import Batch, accumulate
from fl_split.model.slots import Trunk
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.evaluate import evaluate, macro_f1
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.trunk import server
from fl_split.trunk.layers import hold_layers

BATCH: Batch = {
    "input_ids": torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 7 + [0] * 2, [1] * 2 + [0] * 7]),
    "labels": torch.tensor([0, 2, 1, 0]),
}
BATCH["input_ids"] *= BATCH["attention_mask"]


def family(name: str, among: list[Family]) -> Family:
    return next(f for f in among if f.name == name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of classifiers by model type; with ``-lm`` behind it, of a language model without a head."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            among = DECODERS if name.endswith("-lm") else CLASSIFIERS
            family(name.removesuffix("-lm"), among).save(folders[name])
        return folders[name]

    return save


def client(folder: Path, trunk: Trunk | None = None, **options: Any) -> PreTrainedModel:
    options = {"labels": LABELS, **options}
    return load_ends(folder, 1, 2, trunk or LocalTrunk(load_trunk(folder, 1, 2)), **options)


def gradients(model: PeftModel) -> dict[str, dict[str, Tensor | None]]:
    """By part and by name, of one step's loss."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    accumulate(model, [BATCH])
    found: dict[str, dict[str, Tensor | None]] = {"bottom": {}, "trunk": {}, "top": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[adapters.part_of(model, name)][name] = parameter.grad
    return found


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "mpnet"])
def test_bottom_of_an_encoder_learns_and_its_top_and_head_learn_exactly(
    saved: Callable[[str], Path], name: str
) -> None:
    folder = saved(name)
    reference = gradients(adapters.attach(client(folder, surrogate="exact"), Lora(), train_bottom=True, seed=0))
    assert any("modules_to_save" in n for n in reference["top"])
    for kind in ("none", "identity", "blocks", "distilled"):
        model = adapters.attach(client(folder, surrogate=kind), Lora(), train_bottom=kind != "none", seed=0)
        if kind == "distilled":
            train.make_distiller(model, 1e-3)
        found = gradients(model)
        assert all(g is not None and g.abs().max() > 0 for g in found["bottom"].values())
        assert bool(found["bottom"]) == (kind != "none")
        if kind != "none":  # with another random state, lora_B of the top is another
            for n, gradient in found["top"].items():
                assert torch.equal(gradient, reference["top"][n])  # type: ignore[arg-type]


def test_padding_and_both_directions_hold_over_the_wire(saved: Callable[[str], Path]) -> None:
    for name in ("bert", "modernbert", "mpnet", "deberta-v2"):
        folder = saved(name)
        full = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        held = hold_layers(folder, 1, 2)
        assert not held.causal
        with (
            server.embedded(held) as address,
            TrunkConnection(address, Expected.from_checkpoint(folder, 1, 2), wire_dtype="float32") as trunk,
            torch.no_grad(),
        ):
            model = client(folder, trunk)
            for mask in (None, BATCH["attention_mask"]):  # on the left, an encoder would classify by a padded place
                ids = BATCH["input_ids"] if mask is None else BATCH["input_ids"].clamp(min=3) * mask
                expected = full(ids, attention_mask=mask).logits
                torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)


def test_fresh_head_is_the_same_on_every_node_and_on_the_full_model(saved: Callable[[str], Path]) -> None:
    folder = saved("llama-lm")
    first, second, other = (client(folder, seed=seed).score.weight for seed in (3, 3, 4))
    torch.manual_seed(3)
    full = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(first, second) and torch.equal(first, full.score.weight)
    assert not torch.equal(first, other)


def test_head_for_other_labels_is_made_anew_and_other_gaps_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = client(saved("bert"), labels=("a", "b", "c", "d", "e"))
    assert model.classifier.weight.shape[0] == 5 and model.config.label2id["e"] == 4
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text((saved("bert") / "config.json").read_text())
    weights = load_file(saved("bert") / "model.safetensors")
    lost = "bert.embeddings.LayerNorm.weight"
    kept = {k: v for k, v in weights.items() if k != lost and "pooler" not in k}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SplitError, match=lost):
        client(tmp_path, LocalTrunk(load_trunk(saved("bert"), 1, 2)))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_head_is_float32_on_a_base_in_bfloat16_and_learns(saved: Callable[[str], Path], name: str) -> None:
    trunk = LocalTrunk(load_trunk(saved(name), 1, 2, dtype=torch.bfloat16))
    model = adapters.attach(client(saved(name), trunk, dtype=torch.bfloat16), Lora(), train_bottom=True, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    config = Train.model_validate({"steps": 12, "bottom-lr": 1e-2, "top-lr": 1e-2, "scheduler": "constant"})
    before = evaluate(model, [BATCH])
    train.train_round(model, train.make_optimizer(model, config), iter([BATCH] * 12), config)
    assert evaluate(model, [BATCH])["loss"] < before["loss"] / 2


def test_accumulated_texts_weigh_the_same_however_they_are_batched(saved: Callable[[str], Path]) -> None:
    parts = [{k: v[:1] for k, v in BATCH.items()}, {k: v[1:] for k, v in BATCH.items()}]
    model = adapters.attach(client(saved("bert")), Lora(), train_bottom=True, seed=0)
    model.eval()
    loss = accumulate(model, [BATCH])
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert accumulate(model, parts) == pytest.approx(loss, rel=1e-5)
    for p, expected in zip((p for p in model.parameters() if p.grad is not None), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-6)


def test_scores_are_those_of_the_definition() -> None:
    # classes 0: tp 1, fp 1, fn 0 -> 2/3; 1: tp 1, fp 0, fn 1 -> 2/3; 2 only in truth -> 0; 3 nowhere: not counted
    predicted, truth = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 2])
    assert macro_f1(predicted, truth) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize(("share", "head", "expected"), [
    ("none", False, (False, False)), ("top", False, (True, False)), ("top", True, (True, True)),
    ("bottom", True, (False, False)), ("both", True, (True, True)),
])  # fmt: skip
def test_head_is_shared_with_the_top_and_only_if_asked(
    saved: Callable[[str], Path], share: str, head: bool, expected: tuple[bool, bool]
) -> None:
    model = adapters.attach(client(saved("bert")), Lora(), train_bottom=True, seed=0)
    names = adapters.shared_state(model, Aggregation.model_validate({"share": share, "share-head": head}))
    top = any(".layer.5." in name for name in names)
    assert (top, any("classifier" in name or "pooler" in name for name in names)) == expected


# ------------------------------------------------------------------------------------------------- the whole app


def rows(count: int, kinds: tuple[str, ...]) -> list[dict[str, str]]:
    words = {"skin": "measles on the skin", "lung": "asthma of the lung", "joint": "gout in the joint"}
    return [
        {"note": f"{demo.NAMES[i // len(kinds)]} has {words[kinds[i % len(kinds)]]}.", "ward": kinds[i % len(kinds)]}
        for i in range(count)
    ]


@pytest.fixture
def run(demo_model: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> Callable[..., InProcessGrid]:
    jsonl(rows(20, ("skin", "lung")), "north.jsonl")
    jsonl(rows(24, ("lung", "joint")), "south.jsonl")  # neither node has texts of every class

    def run(name: str, **changes: Any) -> InProcessGrid:
        config = {
            **RunConfig().to_flat(),
            "surrogate.check": False,
            "num-server-rounds": 2,
            "task": "sequence-classification",
            "data.path": str(tmp_path / "*.jsonl"),
            "data.text": "note",
            "data.label": "ward",
            "data.labels": "joint,lung,skin",
            "data.holdout": 0.3,
            "train.steps": 8,
            "train.scheduler": "constant",
            "run.dir": str(tmp_path / "runs"),
            "run.name": name,
            **changes,
        }
        grid = InProcessGrid(client_app.app, 2, config)
        server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
        return grid

    return run


def test_classifier_federation_keeps_heads_private_exports_and_resumes_them(
    run: Callable[..., InProcessGrid], tmp_path: Path, demo_model: Path
) -> None:
    sharing = {"aggregation.share": "top"}
    grid = run("x", **sharing)
    entries = [json.loads(line) for line in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    nodes = [entry for entry in entries if "partition-id" in entry]
    assert len({frozenset(entry) for entry in nodes}) == 1  # the same metrics, whichever classes a node has
    assert all(entry["heldout-accuracy-after"] > 0.9 and entry["heldout-macro-f1-after"] > 0.9 for entry in nodes[2:])
    assert all("heldout-accuracy-after" in entry for entry in entries)
    for reply in grid.replies.values():
        assert len(reply.content["arrays"]) and all(".layers." in name for name in reply.content["arrays"])
    full = AutoModelForSequenceClassification.from_pretrained(demo_model, num_labels=3, pad_token_id=0)
    adapter = tmp_path / "runs/x/nodes/0/adapter"
    assert "score" in "".join(load_file(adapter / "adapter_model.safetensors"))
    assert "| labels, in order | joint, lung, skin |" in (adapter / "README.md").read_text()
    model = PeftModel.from_pretrained(full, adapter).eval()
    ids = AutoTokenizer.from_pretrained(demo_model)("Anna has measles on the skin.", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.argmax() == 2

    run("cut", **sharing, **{"num-server-rounds": 1})
    run("cut", **sharing, **{"run.resume": True})
    resumed = load_file(tmp_path / "runs/cut/nodes/0/adapter/adapter_model.safetensors")
    whole = load_file(adapter / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("combine", ["svd", "stack", "exact"])
def test_classifier_takes_combined_products_and_its_export_has_head_and_all(
    run: Callable[..., InProcessGrid], tmp_path: Path, demo_model: Path, combine: str
) -> None:
    grid = run("x", **{"aggregation.share": "top", "aggregation.combine": combine, "surrogate.kind": "identity"})
    received = grid.instructions[2].content["arrays"].to_torch_state_dict()
    assert any(".residual_" in name for name in received) == (combine != "svd")
    full = AutoModelForSequenceClassification.from_pretrained(demo_model, num_labels=3, pad_token_id=0)
    model = PeftModel.from_pretrained(full, tmp_path / "runs/x/nodes/0/adapter").eval()
    ids = AutoTokenizer.from_pretrained(demo_model)("Anna has measles on the skin.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = trained_node(tmp_path / "runs/x", 0, demo_model, received)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert expected.argmax() == 2


def test_encoder_goes_through_the_app_and_its_export_equals_the_split_model(
    run: Callable[..., InProcessGrid], tmp_path: Path, demo_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    bert = tmp_path / "bert"
    Family("bert", sizes, classifier=True).save(bert)
    tokenizer.save_pretrained(bert)
    split = {"model.name": str(bert), "split.bottom-layers": 1, "surrogate.layers": 1, "data.max-length": 32}
    rates = {"train.bottom-lr": 3e-3, "train.top-lr": 1e-2, "train.steps": 16}
    run("x", **split, **rates, **{"aggregation.share": "top"})
    entries = [json.loads(line) for line in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in entries if entry.get("round") == 2 and "partition-id" in entry]
    for entry in last:  # of patients that it has not seen: no two rows are equal
        assert entry["heldout-loss-after"] < entry["heldout-loss-base"] / 2
        assert entry["heldout-accuracy-after"] > 0.9
    assert min(entry["heldout-accuracy-base"] for entry in last) < 0.5
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), tmp_path / "runs/x/nodes/0/adapter"
    ).eval()
    batch = tokenizer(["Anna has gout in the joint.", "Anna has asthma."], return_tensors="pt", padding=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = trained_node(tmp_path / "runs/x", 0, bert, {})(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
