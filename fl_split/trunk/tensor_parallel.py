"""One trunk over several processes, by transformers' tensor parallelism: rank 0 serves, the others compute along.

    torchrun --nproc-per-node 4 --no-python fl-split trunk serve --config trunk.toml --set model.tensor-parallel=true

Every rank runs each forward pass on the same input; rank 0 hands it out.
"""

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fl_split.trunk.layers import HeldLayers

_DTYPES = (torch.float32, torch.bfloat16)
_HEADER = 7  # integers: go on?, batch, seq, hidden, dtype, is there a mask?, are there positions?


@dataclass(frozen=True)
class SharedLayers(HeldLayers):
    """Rank 0's view: each forward pass is one of all ranks."""

    def run(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """As `HeldLayers.run`."""
        _hand_out(hidden_states, attention_mask, position_ids)
        return super().run(hidden_states, attention_mask, position_ids)


def follow(held: HeldLayers) -> None:
    """On the other ranks: compute along until rank 0 stops; SIGTERM, which torchrun sends to all, is its matter."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while (given := _receive()) is not None:
        held.run(*given)


def end() -> None:
    """On rank 0: let the others stop."""
    dist.broadcast(torch.zeros(_HEADER, dtype=torch.long, device=_device()), src=0)
    dist.destroy_process_group()


def _hand_out(hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    flags = (attention_mask is not None, position_ids is not None)
    header = [1, *hidden_states.shape, _DTYPES.index(hidden_states.dtype), *map(int, flags)]
    dist.broadcast(torch.tensor(header, device=_device()), src=0)
    for value in (hidden_states, attention_mask, position_ids):
        if value is not None:
            dist.broadcast(value.to(_device()).contiguous(), src=0)


def _receive() -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    header = torch.zeros(_HEADER, dtype=torch.long, device=_device())
    dist.broadcast(header, src=0)
    go, batch, seq, hidden_size, dtype, has_mask, has_positions = header.tolist()
    if not go:
        dist.destroy_process_group()
        return None

    def receive(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        value = torch.empty(shape, dtype=dtype, device=_device())
        dist.broadcast(value, src=0)
        return value

    hidden_states = receive(batch, seq, hidden_size, dtype=_DTYPES[dtype])
    mask = receive(batch, seq) if has_mask else None
    return hidden_states, mask, receive(batch, seq) if has_positions else None


def _device() -> torch.device:
    """Tell where the process group's backend wants tensors."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
