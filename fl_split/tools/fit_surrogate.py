"""`fl-split surrogate fit`: what the trunk's owner does once, so that every node's bottom learns well.

The owner has what a node lacks: the trunk's exact Jacobian, public text and time. It fits a *thin copy* of the whole
trunk, every linear a product of two thin matrices, worth k layers in memory and compute, whose gradient is the trunk's:

1. Record the second moments of the inputs and output gradients of each linear; start from their weighted SVD, with
   ranks from one budget over all linears.
2. Minimise ||J_S^T g - J_T^T g||^2 / ||J_T^T g||^2 + w ||S(h1) - h2||^2 / ||h2 - h1||^2 (Sobolev training, Czarnecki
   et al. 2017), with g = dL/dh2 of the model's own top and loss, at the base model and along simulated fine-tunings of
   its two ends, so that the match holds while the ends of the nodes move.

Only public text goes in. Needs the whole checkpoint and gradients through it, unlike anything that a node does.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fl_split.config import Lora
from fl_split.errors import ConfigError, DataError
from fl_split.model import adapters
from fl_split.model.checkpoint import config_digest, weights_digest
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries, boundaries_of
from fl_split.model.loss import IGNORED
from fl_split.model.thin import LowRank, linears, replace
from fl_split.model.trunk import load_trunk

logger = logging.getLogger(__name__)

# Flattening of the second moments: at 0 the SVD keeps what the recorded text needs, at infinity it is the plain one.
# The Jacobian meets every direction of the input, so its moment is flattened more.
_FLATTEN_INPUT, _FLATTEN_GRADIENT = 4.0, 0.3
_LEAST_RANK = 4
_VALUE_WEIGHT = 0.1
_RANDOM_TOKENS = 0.3  # of a sequence, in every other one
_TUNING_RATES = (6e-3, 8e-3, 1e-2, 1.2e-2)  # of the simulated fine-tunings, one each
_TUNING_STEPS = 200  # after which they begin anew, so that a long fit does not learn models that no node comes to
_MOMENT_BATCHES, _CHECK_BATCHES = 64, 8


@dataclass(frozen=True)
class Fit:
    """How to fit."""

    layers: float = 2.0  # memory and compute of the thin copy, in trunk layers
    steps: int = 3000
    batch_size: int = 8
    length: int = 96  # tokens per sequence
    lr: float = 2.5e-3
    seed: int = 0


def read_text(files: Sequence[Path], folder: Path, length: int) -> Tensor:
    """Public text as token ids, ``[sequences, length]``: all files one after the other, cut into full sequences.

    Raises:
        DataError: A file that is not text, or too little text in all.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as UTF-8 text ({type(error).__name__})") from error
        for paragraph in text.split("\n\n"):
            if paragraph.strip():
                ids += tokenizer.encode(paragraph.strip(), add_special_tokens=False)
                ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(ids) < 64 * length:
        raise DataError(f"{len(ids)} tokens of public text are too few to fit a surrogate: give at least {64 * length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def sample_text(folder: Path, num_sequences: int, length: int, seed: int = 0) -> Tensor:
    """Text that the model itself writes, as token ids ``[num_sequences, length]``: public text when there is none.

    Sampled at temperature 1 from the start token, so that it is spread like the text that the model was trained on.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    if start is None:
        raise ConfigError(f"{folder} names no start or end token to sample text from: give --text")
    unused = (start + 1) % model.config.vocab_size  # nothing is padded: without an end token all have full length
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length - 1, pad_token_id=unused
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = [
            model.generate(torch.full((min(128, num_sequences - i), 1), start)) for i in range(0, num_sequences, 128)
        ]
    return torch.cat(parts)


def fit(folder: Path, bottom_layers: int, top_layers: int, text: Tensor, config: Fit, out: Path) -> dict[str, Any]:
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
        ConfigError: The budget is too small or not below the trunk itself.
    """
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    full.config.use_cache = False
    anatomy = examine(full.config)
    cut = full.boundaries = Boundaries.of(anatomy, bottom_layers, top_layers)
    student = load_trunk(folder, bottom_layers, top_layers)
    student.set_attn_implementation("eager")  # fused attention kernels have no second derivative
    num_check = max(config.batch_size, min(len(text) // 10, _CHECK_BATCHES * config.batch_size))
    public, check = text[:-num_check], text[-num_check:]

    ranks = make_thin(student, moments(full, cut, public, config), config)
    logger.info("thin copy of layers %d to %d: ranks %d to %d", cut.first, cut.end - 1, min(ranks), max(ranks))
    checks = list(_checks(full, check, config))
    before = quality(student, checks)
    _sobolev(student, _teach(full, public, config), config)
    after = quality(student, checks)
    card = {
        "model-type": full.config.model_type,
        "config-digest": config_digest(full.config),
        "weights-digest": weights_digest(folder, cut.layers_name, cut.trunk),
        "first-layer": cut.first,
        "end-layer": cut.end,
        "tokens-of-text": text.numel(),
        **{name.replace("_", "-"): value for name, value in asdict(config).items()},
        "gradient-cosine-before": before[0],
        "gradient-cosine": after[0],
        "value-error": after[1],
    }
    _write(student, cut, card, out)
    return card


def _write(student: PreTrainedModel, cut: Boundaries, card: dict[str, Any], out: Path) -> None:
    layers = student.get_submodule(cut.layers_path)
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i in cut.trunk
        for name, value in layers.get_submodule(str(i)).state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    save_file(tensors, unfinished, {"card": json.dumps(card)})
    unfinished.replace(out)


# --------------------------------------------------------------------------------------------- the trunk as teacher


@dataclass(frozen=True)
class Lesson:
    """What the trunk did to one batch: h1, h2, dL/dh2 and dL/dh1, ``[batch, seq, hidden]`` each."""

    h1: Tensor
    h2: Tensor
    g2: Tensor
    g1: Tensor


@contextmanager
def _taps(model: nn.Module, cut: Boundaries) -> Iterator[dict[str, Tensor]]:
    """Hold on to what goes into the trunk and what comes out of it, with its graph."""
    base = cast(PreTrainedModel, model).base_model
    layers = base.get_submodule(cut.layers_path)
    seen: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen[name] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (seen[name], *args[1:])

        return hook

    places = {"h1": cut.first, "h2": cut.end}
    hooks = [layers.get_submodule(str(i)).register_forward_pre_hook(tap(name)) for name, i in places.items()]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def observe(
    model: nn.Module, cut: Boundaries, ids: Tensor, labels: Tensor, trained: Sequence[nn.Parameter] = ()
) -> Lesson:
    """One forward and backward through the full model; leaves the gradients of `trained` in them."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    with _taps(whole, cut) as seen, torch.enable_grad():
        loss = model(input_ids=ids, labels=labels).loss
        g1, g2, *rest = torch.autograd.grad(loss, [seen["h1"], seen["h2"], *trained])
    for parameter, gradient in zip(trained, rest, strict=True):
        parameter.grad = gradient
    return Lesson(seen["h1"].detach(), seen["h2"].detach(), g2, g1)


def _batches(
    text: Tensor, size: int, generator: torch.Generator, vocab_size: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw token ids and labels without end, ``[size, length]`` each.

    In half of the sequences a random prefix counts for nothing, like a prompt. With `vocab_size`, a part of the tokens
    of every other sequence is random: private text surprises the model more than public text does, and a match on
    unsurprising text alone does not carry over to it.
    """
    while True:
        order = torch.randperm(len(text), generator=generator)
        for i in range(0, len(order) - size + 1, size):
            ids = text[order[i : i + size]]
            prompt = torch.randint(1, max(2, ids.shape[1] * 2 // 5), (size, 1), generator=generator)
            prompt *= torch.randint(0, 2, (size, 1), generator=generator)
            if vocab_size:
                random = torch.rand(ids.shape, generator=generator) < _RANDOM_TOKENS
                random &= torch.rand(size, 1, generator=generator) < 0.5
                ids = torch.where(random, torch.randint(vocab_size, ids.shape, generator=generator), ids)
            yield ids, ids.masked_fill(torch.arange(ids.shape[1])[None] < prompt, IGNORED)


def _teach(full: PreTrainedModel, text: Tensor, config: Fit) -> Iterator[Lesson]:
    """Give lessons without end: one from the base model, one from a simulated fine-tuning of its ends, in turn."""
    generator = torch.Generator().manual_seed(config.seed)
    model = adapters.attach(full, Lora(), train_bottom=True, seed=config.seed)
    parts = text.tensor_split(len(_TUNING_RATES))  # each fine-tuning has text of its own, as an institution has
    base_batches = _batches(text, config.batch_size, generator, full.config.vocab_size)
    cut = boundaries_of(full)
    for cycle in count():
        runs = []
        model.set_adapter("default")
        for i, (rate, part) in enumerate(zip(_TUNING_RATES, parts, strict=True)):
            name = f"run{i}"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + i + len(parts) * cycle)
                if cycle:
                    model.delete_adapter(name)
                model.add_adapter(name, model.peft_config["default"])
            trained = [p for key, p in model.named_parameters() if f".{name}." in key]
            optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
            runs.append((name, trained, optimizer, _batches(part, min(config.batch_size, len(part)), generator)))
        for _ in range(_TUNING_STEPS):
            for name, trained, optimizer, batches in runs:
                with model.disable_adapter():
                    yield observe(model, cut, *next(base_batches))
                model.set_adapter(name)
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield observe(model, cut, *next(batches), trained)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()


def _checks(full: PreTrainedModel, text: Tensor, config: Fit) -> Iterator[Lesson]:
    batches = _batches(text, config.batch_size, torch.Generator().manual_seed(config.seed + 1))
    for _ in range(len(text) // config.batch_size):
        yield observe(full, boundaries_of(full), *next(batches))


# ----------------------------------------------------------------------------------------------------- the start

Moments = dict[tuple[int, str], tuple[Tensor, Tensor]]


def moments(full: PreTrainedModel, cut: Boundaries, text: Tensor, config: Fit) -> Moments:
    """E[x x^T] and E[g g^T] of each of the trunk's linears, ``[in, in]`` and ``[out, out]``, by layer and name."""
    layers = full.base_model.get_submodule(cut.layers_path)
    sums: dict[tuple[int, str], list[Tensor]] = {}

    def listen(key: tuple[int, str]) -> Any:
        def add(place: int, rows: Tensor) -> None:
            rows = rows.detach().flatten(0, -2).float()
            square = rows.T @ rows
            both = sums.setdefault(key, [torch.zeros(()), torch.zeros(())])
            both[place] = both[place] + square

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            add(0, args[0])
            out.register_hook(lambda gradient: add(1, gradient))

        return hook

    handles = [
        module.register_forward_hook(listen((i, name)))
        for i in cut.trunk
        for name, module in linears(layers.get_submodule(str(i))).items()
    ]
    generator = torch.Generator().manual_seed(config.seed)
    batches = _batches(text, config.batch_size, generator, full.config.vocab_size)
    for _ in range(min(_MOMENT_BATCHES, max(1, len(text) // config.batch_size))):
        observe(full, cut, *next(batches))
    for handle in handles:
        handle.remove()
    return {key: (x, g) for key, (x, g) in sums.items()}


def make_thin(student: PreTrainedModel, recorded: Moments, config: Fit) -> list[int]:
    """Replace a trunk's linears by products of thin matrices, in place; returns their ranks.

    Which singular directions stay is decided over all linears at once, by the energy E[(g^T dW x)^2] that a direction
    carries per parameter.

    Raises:
        ConfigError: The budget does not lie between the smallest thin copy and the trunk itself.
    """
    cut = boundaries_of(student)
    layers = [student.get_submodule(cut.layers_path).get_submodule(str(i)) for i in cut.trunk]
    found = {(i, name): m for i, layer in zip(cut.trunk, layers, strict=True) for name, m in linears(layer).items()}
    budget = _budget(layers, student.config.hidden_size, config)
    cuts: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    bids: list[tuple[float, int, tuple[int, str]]] = []
    for key, module in found.items():
        weight = _weight(module)
        x, x_inverse = _root(recorded[key][0], _FLATTEN_INPUT)
        g, g_inverse = _root(recorded[key][1], _FLATTEN_GRADIENT)
        u, s, v = torch.linalg.svd(g @ weight @ x, full_matrices=False)
        root = s.sqrt()
        cuts[key] = (root[:, None] * (v @ x_inverse), (g_inverse @ u) * root)
        energy = s.square() * recorded[key][0].diagonal().mean() * recorded[key][1].diagonal().mean()
        cost = sum(weight.shape)
        bids += [(math.inf if r < _LEAST_RANK else e / cost, cost, key) for r, e in enumerate(energy.tolist())]
    ranks, left = dict.fromkeys(found, 0), budget
    for value, cost, key in sorted(bids, key=lambda bid: -bid[0]):
        if cost <= left or value == math.inf:
            ranks[key], left = ranks[key] + 1, left - cost
    if left < 0:
        raise ConfigError(f"--layers {config.layers:g} is too small for a thin copy of {len(layers)} layers: give more")
    for (i, name), module in found.items():
        a, b = cuts[i, name]
        bias = getattr(module, "bias", None)
        kept = LowRank(
            a[: ranks[i, name]].clone(), b[:, : ranks[i, name]].clone(), None if bias is None else bias.detach()
        )
        replace(layers[i - cut.first], name, kept)
    for layer in layers:
        layer.requires_grad_(True)
    return list(ranks.values())


def _budget(layers: list[nn.Module], hidden_size: int, config: Fit) -> float:
    """Count the parameters that the products may have in all, so that the thin copy costs `config.layers` layers.

    Memory: norms and biases of every layer are paid for. Compute: so are the attention scores of the layers above the
    budget, causal, at the sequences' length: (length + 1) * hidden multiplications per token and layer.
    """
    if not 0 < config.layers < len(layers):
        raise ConfigError(f"--layers {config.layers:g}: expected more than 0 and less than the trunk's {len(layers)}")
    size = sum(p.numel() for layer in layers for p in layer.parameters())
    matrices = sum(_weight(m).numel() for layer in layers for m in linears(layer).values())
    attention = (len(layers) - config.layers) * (config.length + 1) * hidden_size
    return config.layers * size / len(layers) - (size - matrices) - attention


def _weight(module: nn.Module) -> Tensor:
    """Take a linear's matrix, ``[out, in]`` in float32, whatever its class."""
    weight = cast(Tensor, module.weight).detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


def _root(moment: Tensor, flatten: float) -> tuple[Tensor, Tensor]:
    """Take square root and inverse square root of a second moment, brought towards the identity by `flatten`."""
    scaled = moment / moment.diagonal().mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(scaled + flatten * torch.eye(len(moment)))
    values = values.clamp_min(1e-8).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


# ------------------------------------------------------------------------------------------------------- the fit


def _sobolev(student: PreTrainedModel, lessons: Iterator[Lesson], config: Fit) -> None:
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(config.steps):
        warm = min(1.0, (step + 1) / 30)
        rate = config.lr * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / config.steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        gradient_error, value_error = _errors(student, next(lessons))
        optimizer.zero_grad()
        (gradient_error + _VALUE_WEIGHT * value_error).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == config.steps - 1:
            logger.info("step %d: gradient error %.3f, value error %.3f", step, gradient_error, value_error)


def _errors(student: PreTrainedModel, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Measure gradient error (mean over sequences, each scaled to the same size) and value error."""
    scale = 1 / lesson.g1.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    h1 = lesson.h1.clone().requires_grad_()
    out = student(inputs_embeds=h1)[0]
    (pulled,) = torch.autograd.grad(out, h1, lesson.g2 * scale, create_graph=True)
    gradient_error = (pulled - lesson.g1 * scale).square().sum() / len(h1)
    value_error = (out - lesson.h2).square().sum() / (lesson.h1 - lesson.h2).square().sum()
    return gradient_error, value_error


def quality(student: PreTrainedModel, lessons: Sequence[Lesson]) -> tuple[float, float]:
    """Mean cosine of J_S^T g with J_T^T g per sequence, and value error, over lessons that were not trained on."""
    cosines, errors = [], []
    for lesson in lessons:
        h1 = lesson.h1.clone().requires_grad_()
        out = student(inputs_embeds=h1)[0]
        (pulled,) = torch.autograd.grad(out, h1, lesson.g2)
        cosines.append(torch.cosine_similarity(pulled.flatten(1), lesson.g1.flatten(1), dim=1).mean())
        errors.append((out.detach() - lesson.h2).square().sum() / (lesson.h1 - lesson.h2).square().sum())
    return torch.stack(cosines).mean().item(), torch.stack(errors).mean().item()
