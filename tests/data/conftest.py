"""A tokenizer, and what is loaded from a node's own path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import Data, NodeConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import Examples, load_examples

Load = Callable[..., Examples]


@pytest.fixture
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Load:
    def load(path: Path | str, store: Path | None = None, seed: int = 0, **keys: Any) -> Examples:
        names = {name.replace("_", "-"): value for name, value in keys.items()}
        node = NodeConfig(data_path=str(path))
        return load_examples(Data.model_validate(names), node, tokenizer, seed, store=store)

    return load
