"""The model card beside an exported adapter."""

from pathlib import Path

from fl_split.config import Model, NodeConfig, RunConfig


def base_name(model: Model, folder: Path) -> str:
    """What the export names as its base: a hub id as it is, a local folder by its path."""
    return str(folder) if model.is_local else model.name


def card_text(
    config: RunConfig, node: NodeConfig, server_round: int, heldout: dict[str, float], num_examples: int
) -> str:
    """Say in Markdown what was trained, on what and how well; numbers, no text of an example."""
    revision = config.model.revision or "default"
    results = "\n".join(f"| {name} in round {server_round} | {value:.4f} |" for name, value in heldout.items())
    labels = f"| labels, in order | {', '.join(config.data.label_names)} |\n" if config.data.labels else ""
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
| training examples | {num_examples} |
| surrogate | {config.surrogate.kind} |
| variant, rank, alpha | {config.lora.variant}, {node.lora(config.lora).rank}, {config.lora.alpha:g} |
{results}
{labels}| shared with other nodes | {config.aggregation.share} |
"""
