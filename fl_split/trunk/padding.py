"""A batch of requests -> forward passes -> each request's rows, blind to who shared the batch.

Data path: batch -> **padded hidden states -> layers -> rows per request** -> encoded reply.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_split.wire import Packed

_PADDING = 0.1  # of a forward pass, at most, before sequences of another length get a pass of their own
_PASS_TOKENS = 64  # what one more forward pass costs, about, in tokens

RunLayers = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Span:
    """One sequence: which request it is of, and its rows there."""

    request: int
    rows: slice

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.rows.stop - self.rows.start)


def passes(requests: Sequence[Packed]) -> Iterator[list[Span]]:
    """Arrange all sequences into forward passes: longest first, those of about the same length together.

    A pass ends where padding would exceed a tenth of it, if what it saves is more than what another pass costs.
    """
    sequences = []
    for i, packed in enumerate(requests):
        start = 0
        for length in packed.lengths:
            sequences.append(Span(i, slice(start, start + length)))
            start += length
    sequences.sort(key=lambda sequence: -sequence.length)
    current: list[Span] = []
    real = 0
    for i, sequence in enumerate(sequences):
        if current:
            longest = current[0].length
            padded = (len(current) + 1) * longest
            saved = (longest - sequence.length) * (len(sequences) - i)
            if padded - real - sequence.length > _PADDING * padded and saved > _PASS_TOKENS:
                yield current
                current, real = [], 0
        current.append(sequence)
        real += sequence.length
    yield current


def run_packed(run: RunLayers, requests: Sequence[Packed], *, causal: bool) -> tuple[list[Tensor], int]:
    """Run all sequences of all requests, padded as little as possible.

    Args:
        run: A trunk: hidden states ``[batch, seq, hidden]``, mask, position ids -> the same shape.
        requests: What to run.
        causal: No position looks at later ones: then padding on the right needs no mask.

    Returns:
        Output rows of each request, ``[sum(lengths), hidden]``, and the tokens computed, padding included.
    """
    same = len({packed.rows.dtype for packed in requests}) == 1
    dtype = requests[0].rows.dtype if same else torch.float32
    outputs = [torch.empty(packed.rows.shape, dtype=dtype) for packed in requests]
    num_computed = 0
    for sequences in passes(requests):
        longest = sequences[0].length
        hidden_states = torch.zeros(len(sequences), longest, outputs[0].shape[1], dtype=dtype)
        for i, sequence in enumerate(sequences):
            hidden_states[i, : sequence.length] = requests[sequence.request].rows[sequence.rows]
        positions = _positions(requests, sequences)
        ragged = sequences[-1].length < longest
        # Without a mask, transformers would take positions that do not count up for documents packed into one row.
        mask = _mask(sequences) if positions is not None or (ragged and not causal) else None
        out = run(hidden_states, mask, positions)
        for i, sequence in enumerate(sequences):
            outputs[sequence.request][sequence.rows] = out[i, : sequence.length]
        num_computed += len(sequences) * longest
    return outputs, num_computed


def _mask(sequences: Sequence[Span]) -> Tensor:
    lengths = torch.tensor([sequence.length for sequence in sequences])
    return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()


def _positions(requests: Sequence[Packed], sequences: Sequence[Span]) -> Tensor | None:
    """Make position ids ``[batch, seq]``, or None if every sequence counts from 0."""
    given = [requests[sequence.request].positions for sequence in sequences]
    if all(positions is None for positions in given):
        return None
    filled = torch.arange(sequences[0].length).repeat(len(sequences), 1)
    for row, sequence, positions in zip(filled, sequences, given, strict=True):
        if positions is not None:
            row[: sequence.length] = positions[sequence.rows]
            row[sequence.length :] = 0
    return filled


def is_causal(run: RunLayers, hidden_size: int) -> bool:
    """Whether outputs stay the same, bit for bit, when a later token changes; False also where rounding hides it."""
    hidden_states = torch.randn(1, 8, hidden_size, generator=torch.Generator().manual_seed(0))
    changed = hidden_states.clone()
    changed[:, -1] *= -3
    return torch.equal(run(hidden_states, None, None)[:, :-1], run(changed, None, None)[:, :-1])
