"""Whether a machine has the memory and the disk that a run needs: asked by `doctor`, and by a node as it starts."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from fl_split.config import NodeConfig, RunConfig
from fl_split.errors import FLSplitError
from fl_split.model.checkpoint import read_config
from fl_split.plan.plan import Plan, make_plan


@dataclass(frozen=True)
class Check:
    """One line of an answer; never holds a row's content."""

    status: Literal["pass", "warn", "fail"]
    name: str
    text: str


def check_room(config: RunConfig, own: NodeConfig, process_bytes: int = 0) -> Iterator[Check]:
    """Whether disk and memory suffice, as far as `plan` can tell.

    Args:
        config: The run's, with its split chosen.
        own: The node's.
        process_bytes: To be added for a process that is not there yet.
    """
    try:
        plan = make_plan(read_config(config.model.name, config.model.revision), config)
    except FLSplitError as error:
        yield Check("warn", "memory", f"not known beforehand: {error}")
        return
    yield _memory(plan, config, own, process_bytes)
    yield _disk(plan, config, own.folder(config, config.run.name or "new"))


def _memory(plan: Plan, config: RunConfig, own: NodeConfig, process_bytes: int) -> Check:
    if torch.cuda.is_available():
        where, free = "GPU", torch.cuda.mem_get_info()[0]
    else:
        where, free = "memory", psutil.virtual_memory().available
    needed = plan.node.total + process_bytes
    text = f"a node needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of {where} are free"
    if config.trunk.address == "embedded" and not own.trunk_address:
        text += f"; the embedded trunk needs {plan.trunk_weights / 1e9:.1f} GB more, where the server runs"
    if needed <= free:
        return Check("pass", "memory", text)
    remedy = "lower train.batch-size, data.max-length or the split's layers, or set split.client-memory"
    return Check("fail", "memory", f"{text}: {remedy}")


def _disk(plan: Plan, config: RunConfig, folder: Path) -> Check:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Check(
            "fail", "disk", f"{there} cannot be written to: set run.dir, or the node's out-dir, to a place that can"
        )
    free = shutil.disk_usage(there).free
    cache = 0 if config.surrogate.trains_bottom else config.trunk.cache_mb * 10**6
    needed = 3 * plan.node.training + cache  # two rounds' state, and one while it is written
    text = f"{needed / 1e9:.1f} GB are needed below {folder} beside the examples, {free / 1e9:.1f} GB are free"
    if needed <= free:
        return Check("pass", "disk", text)
    return Check("fail", "disk", f"{text}: make room, lower trunk.cache-mb, or set run.dir or out-dir to another disk")
