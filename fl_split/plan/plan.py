"""What a split costs before anything is downloaded: memory of each party, bytes on the wire, time per step.

All of it from a model's configuration: the node's model is built on the meta device, which holds shapes and no numbers,
and takes one training step there (`step_memory`).
"""

import copy
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fl_split import wire
from fl_split.config import Report, Run, RunConfig, num_bytes
from fl_split.errors import ConfigError, SplitError
from fl_split.model.checkpoint import read_config
from fl_split.model.family import Anatomy, auto_class, examine
from fl_split.model.loading import Boundaries
from fl_split.model.surrogate import kept_layers
from fl_split.plan.message_bytes import pull_bytes, reply_bytes, request_bytes, share_bytes
from fl_split.plan.step_memory import key_value_bytes, layers_of, on_meta, step_on_meta

logger = logging.getLogger(__name__)

# Of a process with torch, transformers, peft and datasets, before any model: an allowance, not a measurement.
PROCESS_BYTES = 800 * 10**6


@dataclass(frozen=True)
class Memory:
    """A node's memory while it trains, in bytes; without the process itself, `PROCESS_BYTES`."""

    weights: int  # frozen: its layers, embeddings and head, and its surrogate, of a streamed one the largest layer
    training: int  # adapters, their gradients and AdamW's two moments; all adapters', and a distilled surrogate's
    activations: int  # all other tensors of a step, as many as are alive at once

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.training + self.activations


@dataclass(frozen=True)
class Link:
    """What lies between a node and its trunk, and what each computes; 0 FLOP/s: not counted."""

    bits_per_s: float
    round_trip_s: float
    node_flops: float = 0.0
    trunk_flops: float = 0.0


@dataclass(frozen=True)
class Plan:
    """One split of one model under one run's configuration."""

    bottom_layers: int
    top_layers: int
    trunk_layers: int
    node: Memory
    trunk_weights: int  # bytes, in the run's `model.dtype`
    full_weights: int  # bytes of the whole model, for comparison
    token_bytes: int  # what the trunk keeps of one token of an answer, in the run's `model.dtype`
    request_bytes: int  # of one micro-batch of full-length examples, probes on average
    reply_bytes: int
    node_flop: float  # of one micro-batch, forward and backward
    trunk_flop: float
    accumulation: int
    in_flight: int

    def step_s(self, link: Link) -> float:
        """Seconds of one optimizer step: transfers, and computation where the link says how fast it is.

        Calls overlap with each other and with the node's computation as far as `trunk.in-flight` and
        `train.accumulation` let them.
        """
        up, down = 8 * self.request_bytes / link.bits_per_s, 8 * self.reply_bytes / link.bits_per_s
        away = up + down + link.round_trip_s + (self.trunk_flop / link.trunk_flops if link.trunk_flops else 0.0)
        here = self.node_flop / link.node_flops if link.node_flops else 0.0
        turns = min(self.in_flight, self.accumulation)
        if turns == 1:
            return self.accumulation * (away + here)
        slowest = max(here, up, down, (away + here) / turns)
        return away + here + (self.accumulation - 1) * slowest


_planned: dict[tuple[str, str, RunConfig], Plan] = {}


def make_plan(config: PretrainedConfig, run: RunConfig) -> Plan:
    """Work out what the split of a run costs.

    Args:
        config: Of the full model; nothing else of it is read.
        run: Its split, surrogate, adapters, batches and wire.

    Raises:
        SplitError: The model cannot be split, or not here.
        ConfigError: Surrogate or adapters do not fit the model.
    """
    run = run.model_copy(update={"run": Run(), "report": Report()})
    key = (type(config).__name__, config.to_json_string(), run)  # many nodes of a simulation ask for the same
    if key not in _planned:
        _planned[key] = _make_plan(config, run)
    return _planned[key]


def _make_plan(config: PretrainedConfig, run: RunConfig) -> Plan:
    if run.task == "sequence-classification":
        config = copy.deepcopy(config)
        config.num_labels, config.pad_token_id = len(run.data.label_names), config.pad_token_id or 0
    anatomy = examine(config, auto_class(run.task))
    cut = Boundaries.of(anatomy, run.split.bottom_layers, run.split.top_layers)
    kind = "blocks" if run.surrogate.kind == "matched" else run.surrogate.kind  # thin layers, of as many layers' size
    kept = kept_layers(kind, run.surrogate.layers, cut.first, cut.end)
    dtype = run.model.torch_dtype
    model = on_meta(config, anatomy, dtype)
    sizes = [_num_params(layer) for layer in layers_of(model, anatomy)]
    outside = _num_params(model) - sum(sizes)
    own = [*cut.bottom, *kept, *cut.top]
    streamed = cut.trunk if kind == "streamed" else ()  # in memory one at a time
    kept_params = sum(sizes[i] for i in kept)
    token_bytes = key_value_bytes(model, cut.trunk) if run.task == "causal-lm" else 0
    training, activations = _step(model, config, anatomy, cut, kept, run)
    training *= run.num_trainings  # each leaves an adapter and its moments
    if run.surrogate.is_trained:
        training += 3 * kept_params * dtype.itemsize
    tokens = run.train.batch_size * run.data.max_length
    attention = 4 * run.data.max_length * config.hidden_size  # FLOP of one layer, token and forward pass
    head = outside - _num_params(model.get_input_embeddings())  # looked up, not multiplied; a tied head is, both ways
    if getattr(config, "tie_word_embeddings", False) and run.task == "causal-lm":
        head = outside
    passes = 3 if run.train.activation_checkpointing else 2  # through the node's layers: one more forward pass

    def flop(layers: Iterable[int], passes: int) -> int:
        return sum(2 * passes * sizes[i] + (passes + 1) * attention for i in layers)

    sent, received = _message_bytes(run, config.hidden_size)
    return Plan(
        bottom_layers=len(cut.bottom),
        top_layers=len(cut.top),
        trunk_layers=len(cut.trunk),
        node=Memory(
            (outside + sum(sizes[i] for i in own) + max((sizes[i] for i in streamed), default=0)) * dtype.itemsize,
            training,
            activations,
        ),
        trunk_weights=sum(sizes[i] for i in cut.trunk) * dtype.itemsize,
        full_weights=(outside + sum(sizes)) * dtype.itemsize,
        token_bytes=token_bytes,
        request_bytes=sent,
        reply_bytes=received,
        node_flop=tokens * (4 * head + flop(own, passes) + flop(streamed, 3)),
        trunk_flop=_num_calls(run) * tokens * (2 * sum(sizes[i] for i in cut.trunk) + attention * len(cut.trunk)),
        accumulation=run.train.accumulation,
        in_flight=run.trunk.in_flight,
    )


def _num_calls(run: RunConfig) -> float:
    """Count the forward calls of a micro-batch, probes on average."""
    return 1 + 1 / run.surrogate.probe_every if run.surrogate.is_trained and run.surrogate.probe_every else 1


def _message_bytes(run: RunConfig, hidden_size: int) -> tuple[int, int]:
    """Count the bytes that a micro-batch of full-length examples sends and receives."""
    lengths, dtype = [run.data.max_length] * run.train.batch_size, wire.NAMES[run.trunk.wire_dtype]
    pulled = {
        "exact": lambda: pull_bytes(lengths, dtype, hidden_size),
        "shares": lambda: share_bytes(lengths, hidden_size),
    }.get(run.surrogate.kind, lambda: (0, 0))()
    calls = _num_calls(run)
    return (
        round(calls * request_bytes(lengths, dtype, hidden_size)) + pulled[0],
        round(calls * reply_bytes(lengths, dtype, hidden_size)) + pulled[1],
    )


def _step(
    model: Any, config: PretrainedConfig, anatomy: Anatomy, cut: Boundaries, kept: tuple[int, ...], run: RunConfig
) -> tuple[int, int]:
    """Run `step_on_meta`; where experts have a kernel for bfloat16 only, float32 is twice as much."""
    try:
        try:
            return step_on_meta(model, anatomy, cut, kept, run)
        except RuntimeError:
            training, activations = step_on_meta(on_meta(config, anatomy, torch.bfloat16), anatomy, cut, kept, run)
            return training, activations * model.dtype.itemsize // 2
    except (RuntimeError, AttributeError) as error:
        raise SplitError(
            f"the memory of {config.model_type} cannot be planned, since its code does not run without numbers "
            f"({error}): set split.bottom-layers and split.top-layers, and leave split.client-memory empty"
        ) from error


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -------------------------------------------------------------------------------------------------------- choice


def rows_of(run: RunConfig, wanted: list[str], link: Link) -> list[dict[str, str | float]]:
    """`fl-split plan`: a row for each split, named and in units for people.

    Args:
        run: Model, surrogate, adapters, batches, wire; with `split.client-memory`, only the split that it chooses.
        wanted: Splits such as ``4+2``; by default several depths.
        link: For the time of a step.

    Raises:
        ConfigError: A split that is not written like that.
        SplitError: The model cannot be split, or not there.
    """
    config = read_config(run.model.name, run.model.revision)
    if wanted:
        runs = [_at(run, text) for text in wanted]
    else:
        runs = [choose_split(run, config)] if run.split.client_memory else splits(config, run)
    rows: list[dict[str, str | float]] = []
    for candidate in runs:
        plan = make_plan(config, candidate)
        tokens = run.train.batch_size * run.data.max_length
        rows.append(
            {
                "split": f"{plan.bottom_layers}+{plan.trunk_layers}+{plan.top_layers}",
                "node GB": round((plan.node.total + PROCESS_BYTES) / 1e9, 2),
                "weights": round(plan.node.weights / 1e9, 2),
                "training": round(plan.node.training / 1e9, 2),
                "activations": round(plan.node.activations / 1e9, 2),
                "trunk GB": round(plan.trunk_weights / 1e9, 2),
                "whole GB": round(plan.full_weights / 1e9, 2),
                "cache B/token": plan.token_bytes,
                "up B/token": round(plan.request_bytes / tokens, 1),
                "down": round(plan.reply_bytes / tokens, 1),
                "s/step": round(plan.step_s(link), 3),
            }
        )
    return rows


def _at(run: RunConfig, text: str) -> RunConfig:
    match = re.fullmatch(r"(\d+)\+(\d+)", text)
    if not match:
        raise ConfigError(f"--split {text!r}: expected layers of bottom and top, such as 4+2")
    ends = {"bottom_layers": int(match[1]), "top_layers": int(match[2]), "client_memory": ""}
    return run.model_copy(update={"split": run.split.model_copy(update=ends)})


def splits(config: PretrainedConfig, run: RunConfig) -> list[RunConfig]:
    """The run at several depths: 2 layers on the node, then twice as many, up to what leaves a trunk."""
    count, most, found = 2, _most_layers(config, run), []
    while count <= most:
        found.append(with_split(run, count))
        count *= 2
    return found


def with_split(run: RunConfig, count: int) -> RunConfig:
    """The run with `count` layers on the node: up to two in the bottom, the rest in the top.

    A top learns whatever the surrogate; with the exact gradient it matters little where they are (docs/surrogates.md).
    What a trunk's operator can read of the text is the same.
    """
    bottom = min(2, count // 2)
    split = run.split.model_copy(update={"bottom_layers": bottom, "top_layers": count - bottom, "client_memory": ""})
    return run.model_copy(update={"split": split})


def _most_layers(config: PretrainedConfig, run: RunConfig) -> int:
    """Count what a node can hold beside its surrogate's layers, so that there is one that it does not hold."""
    return int(config.num_hidden_layers) - 1 - run.surrogate.num_kept


def choose_split(run: RunConfig, config: PretrainedConfig | None = None) -> RunConfig:
    """Put the deepest split that fits `split.client-memory` into a run's configuration, if it asks for that.

    Server and nodes come to the same split: it follows from the model's and the run's configuration, not the machine.

    Raises:
        ConfigError: Not even one layer at each end fits.
    """
    if not run.split.client_memory:
        return run
    limit = num_bytes(run.split.client_memory)
    config = config or read_config(run.model.name, run.model.revision)
    most = _most_layers(config, run)
    if most < 2:
        raise SplitError(
            f"split.client-memory={run.split.client_memory!r}: the model's {config.num_hidden_layers} layers leave no "
            "trunk beside the surrogate: use fewer surrogate.layers"
        )

    def needed(count: int) -> int:
        return make_plan(config, with_split(run, count)).node.total + PROCESS_BYTES

    least = needed(2)
    if least > limit:
        raise ConfigError(
            f"split.client-memory={run.split.client_memory!r}: one layer at each end needs {least / 1e9:.1f} GB with "
            f"train.batch-size={run.train.batch_size} and data.max-length={run.data.max_length}; lower these, use "
            "model.dtype='bfloat16' or fewer surrogate.layers, or allow more"
        )
    fits, too_many = 2, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= limit else (fits, middle)
    chosen = with_split(run, fits)
    logger.info(
        "split.client-memory=%s: split.bottom-layers=%d and split.top-layers=%d of %d layers (about %.1f GB)",
        run.split.client_memory,
        chosen.split.bottom_layers,
        chosen.split.top_layers,
        config.num_hidden_layers,
        needed(fits) / 1e9,
    )
    return chosen
