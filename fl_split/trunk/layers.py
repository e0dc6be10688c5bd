"""The layers that a trunk serves, loaded and described."""

import hashlib
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.distributed.configuration_utils import DistributedConfig

from fl_split import __version__, wire
from fl_split.errors import ConfigError
from fl_split.malloc import give_back_freed
from fl_split.model.checkpoint import config_digest, resolve_model, trunk_needs, weights_digest
from fl_split.model.loading import boundaries_of
from fl_split.model.trunk import load_trunk, run_trunk
from fl_split.proto import trunk_pb2 as pb
from fl_split.trunk.config import Batching, Limits, TrunkModel
from fl_split.trunk.padding import is_causal

logger = logging.getLogger(__name__)

_LENGTH_BOUND_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class HeldLayers:
    """A loaded trunk and what it says of itself."""

    model: PreTrainedModel
    identity: pb.DescribeReply  # without limits, which are the server's
    causal: bool  # no position looks at later ones

    @property
    def hidden_size(self) -> int:
        """Width of a token's hidden state."""
        return self.identity.hidden_size

    def run(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Run the layers over ``[batch, seq, hidden]``; see `model.trunk.run_trunk`."""
        return run_trunk(self.model, hidden_states, attention_mask, position_ids)

    def describe(self, limits: Limits) -> pb.DescribeReply:
        """The reply to Describe."""
        reply = pb.DescribeReply()
        reply.CopyFrom(self.identity)
        own = getattr(self.model.config, "max_position_embeddings", None) or limits.max_tokens
        reply.max_sequence_length = min(limits.max_sequence_length or own, own, limits.max_tokens)
        reply.max_tokens = limits.max_tokens
        # A token: 4 bytes a channel, its position, and if it is a sequence of its own, a length.
        reply.max_message_bytes = limits.max_tokens * (4 * self.hidden_size + 16) + 4096
        return reply

    def allowed(self, batching: Batching) -> Batching:
        """`batching`, but without sharing for models whose result depends on the rest of a batch."""
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
        if kinds & set(_LENGTH_BOUND_ROPE):
            logger.warning("batching is off: this model's %s rotary tables depend on the longest sequence", kinds)
        elif self.identity.quantization == "bitsandbytes-8bit":  # LLM.int8() finds its outliers over the whole batch
            logger.warning("batching is off: with bitsandbytes-8bit a result depends on who shares the batch")
        else:
            return batching
        return batching.model_copy(update={"enabled": False})


def hold_layers(
    folder: Path,
    bottom_layers: int,
    top_layers: int,
    dtype: torch.dtype = torch.float32,
    quantization: str = "",
    **options: Any,
) -> HeldLayers:
    """Load the layers between the ends of the model in `folder`, ready to be served.

    Args:
        folder: The full model's checkpoint.
        bottom_layers: Layers that nodes hold before the trunk.
        top_layers: Layers that nodes hold after it.
        dtype: Of weights and computation.
        quantization: Of the weights, as in `model.quantization`.
        options: For transformers' `from_pretrained`, such as ``device_map``.

    Raises:
        ConfigError: The package for the quantization is missing, or it leaves this model as it is.
        SplitError: See `model.trunk.load_trunk`.
    """
    if quantization:
        options["quantization_config"] = _quantization(quantization, dtype)
    model = load_trunk(folder, bottom_layers, top_layers, dtype=dtype, **options)
    if quantization:
        _check_quantized(model, quantization)
        give_back_freed()  # what the weights were made of
    config = AutoConfig.from_pretrained(folder)  # the model's own may have gained a quantization
    cut = boundaries_of(model)
    reply = pb.DescribeReply(
        config_digest=config_digest(config),
        weights_digest=weights_digest(folder, cut.layers_name, cut.trunk),
        model_type=config.model_type,
        first_layer=cut.first,
        end_layer=cut.end,
        hidden_size=config.hidden_size,
        dtypes=list(wire.NAMES.values()),
        version=__version__,
        compute_dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
    )
    reply.trunk_id = trunk_id(reply)
    causal = is_causal(lambda *args: run_trunk(model, *args), config.hidden_size)
    return HeldLayers(model, reply, causal)


def trunk_id(reply: pb.DescribeReply) -> bytes:
    """16 bytes that are the same for replicas of one trunk, and for nothing else: layers, weights and precision."""
    layers = (reply.config_digest, reply.weights_digest, reply.first_layer, reply.end_layer)
    fields = (*layers, reply.compute_dtype, reply.quantization)
    return hashlib.sha256("|".join(map(str, fields)).encode()).digest()[:16]


def hold_configured(config: TrunkModel) -> HeldLayers:
    """Load what a configuration names, on the devices that it names.

    Raises:
        ConfigError: There is no such model, or a package for `model.quantization` is missing.
        SplitError: See `model.trunk.load_trunk`.
    """
    torch.set_num_threads(config.threads or num_cpus())
    options: dict[str, Any] = {}
    device_map = config.device_map or ("cuda:0" if torch.cuda.is_available() else "")
    if config.tensor_parallel:
        options["distributed_config"] = DistributedConfig(tp_size=num_ranks())
    elif device_map:
        options["device_map"] = device_map
    if config.quantization:
        options["quantization"] = config.quantization
    needs = trunk_needs(config.bottom_layers, config.top_layers)
    folder = resolve_model(config.name, config.revision, needs)
    try:
        held = hold_layers(folder, config.bottom_layers, config.top_layers, getattr(torch, config.dtype), **options)
    except ImportError as error:
        raise ConfigError(
            f"model.device-map={device_map!r} or model.quantization={config.quantization!r} needs a package that is "
            f"not installed: {str(error).splitlines()[0]}"
        ) from error
    if config.compile:
        held.model.compile(dynamic=True)
    return held


def _quantization(name: str, dtype: torch.dtype) -> Any:
    """Make the `quantization_config` for transformers; the packages behind it are optional."""
    module, needed = ("torchao.quantization", "torchao") if name == "torchao-int8" else ("bitsandbytes", "bitsandbytes")
    try:
        package: Any = import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"model.quantization={name!r} needs the package {needed}: install it, or leave the key out"
        ) from error
    if name == "torchao-int8":
        return TorchAoConfig(package.Int8WeightOnlyConfig())
    bits: dict[str, Any] = {"load_in_8bit": True}
    if name == "bitsandbytes-4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    # It tells of a cast in each layer of each call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**bits)


def _check_quantized(model: PreTrainedModel, name: str) -> None:
    """Say which matrices a quantizer left as they were: it may know only some kinds of layers."""
    plain = sum(p.numel() for p in model.parameters() if type(p) is torch.nn.Parameter and p.dim() > 1)
    quantized = sum(p.nbytes for p in model.parameters() if type(p) is not torch.nn.Parameter)
    if not quantized:
        raise ConfigError(
            f"model.quantization={name!r} leaves the weights of {model.config.model_type} as they are: try "
            "'bitsandbytes-8bit' or 'bitsandbytes-4bit', or leave the key out"
        )
    if plain > quantized:
        logger.warning(
            "model.quantization=%s: %d MB are quantized, %d million weights, such as those of experts, are not",
            name,
            quantized // 10**6,
            plain // 10**6,
        )


def num_ranks() -> int:
    """Processes that torchrun started for this trunk.

    Raises:
        ConfigError: There is no torchrun around this process.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "model.tensor-parallel=true needs several processes: start it with 'torchrun --nproc-per-node N "
            "--no-python fl-split trunk serve ...', or set model.tensor-parallel=false"
        )
    return int(os.environ["WORLD_SIZE"])


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
