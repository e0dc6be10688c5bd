"""The attack in one shot: each hidden state by itself, against every token of the vocabulary.

The vocabulary is run through the base bottom in one public context. A linear map from what comes out to hidden states
of public text gives each token a mean over contexts, and what is left a covariance that all share: linear discriminant
analysis. The first token of a sequence has no context, so its hidden state is known as it is. Known noise adds to
the covariance. Where the bottom has an adapter, which the attacker does not have, the means are moved by what the
hidden states themselves show: those that were read with confidence tell how far it drifts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fl_split.tools.audit.bottom import Bottom

SHORTLIST = 64  # tokens kept for each position
_CONTEXT = 32  # tokens of public text before each token of the vocabulary
_ROWS = 256  # positions at a time
_RIDGE = 1e-3  # of the mean square of a feature
_SHRINK = 0.02  # of the covariance, towards a multiple of the identity
_CONFIDENT = 10.0  # a token this many nats before the next one counts as read
_DRIFT_RIDGE = 0.1


@dataclass(frozen=True)
class Readings:
    """The likeliest tokens of each position: ids and log-likelihoods, ``[positions, SHORTLIST]``, best first."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Reader:
    """Means of the vocabulary's hidden states, and the covariance around them."""

    first: Tensor  # [vocabulary, hidden], at the first position
    means: Tensor  # [vocabulary, hidden], at the others, in the axes of the covariance
    axes: Tensor  # [hidden, hidden], its eigenvectors
    variances: Tensor  # [hidden]

    @classmethod
    def fit(cls, bottom: Bottom, public: Tensor) -> Self:
        """Learn from public text.

        Args:
            bottom: The base model's.
            public: Token ids ``[sequences, length]``, longer than 1.
        """
        features = bottom.vocabulary(public[0, :_CONTEXT])
        hidden = torch.cat([bottom.run(part) for part in public.split(32)])[:, 1:].flatten(0, 1)
        own = features[public[:, 1:].flatten()]
        mean, scale = own.mean(0), own.std(0).clamp_min(1e-6)
        weight = ridge(with_one((own - mean) / scale), hidden - own, _RIDGE)
        means = features + with_one((features - mean) / scale) @ weight
        axes, variances = spread(hidden - means[public[:, 1:].flatten()])
        return cls(bottom.vocabulary(public[0, :0]), means @ axes, axes, variances)

    def read(self, sequences: Sequence[Tensor], noise: float = 0.0) -> list[Readings]:
        """Read hidden states ``[length, hidden]``, to which noise of `noise` times their size was added."""
        rest = torch.cat([rows[1:] for rows in sequences])
        parts = [self._read(rows, noise) for rows in rest.split(_ROWS)]
        ids, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        starts = torch.stack([rows[0] for rows in sequences])
        by_distance = -0.5 * torch.cdist(starts, self.first).square() / noise_variance(starts, noise).clamp_min(1e-6)
        first = by_distance.topk(min(SHORTLIST, by_distance.shape[1]))
        lengths = [len(rows) - 1 for rows in sequences]
        return [
            Readings(torch.cat([first.indices[i : i + 1], own]), torch.cat([first.values[i : i + 1], score]))
            for i, (own, score) in enumerate(zip(ids.split(lengths), scores.split(lengths), strict=True))
        ]

    def _read(self, rows: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        turned = rows @ self.axes
        weights = 1 / (self.variances + (noise_variance(rows, noise) if noise else 0.0))
        weights = weights.view(-1, len(self.variances))
        scores = (turned * weights) @ self.means.T - 0.5 * weights @ self.means.square().T
        best = scores.topk(min(SHORTLIST, scores.shape[1]))
        return best.indices, best.values

    def recalibrated(self, sequences: Sequence[Tensor], readings: Sequence[Readings]) -> Self:
        """Move the means by what tokens that were read with confidence show."""
        rows = torch.cat([rows[1:] for rows in sequences]) @ self.axes
        ids = torch.cat([reading.ids[1:, 0] for reading in readings])
        scores = torch.cat([reading.scores[1:] for reading in readings])
        sure = scores[:, 0] - scores[:, 1] > _CONFIDENT
        if sure.sum() < 2:
            return self
        own, scale = self.means[ids[sure]], self.variances.sqrt()
        weight = ridge(with_one(own / scale), (rows[sure] - own) / scale, _DRIFT_RIDGE)
        means = self.means + with_one(self.means / scale) @ weight * scale
        return replace(self, means=means)


def noise_variance(rows: Tensor, noise: float) -> Tensor:
    """Variance of the noise in hidden states ``[..., hidden]`` that hold it already: ``[..., 1]``."""
    return rows.square().mean(-1, keepdim=True) * noise**2 / (1 + noise**2)


def with_one(rows: Tensor) -> Tensor:
    """Rows with a 1 behind each, for what a linear map adds."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The linear map from inputs to targets of least squares, held small; `strength` in the inputs' mean square."""
    moments = inputs.T @ inputs
    held = moments + strength * moments.diagonal().mean() * torch.eye(len(moments))
    weight: Tensor = torch.linalg.solve(held, inputs.T @ targets)
    return weight


def spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the covariance of rows whose mean is 0."""
    values, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    values = values.clamp_min(0)
    return axes, ((1 - _SHRINK) * values + _SHRINK * values.mean()).clamp_min(1e-12)
