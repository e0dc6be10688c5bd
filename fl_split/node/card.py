"""What is beside an exported adapter: the model card for people, and a recipe for who asks it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fl_split.config import Data, Model, NodeConfig, RunConfig
from fl_split.data.examples import template_of
from fl_split.data.load import Examples
from fl_split.files import write_atomic

RECIPE = "fl-split.json"
PLAIN = "{prompt}\n"


def base_name(model: Model, folder: Path) -> str:
    """What the export names as its base: a hub id as it is, a local folder by its path."""
    return str(folder) if model.is_local else model.name


def card_text(
    config: RunConfig,
    node: NodeConfig,
    server_round: int,
    heldout: dict[str, float],
    examples: Examples,
    privacy: str = "",
) -> str:
    """Say in Markdown what was trained, on what and how well, and what it tells of one example; no text of any."""
    revision = config.model.revision or "default"
    results = "\n".join(f"| {name} in round {server_round} | {value:.4f} |" for name, value in heldout.items())
    labels = f"| labels, in order | {', '.join(config.data.label_names)} |\n" if config.data.labels else ""
    report = examples.report
    privacy = f"| differential privacy | {privacy} |\n" if privacy else ""
    template = f"| prompt and response | `{report.template}` |\n" if report.template else ""
    return f"""---
library_name: peft
base_model: {config.model.name}
---

# LoRA adapter of node {node.partition_id}

Trained with fl-split on the first {config.split.bottom_layers} and last {config.split.top_layers} layers.

| | |
|---|---|
| base model | {config.model.name} (revision: {revision}) |
| node | {node.partition_id} of {node.num_partitions} |
| rounds | {server_round} of {config.num_server_rounds}, {config.train.steps} steps each |
| data, on the node | {report.path}, {report.num_rows} rows |
| training examples | {len(examples.train)}, and {examples.num_heldout} held out |
{template}| surrogate | {config.surrogate.kind} |
| variant, rank, alpha | {config.lora.variant}, {node.lora(config.lora).rank}, {config.lora.alpha:g} |
{results}
{labels}{privacy}| shared with other nodes | {config.aggregation.share} |
"""


def write_recipe(folder: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Note beside an adapter how to ask it; names and formats only, nothing of an example."""
    recipe = {
        "framing": framing_of(config.data, tokenizer),
        "dtype": config.model.dtype,
        "wire-dtype": config.trunk.wire_dtype,
    }
    write_atomic(folder / RECIPE, json.dumps(recipe, indent=2) + "\n")


def framing_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """How a run writes what comes before an answer: ``text``, ``chat``, or a text with ``{prompt}``."""
    if data.text:
        return "text"
    template = "chat" if data.messages else template_of(data, tokenizer)
    return PLAIN if template == "plain" else template.partition("{response}")[0]
