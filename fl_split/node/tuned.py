"""What a node has trained, ready to answer: the two ends with their adapter, around the trunk, and the tokenizer.

Data path: question -> **tokens, framed as in training** -> bottom -> trunk with its cache -> top -> answer.

What leaves the node: hidden states of the prompt *and of the answer*. Not the text, but whoever runs the trunk can
read text from them: see docs/privacy.md. Every message is written down before it is sent, in a ledger beside the
adapter.
"""

import json
import logging
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from jinja2.exceptions import TemplateError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split import wire
from fl_split.errors import ConfigError, DataError, NodeStateError
from fl_split.model.checkpoint import node_needs, read_config, resolve_model
from fl_split.model.ends import load_ends
from fl_split.model.loading import boundaries_of
from fl_split.node.card import PLAIN, RECIPE
from fl_split.node.expected import Expected
from fl_split.node.ledger import NAME, Ledger
from fl_split.node.replicas import Credentials, description_of
from fl_split.node.trunk_connection import TrunkConnection

logger = logging.getLogger(__name__)

NOTICE = (
    "hidden states of every prompt and of every answer go to the trunk at {address}: not the text, but its operator "
    "can read text from them (docs/privacy.md)"
)
Message = Mapping[str, str]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Tuned:
    """A model with `generate`, its tokenizer, and its way to the trunk. Use it as a context manager, or `close` it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    connection: TrunkConnection
    framing: str  # see `card.framing_of`
    name: str

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(positions or sys.maxsize, self.connection.max_sequence_length)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, framed as in training, up to where the answer begins.

        A model that was trained on a prompt and its response knows no earlier turns: only the last message counts.

        Raises:
            DataError: No message, one without text, or the chat template refuses them.
        """
        if not messages or not all(isinstance(m.get("content"), str) and m.get("role") for m in messages):
            raise DataError("expected messages with a role and a text as content")
        tokenizer = self.tokenizer
        if self.framing == "chat":
            try:
                coded: Any = tokenizer.apply_chat_template(
                    [{**m, "content": m["content"].encode(errors="replace").decode()} for m in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
            except TemplateError as error:  # its text may quote the chat
                raise DataError(f"the chat template refuses these messages ({type(error).__name__})") from None
            return cast(list[int], coded["input_ids"])
        framing = "{prompt}" if self.framing == "text" else self.framing
        return self.encode_text(framing.replace("{prompt}", messages[-1]["content"]))

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text as it is, to be gone on with."""
        bos = self.tokenizer.bos_token_id
        whole = text.encode(errors="replace").decode()  # halves of letters, which JSON can spell
        ids: list[int] = self.tokenizer.encode(whole, add_special_tokens=False)
        return ids if bos is None else [cast(int, bos), *ids]

    def close(self) -> None:
        """Give the connection back."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_tuned(
    adapter: str | Path,
    trunk_address: str,
    credentials: Credentials = Credentials(),  # noqa: B008  # frozen
    *,
    base: str = "",
    wire_dtype: str = "",
    timeout_s: float = 120,
    ledger: str | Path = "",
) -> Tuned:
    """Load what a node has trained, to ask it: ``tuned.model.generate(...)``, ``tuned.tokenizer``.

    Reads the ends of the base model only; where it is split is what the trunk says.

    Args:
        adapter: Folder of the exported adapter.
        trunk_address: ``host:port``, several with commas between.
        credentials: TLS and token, and what the trunk has to show before it gets anything.
        base: Path or Hugging Face id of the base model; by default the one that the adapter names.
        wire_dtype: Of hidden states on the way; by default that of the training.
        timeout_s: Seconds that one step may take, all retries included.
        ledger: File in which every message is noted before it is sent; by default ``<adapter>.ledger.jsonl``.

    Raises:
        ConfigError: The folder holds no adapter of a language model, or its base cannot be found.
        TrunkError: The trunk cannot be reached, or is another.
        SplitError: The adapter has weights in layers that the trunk holds.
        NodeStateError: The ledger cannot be written.
    """
    folder = Path(adapter).expanduser()
    name, revision, num_layers = _base_of(folder, base)
    recipe = _recipe(folder)
    noted = _ledger(Path(ledger).expanduser() if ledger else _beside(folder))
    about = description_of(trunk_address, credentials, timeout_s, noted.call)
    first, end = about.first_layer, about.end_layer
    if end >= num_layers:
        raise ConfigError(
            f"the trunk holds layers {first} to {end - 1}, and {name} has {num_layers}: ask its own trunk"
        )
    top = num_layers - end
    place = resolve_model(name, revision, node_needs(first, top, "none", 0))
    tokenizer = _tokenizer(place)
    connection = TrunkConnection(
        trunk_address,
        Expected.from_checkpoint(place, first, top),
        wire_dtype=wire_dtype or recipe.get("wire-dtype", "bfloat16"),
        timeout_s=timeout_s,
        credentials=credentials,
        ledger=noted,
    )
    try:
        connection.connect()
        dtype = getattr(torch, recipe.get("dtype", "float32"))
        ends = load_ends(place, first, top, connection, surrogate="none", dtype=dtype)
        ends.generation_config.pad_token_id = tokenizer.pad_token_id
        ends.generation_config.use_cache = True
        _check_layers(folder, boundaries_of(ends).layers_name, range(first, end), num_layers)
        torch.nn.Module.to(ends, "cuda" if torch.cuda.is_available() else "cpu")
        model = _with_adapter(ends, folder, name)
    except BaseException:
        connection.close()
        raise
    logger.warning(NOTICE.format(address=trunk_address))
    framing = recipe.get("framing", "chat" if tokenizer.chat_template else PLAIN)
    return Tuned(model, tokenizer, connection, framing, folder.name)


def _beside(folder: Path) -> Path:
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.{NAME}")


def _ledger(file: Path) -> Ledger:
    try:
        return Ledger(file)
    except OSError as error:
        raise NodeStateError(
            f"the ledger {file} cannot be written ({type(error).__name__}), and what is not written down is not sent: "
            "name another place (--ledger)"
        ) from error


def _base_of(folder: Path, base: str) -> tuple[str, str, int]:
    """Name, revision and number of layers of an adapter's base model; `base` is another name of it, if not empty.

    Raises:
        ConfigError: It has no name, or there is no such model.
    """
    config = _adapter_config(folder)
    name, revision = base or config.base_model_name_or_path, "" if base else str(config.revision or "")
    if not name:
        raise ConfigError(f"the adapter in {folder} does not name its base model: set --base")
    try:
        return name, revision, int(read_config(name, revision).num_hidden_layers)
    except ConfigError as error:
        raise ConfigError(f"the base model is not found, --base names another place: {error}") from error


def _adapter_config(folder: Path) -> PeftConfig:
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds no adapter: expected the folder with adapter_config.json that a run exported"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(
            f"{folder / 'adapter_config.json'} cannot be read ({type(error).__name__}): export the adapter again"
        ) from None
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(f"the adapter in {folder} is of a classifier ({config.task_type}): it has no answers to give")
    return cast(PeftConfig, config)


def _tokenizer(place: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"the base model in {place} has no tokenizer that can be read ({type(error).__name__}): put its tokenizer "
            "files there"
        ) from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _with_adapter(ends: Any, folder: Path, base: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks for it
            return PeftModel.from_pretrained(ends, folder).eval()
    except (RuntimeError, ValueError) as error:  # shapes; names of modules
        raise ConfigError(
            f"the adapter in {folder} does not fit {base} ({type(error).__name__}): it was trained on another model"
        ) from None


def _recipe(folder: Path) -> dict[str, str]:
    """How the adapter was trained, as `card.write_recipe` noted it; empty without a note."""
    known: dict[str, Collection[str] | None] = {"framing": None, "dtype": _DTYPES, "wire-dtype": wire.NAMES}
    try:
        recipe = json.loads((folder / RECIPE).read_text())
        for key, values in known.items():
            if key in recipe and not (isinstance(recipe[key], str) and (values is None or recipe[key] in values)):
                raise ValueError(key)
        return {key: recipe[key] for key in known if key in recipe}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder / RECIPE} cannot be read ({type(error).__name__}): remove it, or export again"
        ) from None


def _check_layers(folder: Path, layers_name: str, trunk: range, num_layers: int) -> None:
    """An adapter that was trained with another split or model would be used in part only, or not at all.

    Raises:
        ConfigError: It was.
    """
    pattern = re.compile(rf"\.{re.escape(layers_name)}\.(\d+)\.")
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            found = {int(match[1]) for key in tensors.keys() if (match := pattern.search(key))}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / 'adapter_model.safetensors'} cannot be read ({type(error).__name__}): export the adapter again"
        ) from None
    if inside := sorted(found & set(trunk)):
        raise ConfigError(
            f"the adapter in {folder} changes layer {inside[0]}, and this trunk holds layers {trunk[0]} to "
            f"{trunk[-1]}: ask a trunk that is split as the one that it was trained with"
        )
    if not found or max(found) >= num_layers:
        raise ConfigError(
            f"the adapter in {folder} changes none of this model's layers, or others than it has ({num_layers}): it "
            "was trained on another model"
        )
