"""Tokens drawn by an answer's own seed, whoever else is answered at the same time.

Data path: logits of the next token -> **logits in which the largest is the one that is drawn** -> `generate`, greedy.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

_COLDEST = 1e-6  # a temperature that differs from greedy by nothing, and divides without overflow


class Draw(LogitsProcessor):
    """Noise by which the likeliest token becomes a drawn one; torch's own generator is every thread's.

    Logits with independent Gumbel noise have their largest at a token with the probability that softmax gives it (the
    Gumbel-max trick, arXiv 1411.0030). Noise depends on seed and place alone, so a token that was guessed ahead and
    is asked for again is drawn again.

    Args:
        seeds: Of each row.
        temperature: Above 0.
        top_p: As in transformers.
        prompt_length: Tokens before the answer, padding included.
    """

    def __init__(self, seeds: Sequence[str], temperature: float, top_p: float, prompt_length: int) -> None:
        self._seeds, self._temperature = seeds, max(temperature, _COLDEST)
        self._likely = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[batch, vocabulary]``, its largest in each row where the token is drawn."""
        scores = (scores - scores.amax(-1, keepdim=True)) / self._temperature
        if self._likely is not None:
            scores = self._likely(input_ids, scores)
        place = input_ids.shape[1] - self._prompt_length
        noise = torch.stack([_gumbel(f"{seed} {place}", scores.shape[-1]) for seed in self._seeds])
        return scores + noise.to(scores)


def _gumbel(seed: str, size: int) -> Tensor:
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
    generator = torch.Generator().manual_seed(number)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)  # float32 would be 0 once in 2^24 draws
    return -torch.log(-torch.log(uniform))
