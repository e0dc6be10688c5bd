"""The whole model as teacher: what its trunk does, recorded once, at the base model and while its ends train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from fl_split.config import Lora
from fl_split.model import adapters
from fl_split.model.ends import stop_dropout
from fl_split.model.family import auto_class, examine
from fl_split.model.loading import Boundaries, boundaries_of
from fl_split.tools.fit.folder import Fit, FitFolder, Saved, Stage
from fl_split.tools.fit.text import draw, question

_TUNING_RATES = (6e-3, 8e-3, 1e-2, 1.2e-2)  # of the simulated fine-tunings, in turn
_TUNING_STEPS = 200  # of each at most, so that many lessons do not come from models that no node comes to
# Of the median's norm: a token that the model never saw may be all but 0, and in every layer the gradient of its norm
# is then a thousand times as large.
_LEAST_EMBEDDING = 0.1


@dataclass(frozen=True)
class Lesson:
    """What the trunk did to one batch: h1, h2, dL/dh2 and dL/dh1, ``[batch, seq, hidden]`` each."""

    h1: Tensor
    h2: Tensor
    g2: Tensor
    g1: Tensor

    @classmethod
    def read(cls, folder: FitFolder, name: str, device: str) -> "Lesson":
        """A recorded one, in float32."""
        return cls(**{key: tensor.to(device, torch.float32) for key, tensor in folder.load(name).items()})


def load_teacher(folder: Path, bottom_layers: int, top_layers: int, fit: Fit) -> PreTrainedModel:
    """The whole model, frozen, with the attributes of a node's ends.

    A classifier's head is a new one, since that is what nodes begin with.

    Raises:
        SplitError: The model cannot be split here.
    """
    auto = auto_class(fit.task)
    config = AutoConfig.from_pretrained(folder)
    stop_dropout(config)
    anatomy = examine(config, auto)
    cut = Boundaries.of(anatomy, bottom_layers, top_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        model = auto.from_pretrained(folder, config=config, dtype=getattr(torch, fit.dtype))
    model.requires_grad_(False).eval()
    nn.Module.to(model, fit.device)
    model.config.use_cache = False
    model.config.pad_token_id = -1  # no token of the text is padding
    model.boundaries, model.head_modules = cut, anatomy.head if fit.task == "sequence-classification" else ()
    return cast(PreTrainedModel, model)


@dataclass(frozen=True)
class LayerCall:
    """What a layer was called with."""

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def tapped(model: nn.Module, at: Sequence[int], gradient_from: int) -> Iterator[dict[int, LayerCall]]:
    """Hold on to what goes into some layers of a whole model; a graph begins at one of them, if not before."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = cast(PreTrainedModel, whole).base_model.get_submodule(boundaries_of(whole).layers_path)
    seen: dict[int, LayerCall] = {}

    def tap(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden_states = args[0]
            if i == gradient_from and not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()
            seen[i] = LayerCall(hidden_states, args[1:], kwargs)
            return (hidden_states, *args[1:]), kwargs

        return hook

    hooks = [layers.get_submodule(str(i)).register_forward_pre_hook(tap(i), with_kwargs=True) for i in at]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def observe(
    model: nn.Module, cut: Boundaries, ids: Tensor, labels: Tensor, trained: Sequence[nn.Parameter] = ()
) -> Lesson:
    """One forward and backward through the full model; leaves the gradients of `trained` in them."""
    with tapped(model, (cut.first, cut.end), cut.first) as seen, torch.enable_grad():
        loss = model(input_ids=ids, labels=labels).loss
        h1, h2 = seen[cut.first].hidden_states, seen[cut.end].hidden_states
        g1, g2, *rest = torch.autograd.grad(loss, [h1, h2, *trained])
    for parameter, gradient in zip(trained, rest, strict=True):
        parameter.grad = gradient
    return Lesson(h1.detach(), h2.detach(), g2, g1)


class Batches:
    """Batches for the teacher, on its device; those of a classifier have labels that its text answers."""

    def __init__(self, teacher: PreTrainedModel, fit: Fit) -> None:
        self._fit, self._config = fit, teacher.config
        embeddings = cast(Tensor, teacher.get_input_embeddings().weight)
        norms = embeddings.float().norm(dim=1).cpu()
        self._tokens = (norms > _LEAST_EMBEDDING * norms.median()).nonzero().flatten()

    def draw(self, text: Tensor, number: int, stream: int, *, random_tokens: bool = False) -> tuple[Tensor, Tensor]:
        """Batch `number` of one of several streams: token ids and labels; see `text.draw`."""
        fit, size, vocab = self._fit, min(self._fit.batch_size, len(text)), self._config.vocab_size
        ids, labels = draw(text, size, number, fit.seed + stream, self._tokens if random_tokens else None)
        if fit.task == "sequence-classification":
            labels = question(ids, cast(int, self._config.num_labels), vocab, fit.seed, stream)
        return ids.to(fit.device), labels.to(fit.device)


def record_lessons(teacher: PreTrainedModel, public: Tensor, check: Tensor, fit: Fit, folder: FitFolder) -> None:
    """Record what the fit learns from and is checked with; goes on where it was.

    Lessons come in pairs: one from the base model, one from a simulated fine-tuning of its ends, which then makes a
    step. The teacher gets adapters.
    """
    batches, cut = Batches(teacher, fit), boundaries_of(teacher)
    for i in range(len(check) // fit.batch_size):
        if not folder.has(f"check-{i}"):
            folder.save(f"check-{i}", vars(observe(teacher, cut, *batches.draw(check, i, -1))))
    num_pairs = (fit.lessons + 1) // 2
    num_runs = max(len(_TUNING_RATES), -(-num_pairs // _TUNING_STEPS))
    per_run = -(-num_pairs // num_runs)
    model = adapters.attach(teacher, Lora(), train_bottom=True, seed=fit.seed)
    untrained = adapters.adapter_state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = public.tensor_split(len(_TUNING_RATES))  # each fine-tuning has text of its own, as an institution has
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    saved = Saved(folder, "tuning", trained, optimizer)
    begin = saved.load()
    progress = Stage("lessons", 2 * num_pairs, 2 * begin)
    for pair in range(begin, num_pairs):
        run, step = divmod(pair, per_run)
        if step == 0:
            anew = adapters.fresh_state(adapters.adapter_shapes(model), fit.seed + run)
            adapters.load_adapter_state(model, {**untrained, **anew})
            optimizer.state.clear()
        with model.disable_adapter():
            lesson = observe(model, cut, *batches.draw(public, pair, 0, random_tokens=True))
        folder.save(f"lesson-{2 * pair}", vars(lesson))
        which = run % len(parts)
        optimizer.param_groups[0]["lr"] = _TUNING_RATES[which]
        lesson = observe(model, cut, *batches.draw(parts[which], step, 1 + run), trained)
        folder.save(f"lesson-{2 * pair + 1}", vars(lesson))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        saved.save(pair + 1)
        progress.step(2 * pair + 2)
    folder.save("lessons-done", {"count": torch.tensor(2 * num_pairs)})
