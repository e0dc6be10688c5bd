"""The public text that a surrogate is fitted to, and batches of it, each of which follows from its number."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fl_split.errors import ConfigError, DataError
from fl_split.model.loss import IGNORED
from fl_split.tools.fit.folder import Fit

_RANDOM_TOKENS = 0.3  # of a sequence, in every other one


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
            raise DataError(
                f"{file} cannot be read as UTF-8 text ({type(error).__name__}): give a file of plain text, in UTF-8"
            ) from error
        for paragraph in text.split("\n\n"):
            if paragraph.strip():
                ids += tokenizer.encode(paragraph.strip(), add_special_tokens=False)
                ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(ids) < 64 * length:
        raise DataError(f"{len(ids)} tokens of public text are too few to fit a surrogate: give at least {64 * length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def sample_text(folder: Path, num_sequences: int, fit: Fit) -> Tensor:
    """Text that the model itself writes, as token ids ``[num_sequences, length]``: public text when there is none.

    Sampled at temperature 1 from the start token, so that it is spread like the text that the model was trained on.

    Raises:
        ConfigError: The model has no token to start from.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, fit.dtype)).eval()
    torch.nn.Module.to(model, fit.device)
    start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    if start is None:
        raise ConfigError(f"{folder} names no start or end token to sample text from: give --text")
    unused = (start + 1) % model.config.vocab_size  # nothing is padded: without an end token all have full length
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=fit.length - 1, pad_token_id=unused
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(fit.seed)
        parts = [
            model.generate(torch.full((min(128, num_sequences - i), 1), start, device=fit.device)).cpu()
            for i in range(0, num_sequences, 128)
        ]
    return torch.cat(parts)


def generator(*numbers: int | str) -> torch.Generator:
    """What is random of one thing, told apart from all others by its numbers: nothing has to be kept to go on."""
    return torch.Generator().manual_seed(zlib.crc32(repr(numbers).encode()))


def draw(text: Tensor, size: int, number: int, seed: int, random_tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Batch `number` of a text that is gone through again and again: token ids and labels, ``[size, length]`` each.

    In half of the sequences a random prefix counts for nothing, like a prompt. With `random_tokens`, a part of the
    tokens of every other sequence is one of these: private text surprises the model more than public text does, and a
    match on unsurprising text alone does not carry over to it.
    """
    epoch, place = divmod(number, len(text) // size)
    order = torch.randperm(len(text), generator=generator(seed, "epoch", epoch))
    ids, chance = text[order[place * size : (place + 1) * size]], generator(seed, "batch", number)
    prompt = torch.randint(1, max(2, ids.shape[1] * 2 // 5), (size, 1), generator=chance)
    prompt *= torch.randint(0, 2, (size, 1), generator=chance)
    if random_tokens is not None:
        random = torch.rand(ids.shape, generator=chance) < _RANDOM_TOKENS
        random &= torch.rand(size, 1, generator=chance) < 0.5
        ids = torch.where(random, random_tokens[torch.randint(len(random_tokens), ids.shape, generator=chance)], ids)
    return ids, ids.masked_fill(torch.arange(ids.shape[1])[None] < prompt, IGNORED)


def question(ids: Tensor, num_labels: int, vocab_size: int, *numbers: int) -> Tensor:
    """Labels for a classifier, ``[batch]``: the answers to a random linear question about the words of a text.

    Args:
        ids: ``[batch, length]``.
        num_labels: Possible answers.
        vocab_size: Of the model.
        numbers: Tell one question from another.
    """
    weights = torch.randn(vocab_size, num_labels, generator=generator(*numbers))
    scores = weights[ids].mean(1)
    return (scores - scores.mean(0)).argmax(1)
