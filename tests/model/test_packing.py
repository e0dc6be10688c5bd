"""Batches by length and without padding: the same examples, the same loss and gradients."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, PreTrainedTokenizerBase

from fl_split.config import Data, Lora, RunConfig
from fl_split.data.batches import heldout_batches, prepare_tokenizer, training_batches
from fl_split.data.examples import Example
from fl_split.errors import ConfigError, SplitError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import Batch, accumulate, count_targets, count_tokens
from fl_split.model.packing import check_packing
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.evaluate import evaluate

GROUPED = Data.model_validate({"group-by-length": True})
PACKED = Data(packing=True)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


def some(count: int, longest: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    ids = [torch.randint(4, 99, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def test_batches_by_length_hold_each_example_once_an_epoch_with_less_padding(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = some(42, 60)

    def draw(first: int, count: int, config: Data | None) -> list[Batch]:
        return list(islice(training_batches(examples, tokenizer, 4, 7, first, config), count))

    batches = draw(0, 21, GROUPED)  # two epochs, which share the eleventh batch
    seen = Counter(tuple(row[mask.bool()].tolist()) for b in batches for row, mask in zip(*pairs(b), strict=True))
    assert seen == {tuple(example["input_ids"]): 2 for example in examples}
    assert padding(batches) < 0.4 * padding(draw(0, 21, None))
    assert [b["input_ids"].tolist() for b in batches[13:]] == [b["input_ids"].tolist() for b in draw(52, 8, GROUPED)]
    shapes = [b["input_ids"].shape[1] for b in batches[:10]]
    assert shapes != sorted(shapes)


def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def padding(batches: list[Batch]) -> int:
    return sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(
    checkpoint: object, tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    folder = checkpoint(family)  # type: ignore[operator]
    client = load_ends(folder, 2, 2, LocalTrunk(load_trunk(folder, 2, 2)), surrogate="blocks", surrogate_layers=1)
    check_packing(client)
    model = adapters.attach(client, Lora(), train_bottom=True, seed=0)
    examples = some(6, 20)

    def run(config: Data | None) -> tuple[float, list[torch.Tensor], list[Batch]]:
        batches = list(heldout_batches(examples, tokenizer, 3, config))
        loss = accumulate(model, batches)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        torch.testing.assert_close(loss, evaluate(model, batches)["loss"])
        return loss, gradients, batches

    loss, gradients, batches = run(PACKED)
    expected, expected_gradients, padded = run(None)
    assert len(gradients) > 20
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
    assert [b["input_ids"].shape[0] for b in batches] == [1, 1]
    assert [count_tokens(b) for b in batches] == [count_tokens(b) for b in padded]
    assert [count_targets(b) for b in batches] == [count_targets(b) for b in padded]


def test_packing_is_refused_where_examples_would_see_each_other(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=4, n_head=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    client = load_ends(tmp_path, 1, 1, LocalTrunk(load_trunk(tmp_path, 1, 1)), surrogate="identity")
    trunk = client.trunk_calls.trunk
    with pytest.raises(SplitError, match=r"data\.packing=true is not exact for bloom.*data\.packing=false"):
        check_packing(client)
    assert client.trunk_calls.trunk is trunk
    with pytest.raises(ConfigError, match=r"data\.packing=true is for language models"):
        RunConfig.from_flat(
            {"task": "sequence-classification", "data.text": "t", "data.labels": "a,b", "data.packing": True}
        )
