"""`fl-split surrogate fit`: what the trunk's owner does once, so that every node's bottom learns well.

The owner has what a node lacks: the trunk's exact Jacobian, public text and time. It fits a *thin copy* of the whole
trunk, every linear a product of two thin matrices, worth k layers in memory and compute, whose gradient is the trunk's:

1. `moments`: record the second moments of the inputs and output gradients of each linear; start from their weighted
   SVD, with ranks from one budget over all linears. The trunk's first layers may stay whole.
2. `lessons`: record h1, h2, dL/dh2 and dL/dh1, with the model's own top and loss, at the base model and along
   simulated fine-tunings of its two ends, so that the match holds while the ends of the nodes move.
3. `student`: minimise ||J_S^T g - J_T^T g||^2 / ||J_T^T g||^2 + w ||S(h1) - h2||^2 / ||h2 - h1||^2 over the
   lessons (Sobolev training, Czarnecki et al. 2017). The teacher is gone by then.

Only public text goes in. Needs the whole checkpoint and gradients through it, unlike anything that a node does. All
that is recorded lies beside the file that is written in the end, and a fit that was killed goes on from there.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from fl_split.config import Task
from fl_split.data.fits import learned_positions
from fl_split.errors import ConfigError, DataError
from fl_split.malloc import give_back_freed
from fl_split.model.checkpoint import config_digest, resolve_model, weights_digest
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries
from fl_split.tools.fit.cost import Cost, say_time, time_step
from fl_split.tools.fit.folder import Fit, FitFolder, folder_of, save_tensors
from fl_split.tools.fit.lessons import load_teacher, record_lessons
from fl_split.tools.fit.moments import cut_layers
from fl_split.tools.fit.student import build, check_finite, make_thin, quality, train
from fl_split.tools.fit.text import read_text, sample_text

logger = logging.getLogger(__name__)

Card = dict[str, Any]

_CHECK_BATCHES = 8


def fit_model(model: tuple[str, str], ends: tuple[int, int], files: Sequence[Path], config: Fit, out: Path) -> Card:
    """`fit` from what a person types.

    Args:
        model: Name and revision.
        ends: Layers of bottom and top.
        files: Public text; without any, the model writes its own, which a fit that goes on finds again.
        config: How to fit.
        out: See `fit`.

    Raises:
        FLSplitError: Model, text or setting cannot be used.
    """
    _check(config)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name the file that is to be written")
    folder = resolve_model(*model)
    positions = learned_positions(AutoConfig.from_pretrained(folder))
    if positions and config.length > positions:
        raise ConfigError(
            f"--length {config.length} is beyond the {positions} positions that this model has: give fewer"
        )
    if files:
        return fit(folder, *ends, read_text(files, folder, config.length), config, out)
    if config.task != "causal-lm":
        raise ConfigError(f"--task {config.task}: a classifier writes no text of its own: give --text")
    count = max(2 * config.batch_size, min(4096, max(128, config.lessons * config.batch_size // 2)))
    written = folder_of(out) / f"text-{config.seed}-{count}x{config.length}.safetensors"
    if not written.exists():
        logger.info("the model writes %d texts of %d tokens ...", count, config.length)
        save_tensors(written, {"ids": sample_text(folder, count, config)})
    return fit(folder, *ends, load_file(written)["ids"], config, out)


def fit(folder: Path, bottom_layers: int, top_layers: int, text: Tensor, config: Fit, out: Path) -> Card:
    """Fit a surrogate to the trunk of the model in `folder` and write it to `out`, atomically.

    Args:
        folder: The whole checkpoint.
        bottom_layers: Layers before the trunk.
        top_layers: Layers after the trunk.
        text: Public token ids, ``[sequences, length]``; the last tenth only measures.
        config: How to fit.
        out: A safetensors file, to be given to the trunk.

    Returns:
        The card that the file carries: digests, layers, setting, gradient cosine and value error reached.

    Raises:
        SplitError: The model cannot be split here.
        ConfigError: The budget is too small or not below the trunk itself, or an unfinished fit of another
            setting is in the way.
        DataError: The text is too little for the size of a batch.
        TrainingError: The fit diverges; what was recorded is kept.
    """
    if len(text) < 2 * config.batch_size:
        raise DataError(
            f"{len(text)} sequences of public text are too few for --batch-size {config.batch_size}: give more text, "
            f"or --batch-size {len(text) // 2} at most; as many as a batch only measure"
        )
    model = AutoConfig.from_pretrained(folder)
    cut = Boundaries.of(examine(model, AutoModel), bottom_layers, top_layers)
    cost, budget = Cost.of(model, cut, config)
    cost.say(config.device, folder_of(out))
    about = {
        "model-type": model.model_type,
        "config-digest": config_digest(model),
        "weights-digest": weights_digest(folder, cut.layers_name, cut.trunk),
        "first-layer": cut.first,
        "end-layer": cut.end,
        "tokens-of-text": text.numel(),
        **{name.replace("_", "-"): value for name, value in asdict(config).items()},
    }
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    recorded = FitFolder(out, {**about, "text-digest": digest})
    num_checks = max(config.batch_size, min(len(text) // 10, _CHECK_BATCHES * config.batch_size))
    public, check = text[:-num_checks], text[-num_checks:]
    if not recorded.has("lessons-done"):
        step_s = time_step(model, folder, cut, budget, config)
        give_back_freed()
        teacher = load_teacher(folder, bottom_layers, top_layers, config)
        say_time(teacher, public, budget, config, step_s)
        cut_layers(teacher, public, budget, config, recorded)
        give_back_freed()
        record_lessons(teacher, public, check, config, recorded)
        del teacher
        give_back_freed()

    student = build(folder, cut, make_thin(budget, recorded), config.device)
    names = [f"check-{i}" for i in range(len(check) // config.batch_size)]
    before = quality(student, recorded, names, config.device)
    train(student, recorded, config)
    after = quality(student, recorded, names, config.device)
    check_finite(after, config.steps, config)
    card = {**about, "gradient-cosine-before": before[0], "gradient-cosine": after[0], "value-error": after[1]}
    layers = student.get_submodule(cut.layers_path)
    whole = [i for i in cut.trunk if i not in budget.shapes]
    tensors = {
        f"{i}.{name}": value.to(getattr(torch, config.dtype)) if i in whole else value
        for i in cut.trunk
        for name, value in layers.get_submodule(str(i)).state_dict().items()
    }
    save_tensors(out, tensors, card)
    recorded.close()
    return card


def _check(config: Fit) -> None:
    """Refuse what a person may have typed wrong.

    Raises:
        ConfigError: A task, a device or a dtype that is not there, or a rate that is none.
    """
    if not 0 < config.lr < math.inf:
        raise ConfigError(f"--lr {config.lr:g}: expected a number above 0")
    for key, value, known in (("task", config.task, get_args(Task)), ("dtype", config.dtype, ("float32", "bfloat16"))):
        if value not in known:
            raise ConfigError(f"--{key} {value!r}: expected {' or '.join(known)}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {config.device!r} is not here: expected 'cpu', or 'cuda' on a machine with a GPU"
        ) from error
