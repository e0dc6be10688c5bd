"""What is in a node's memory at once while it trains: one step on the meta device, which has shapes and no numbers.

Every tensor that the step makes is counted while it lives, in the forward pass and in the backward pass: what is kept
for backward, the logits and their gradients, and what a single operation needs for a moment. Not counted is what lies
within one operation, such as a matrix kernel's own buffers.
"""

import copy
import inspect
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import DynamicCache

from fl_split.config import RunConfig
from fl_split.model import adapters
from fl_split.model.ends import checkpoint_activations, stop_dropout
from fl_split.model.family import Anatomy, Hole
from fl_split.model.loading import Boundaries
from fl_split.model.loss import Batch, forward
from fl_split.model.streamed import StreamedLayer

_ATTENTION = "fl_split_live"  # stands in for a fused kernel on the meta device


def on_meta(config: PretrainedConfig, anatomy: Anatomy, dtype: torch.dtype) -> Any:
    """The whole model, without numbers."""
    config = copy.deepcopy(config)
    config._attn_implementation = _ATTENTION
    config.use_cache = True  # without a cache, the mask code looks at position values, which meta tensors lack
    stop_dropout(config)
    with torch.device("meta"):
        try:
            model = anatomy.model_class(config)
        except (ValueError, KeyError):  # a family whose attention is its own
            config._attn_implementation = "eager"
            model = anatomy.model_class(config)
    nn.Module.to(model, dtype)
    return model.requires_grad_(False)


def layers_of(model: Any, anatomy: Anatomy) -> nn.ModuleList:
    """The layers of a model from `on_meta`."""
    layers: nn.ModuleList = model.base_model.get_submodule(anatomy.layers_path)
    return layers


def key_value_bytes(model: Any, layers: range) -> int:
    """What one token's keys and values take in these layers of a model from `on_meta`; 0 if they keep anything else.

    The trunk finds out by trying whether it can offer generation at all: `key_values.bytes_per_token`.
    """
    cache, core, dtype = DynamicCache(), model.base_model, model.dtype
    name = "cache" if "cache" in inspect.signature(type(core).forward).parameters else "past_key_values"
    attention, core.config._attn_implementation = core.config._attn_implementation, "eager"  # some need the mask
    nn.Module.to(model, torch.bfloat16)  # the one that experts' kernels know on the meta device
    try:
        with torch.no_grad(), torch.device("meta"):
            width = core.get_input_embeddings().embedding_dim
            token = torch.zeros(1, 1, width, dtype=torch.bfloat16)  # ids would be looked at
            core(inputs_embeds=token, use_cache=True, **{name: cache})
        kept: Any = [cache.layers[i] for i in layers]
        return sum(int(layer.keys.numel() + layer.values.numel()) for layer in kept) * int(dtype.itemsize)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError):
        return 0
    finally:
        core.config._attn_implementation = attention
        nn.Module.to(model, dtype)


def step_on_meta(
    model: Any, anatomy: Anatomy, cut: Boundaries, kept: tuple[int, ...], run: RunConfig
) -> tuple[int, int]:
    """Bytes of adapters in training, and of all else that a step makes, at its peak.

    Args:
        model: From `on_meta`; mutated.
        anatomy: Of its family.
        cut: Where it is split.
        kept: The trunk's layers that the node keeps as its surrogate.
        run: Adapters and batches.

    Raises:
        SplitError: `train.activation-checkpointing` is asked of a family without it.
    """
    layers = layers_of(model, anatomy)
    for i in cut.trunk:
        if run.surrogate.kind == "streamed":
            layers[i] = StreamedLayer(layers[i], anatomy.as_tuple, partial(_weights, layers[i]))
        elif i not in kept:
            layers[i] = Hole(layers[i], anatomy.as_tuple)
    model.boundaries, model.head_modules = cut, anatomy.head if run.task == "sequence-classification" else ()
    if run.train.activation_checkpointing:
        checkpoint_activations(model)
        model.config.use_cache = False  # it would grow when a layer is run again
    with torch.device("meta"):
        adapted = adapters.attach(model, run.lora, train_bottom=run.surrogate.trains_bottom, seed=0).train()
        trained = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
        ids = torch.zeros((run.train.batch_size, run.data.max_length), dtype=torch.long)
        batch: Batch = {"input_ids": ids, "labels": ids[:, 0] if run.task == "sequence-classification" else ids}
        if run.train.activation_checkpointing:  # a mask spares it that look, but some families look at the mask
            batch["attention_mask"] = torch.ones_like(ids)
        live = Live(adapted, *(layer.shell for layer in layers if isinstance(layer, StreamedLayer)))
        waits: list[int] = []  # what a micro-batch holds while it waits for the trunk
        layers[cut.end].register_forward_pre_hook(lambda *_: waits.append(live.num_bytes))
        with live:
            forward(adapted, batch, num_targets=1)[0].backward()
    waiting = min(run.trunk.in_flight, run.train.accumulation) - 1
    return 4 * trained, live.peak + waiting * waits[0]


def _weights(layer: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active and not yet gone, each storage once."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = self.peak = 0
        self._known: dict[int, Any] = {
            t.untyped_storage()._cdata: None for m in modules for t in (*m.parameters(), *m.buffers())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone() -> None:
            del self._known[key]
            self.num_bytes -= size

        self._known[key] = weakref.finalize(storage, gone)
        self.num_bytes += size
        self.peak = max(self.peak, self.num_bytes)


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps, its inputs, output, and a number per row; makes three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        mask = query.new_empty(batch, 1, length, length)  # of a batch with padding, a copy in each layer
        rows = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, mask, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a padding mask, transformers repeats the heads of keys and values
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _Attention.apply(query, key, value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_ATTENTION, _attend)  # every family that can use a fused kernel can use this
