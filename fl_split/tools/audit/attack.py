"""What an attacker does with hidden states that came to the trunk.

The attacker knows the base model, the split, and the defence with its parameters, but no adapter, no seed and no text;
nothing is tuned on private text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fl_split.tools.audit.bottom import Bottom
from fl_split.tools.audit.oneshot import SHORTLIST, Reader, Readings
from fl_split.tools.audit.sequential import Drifted, Exact, Metric, Nearest, Noisy, Prior, read_in_sequence, rounding

_WIDTH = 16  # candidates where none can be told for sure
_BEAM = 3
_PROBES, _PROBED = 8, 4  # examples, and tokens of each, that show whether there is an adapter


@dataclass(frozen=True)
class Outcome:
    """What was read of some sequences."""

    readings: list[Readings]  # in one shot
    ids: list[Tensor]  # in sequence
    drift: float  # of the hidden states from those of the base bottom as the attacker sees it, relative; 0: none
    seconds: dict[str, float] = field(default_factory=dict)

    def first(self, count: int) -> "Outcome":
        """That of the first sequences."""
        return replace(self, readings=self.readings[:count], ids=self.ids[:count])

    @property
    def one_shot(self) -> list[Tensor]:
        """The likeliest token of each position by itself."""
        return [reading.ids[:, 0] for reading in self.readings]


@dataclass(frozen=True)
class Attacker:
    """What an attacker prepares once for a model and a split."""

    bottom: Bottom
    reader: Reader
    rounding: float  # of the wire
    prior: Prior | None  # None: the whole checkpoint is not here
    seconds: float  # that the preparation took

    @classmethod
    def prepare(cls, folder: Path, ends: tuple[int, int], public: Tensor, wire_dtype: str, *, whole: bool) -> Self:
        """Run the vocabulary and public text through the base bottom.

        Args:
            folder: The base model's.
            ends: Layers of bottom and top.
            public: Token ids ``[sequences, length]`` of public text.
            wire_dtype: `trunk.wire-dtype`.
            whole: Whether the folder holds the trunk's layers as well.

        Raises:
            SplitError: The model cannot be split, or not here.
        """
        started = time.monotonic()
        bottom = Bottom(folder, *ends)
        reader = Reader.fit(bottom, public)
        loss = rounding(bottom.run(public[:16]).flatten(0, 1), wire_dtype)
        return cls(bottom, reader, loss, Prior(folder) if whole else None, time.monotonic() - started)

    def read(self, sequences: Sequence[Tensor], noise: float = 0.0) -> Outcome:
        """Read hidden states ``[length, hidden]`` of several examples.

        Args:
            sequences: As they came to the trunk; of several passes, their mean.
            noise: Standard deviation of what was added, relative to a hidden state's root mean square.
        """
        started = time.monotonic()
        readings = self.reader.read(sequences, noise)
        drift = 0.0 if noise else self._drift(sequences, readings)
        metric: Metric = Noisy(noise) if noise else Exact(self.rounding)
        if drift:
            readings = self.reader.recalibrated(sequences, readings).read(sequences)
            metric = Drifted.fit(*self._pairs(sequences, readings))
        first_s, started = time.monotonic() - started, time.monotonic()
        prior = self.prior if noise else None
        if prior is not None:
            prior.start()
        width, beam = (_WIDTH if noise or drift else 8), (_BEAM if prior else 1)
        ids = read_in_sequence(self.bottom, sequences, readings, metric, width=width, beam=beam, prior=prior)
        return Outcome(readings, ids, drift, {"one-shot": first_s, "sequence": time.monotonic() - started})

    def _pairs(self, sequences: Sequence[Tensor], readings: Sequence[Readings]) -> tuple[Tensor, Tensor]:
        """Hidden states of the base bottom for what was read in one shot, and those observed; not of first tokens."""
        base = [self.bottom.run(reading.ids[None, :, 0])[0, 1:] for reading in readings]
        return torch.cat(base), torch.cat([rows[1:] for rows in sequences])

    def _drift(self, sequences: Sequence[Tensor], readings: Sequence[Readings]) -> float:
        """How far off the base bottom is, where it is least; 0 if that may be rounding. Found at a few beginnings."""
        some = [rows[:_PROBED] for rows in sequences[:_PROBES]]
        read = read_in_sequence(self.bottom, some, readings[:_PROBES], Nearest(), width=SHORTLIST)
        off = [
            ((rows - self.bottom.run(ids[None])[0]).norm(dim=1) / rows.norm(dim=1))[1:]
            for rows, ids in zip(some, read, strict=True)
        ]
        least = torch.cat(off).quantile(0.25).item()
        return least if least > 2 * self.rounding else 0.0


def add_noise(sequences: Sequence[Tensor], noise: float, passes: int, generator: torch.Generator) -> list[Tensor]:
    """Hidden states of which each pass sends another noisy copy, as their mean; what a defence by noise would send."""
    noisy = []
    for rows in sequences:
        size = noise * rows.square().mean(-1, keepdim=True).sqrt()
        drawn = torch.randn((passes, *rows.shape), generator=generator).mean(0)
        noisy.append(rows + size * drawn)
    return noisy
