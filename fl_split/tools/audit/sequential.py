"""The attack in sequence: candidates run after what was read so far, and the nearest wins.

Through the bottom a hidden state depends on what precedes it, so that with the right beginning the right token gives it
exactly, up to the rounding of the wire. Candidates come from the reading in one shot; where none fits, the list widens
up to the whole vocabulary. Where the bottom has an unknown adapter, its drift is estimated first, as a linear map from
the base's hidden states. Where noise was added, its likelihood and the base model's next-token probabilities decide
together, with a beam (Bayes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from fl_split import wire
from fl_split.tools.audit.bottom import Bottom, with_cache
from fl_split.tools.audit.oneshot import Readings, noise_variance, ridge, spread, with_one

_SURE = 2.0  # times the wire's largest rounding: nearer than that is the token itself
_DRIFT_RIDGE = 0.03


class Metric(Protocol):
    """How well candidates explain what was observed."""

    @property
    def enough(self) -> float:
        """A score above which no other candidate need be looked at."""

    def __call__(self, observed: Tensor, hidden: Tensor, place: int) -> Tensor:
        """``[rows, 1, hidden]``, ``[rows, ways, hidden]``, position -> log-likelihoods ``[rows, ways]``."""


@dataclass(frozen=True)
class Exact:
    """Nothing but the wire's rounding lies between the two."""

    rounding: float  # relative, at most

    @property
    def enough(self) -> float:
        """The score of the largest rounding."""
        return -((_SURE * self.rounding) ** 2)

    def __call__(self, observed: Tensor, hidden: Tensor, place: int) -> Tensor:
        """Minus the square of the relative distance."""
        return -(observed - hidden).square().sum(-1) / observed.square().sum(-1)


@dataclass(frozen=True)
class Nearest:
    """By plain distance, and nothing is good enough to tell."""

    enough: float = -torch.inf

    def __call__(self, observed: Tensor, hidden: Tensor, place: int) -> Tensor:
        """Minus the square of the distance."""
        return -(observed - hidden).square().sum(-1)


@dataclass(frozen=True)
class Noisy:
    """Gaussian noise of a known size relative to the hidden state."""

    noise: float
    enough: float = -torch.inf

    def __call__(self, observed: Tensor, hidden: Tensor, place: int) -> Tensor:
        """The noise's log-likelihood."""
        return -0.5 * (observed - hidden).square().sum(-1) / noise_variance(observed, self.noise)[..., 0]


@dataclass(frozen=True)
class Drifted:
    """An unknown adapter, as a linear map with what it leaves over."""

    weight: Tensor
    axes: Tensor
    variances: Tensor
    enough: float = -torch.inf

    @classmethod
    def fit(cls, base: Tensor, observed: Tensor) -> "Drifted":
        """From pairs of rows ``[tokens, hidden]``: what the base makes of tokens as read, and what was observed."""
        weight = ridge(with_one(base), observed - base, _DRIFT_RIDGE)
        axes, variances = spread(observed - base - with_one(base) @ weight)
        return cls(weight, axes, variances)

    def __call__(self, observed: Tensor, hidden: Tensor, place: int) -> Tensor:
        """Log-likelihood; at the first position, whose hidden states are of another kind, by plain distance."""
        if place == 0:
            return Nearest()(observed, hidden, place)
        moved = hidden + hidden @ self.weight[:-1] + self.weight[-1]
        return -0.5 * (((observed - moved) @ self.axes).square() / self.variances).sum(-1)


class Prior:
    """The whole base model's probability of the next token."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.start()

    def start(self) -> None:
        """Forget what was read."""
        self._cache, self._next = DynamicCache(config=self._model.config), torch.zeros(1, 1)

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities of candidates ``[rows, ways]`` after what was read; 0 before anything was."""
        return self._next.gather(1, ids) if self._next.shape[1] > 1 else torch.zeros(ids.shape)

    @torch.inference_mode()
    def go_on(self, parents: Tensor, ids: Tensor) -> None:
        """Take tokens ``[rows]``, each after the row that it comes from."""
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(parents)
        logits = self._model(input_ids=ids[:, None], **with_cache(self._model, self._cache)).logits
        self._next = logits[:, -1].log_softmax(-1)

    @torch.inference_mode()
    def guesses(self, ids: list[list[int]]) -> list[Tensor]:
        """What it would guess after each right beginning: ``[length - 1]`` each."""
        return [self._model(input_ids=torch.tensor([row])).logits[0, :-1].argmax(-1) for row in ids]


def rounding(rows: Tensor, wire_dtype: str) -> float:
    """The largest relative error that the wire makes of rows ``[tokens, hidden]``."""
    dtype = wire.NAMES[wire_dtype]
    data, outliers = wire.encode_rows(rows, dtype)
    arrived = wire.decode_rows(data, dtype, outliers, *rows.shape).float()
    return max(1e-5, float(((arrived - rows).norm(dim=1) / rows.norm(dim=1)).max()))  # 1e-5: of float32 arithmetic


def read_in_sequence(
    bottom: Bottom,
    sequences: Sequence[Tensor],
    readings: Sequence[Readings],
    metric: Metric,
    *,
    width: int = 8,
    beam: int = 1,
    prior: Prior | None = None,
) -> list[Tensor]:
    """Read sequences ``[length, hidden]`` one position after another, all at once; ids ``[length]`` each."""
    count, longest = len(sequences), max(map(len, sequences))
    cache, read = bottom.new_cache(), torch.zeros(count * beam, 0, dtype=torch.long)
    totals = torch.full((count, beam), -torch.inf)
    totals[:, 0] = 0.0
    for place in range(longest):
        rows = [min(place, len(sequence) - 1) for sequence in sequences]  # one that has ended repeats its end
        observed = torch.stack([s[row] for s, row in zip(sequences, rows, strict=True)])
        ids = torch.stack([reading.ids[row, :width] for reading, row in zip(readings, rows, strict=True)])
        observed, ids = observed.repeat_interleave(beam, 0)[:, None], ids.repeat_interleave(beam, 0)
        scores = _score(bottom, cache, metric, observed, ids, place)
        goes_on = torch.tensor([place < len(sequence) for sequence in sequences]).repeat_interleave(beam)
        for row in (goes_on & (scores.amax(1) < metric.enough)).nonzero()[:, 0].tolist():
            more = readings[row // beam].ids[rows[row // beam], width:]
            alone = bottom.row_of(cache, row)
            ids[row, 0], scores[row, 0] = _widen(bottom, alone, metric, observed[row : row + 1], more, place)
        if prior is not None:
            scores = scores + prior.of(ids)
        best = (totals[..., None] + scores.view(count, beam, -1)).flatten(1).topk(beam)
        parents = (torch.arange(count)[:, None] * beam + best.indices // ids.shape[1]).flatten()
        chosen = ids[parents, (best.indices % ids.shape[1]).flatten()]
        totals, read = best.values, torch.cat([read[parents], chosen[:, None]], 1)
        if cache.get_seq_length():
            cache.batch_select_indices(parents)
        bottom.run(chosen[:, None], cache)
        if prior is not None:
            prior.go_on(parents, chosen)
    return [read[i * beam, : len(sequence)] for i, sequence in enumerate(sequences)]


def _score(bottom: Bottom, cache: DynamicCache, metric: Metric, observed: Tensor, ids: Tensor, place: int) -> Tensor:
    return torch.cat([metric(observed, hidden, place) for _, hidden in bottom.candidates(ids, cache)], 1)


def _widen(
    bottom: Bottom, cache: DynamicCache, metric: Metric, observed: Tensor, more: Tensor, place: int
) -> tuple[Tensor, Tensor]:
    """The best of some more candidates if it is good enough, else of the whole vocabulary; for one row."""
    for ids in (more, torch.arange(bottom.vocab_size)):
        if len(ids):
            scores = _score(bottom, cache, metric, observed, ids[None], place)[0]
            if scores.max() >= metric.enough:
                break
    return ids[scores.argmax()], scores.max()
