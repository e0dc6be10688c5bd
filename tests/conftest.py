"""Fixtures: small models, a trained one, a trunk in this process, and Flower without Ray."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)
from transformers.utils import logging as transformers_logging

import client_app
import server_app
from fl_split import demo
from fl_split.config import Data, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import Examples, load_examples
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node.state import NodeFolder
from fl_split.trunk.layers import HeldLayers, hold_layers

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


# What quick tests do without: the trained demo, whole runs, servers and processes, and the table of all model types.
_NOT_QUICK_FIXTURES = {"demo_model"}
_SERVERS = {"fake_trunk", "run_app", "server", "serving", "subprocess", "multiprocessing"}
_NOT_QUICK_NAMES = {"InProcessGrid", "table"} | _SERVERS


# In this order: one process trains the demo, once per machine, while the other needs none; then the longest.
_FIRST = ("test_flwr_run", "test_families", "test_personal", "test_strategy", "test_trial", "test_end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``quick`` what does without all that; put first what would make one process end long after the other."""
    for item in items:
        slow = item.get_closest_marker("slow") or _NOT_QUICK_FIXTURES & set(item.fixturenames)  # type: ignore[attr-defined]
        if not slow and not _NOT_QUICK_NAMES & vars(item.module).keys():  # type: ignore[attr-defined]
            item.add_marker("quick")
    rank = {name: i for i, name in enumerate(_FIRST)}
    quick = {item.path for item in items if item.get_closest_marker("quick")}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank) + (item.path in quick)))


def tiny(family: str) -> PretrainedConfig:
    """A config of six small layers."""
    common = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    match family:
        case "llama":
            return LlamaConfig(**common)
        case "qwen2":
            return Qwen2Config(**common, tie_word_embeddings=True)
        case "mistral":
            return MistralConfig(**common, sliding_window=4)
        case "gpt2":
            return GPT2Config(
                vocab_size=99, n_embd=32, n_layer=6, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            )
    raise ValueError(family)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of random models whose layers all matter: weights far larger than the default initialisation."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny(family))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.2)
            folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.fixture(scope="session")
def held(checkpoint: Callable[[str], Path]) -> HeldLayers:
    """The trunk of a small random model, between two layers on each side."""
    return hold_layers(checkpoint("llama"), 2, 2)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's trained base model, built once and cached."""
    return demo.model_folder()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSONL file."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def trained_node(run: Path, number: int, base: Path, received: dict[str, Tensor], rank: int = 8) -> PeftModel:
    """The split model of node `number` as it was after its last round, at whose start it `received` arrays."""
    about = json.loads((run / "run.json").read_text())
    config = RunConfig.from_flat(about["config"])
    ends = config.split.bottom_layers, config.split.top_layers
    trunk, labels = LocalTrunk(load_trunk(base, *ends)), config.data.label_names
    client = load_ends(base, *ends, trunk, surrogate="identity", labels=labels)
    client.config.pad_token_id = 0
    lora = config.lora.model_copy(update={"rank": rank})
    model = adapters.attach(client, lora, train_bottom=True, seed=0)
    saved = NodeFolder(run / "nodes" / str(number), about["run-id"]).load_before(config.num_server_rounds + 1)
    assert saved is not None
    adapters.load_adapter_state(model, saved.adapter)
    adapters.add_residual(model, {name: value for name, value in received.items() if ".residual_" in name})
    return model.eval()


class InProcessGrid(Grid):
    """Flower without Ray and SuperLink: messages go straight to the ClientApp, errors become error replies."""

    def __init__(self, client_app: ClientApp, num_nodes: int, run_config: dict[str, Any]) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._app = client_app
        self.replies: dict[str, Message] = {}
        self.instructions: list[Message] = []
        self.given = dict(run_config)  # as if a person had given every key
        self.contexts = {
            1000 + i: Context(
                run_id=1,
                node_id=1000 + i,
                node_config={"partition-id": i, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(num_nodes)
        }

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1, override_config=self.given)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used by this Flower version")

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for original in messages:
            original.metadata.__dict__["_message_id"] = f"m{len(self.replies)}"  # in place, as Flower does
            message = copy.deepcopy(original)
            self.instructions.append(message)
            ids.append(message.metadata.message_id)
            self.replies[ids[-1]] = self.answer(message)
        return ids

    def answer(self, message: Message) -> Message:
        """What comes back for a message: the ClientApp's reply, or its error."""
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(self, message_ids: Sequence[str]) -> list[Message]:
        return [self.replies[i] for i in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def run_app(
    run_dir: Path,
    name: str = "x",
    *,
    nodes: int = 2,
    grid_class: type[InProcessGrid] = InProcessGrid,
    node_config: Sequence[dict[str, Any]] = (),
    **changes: Any,
) -> InProcessGrid:
    """Run the whole app in this process on the demo, with few short steps.

    Args:
        run_dir: Where the run's folder is made.
        name: Of the run.
        nodes: How many.
        grid_class: What stands for Flower.
        node_config: What the first nodes set for themselves.
        changes: Keys of the run.
    """
    config = {
        **RunConfig().to_flat(),
        "num-server-rounds": 2,
        "train.steps": 2,
        "data.max-length": 48,
        "data.holdout": 0.02,
        "surrogate.kind": "blocks",  # `auto` and `surrogate.check` have tests of their own
        "surrogate.check": False,
        "run.dir": str(run_dir),
        "run.name": name,
        **changes,
    }
    grid = grid_class(client_app.app, nodes, config)
    for context, own in zip(grid.contexts.values(), node_config, strict=False):
        context.node_config.update(own)
    server_app.app(grid=grid, context=Context(1, 1, {}, RecordDict(), config))
    return grid


@pytest.fixture
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Examples]:
    def load(path: Path | str, store: Path | None = None, seed: int = 0, **keys: Any) -> Examples:
        names = {name.replace("_", "-"): value for name, value in keys.items()}
        node = NodeConfig(data_path=str(path))
        return load_examples(Data.model_validate(names), node, tokenizer, seed, store=store)

    return load
