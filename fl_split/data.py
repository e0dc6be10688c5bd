"""Private examples -> batches of tokens. Nothing in here leaves the node, and no error quotes a row.

Data path: **files -> rows -> token ids and labels -> held-out and training part -> batches** -> bottom.
"""

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from fl_split import demo
from fl_split.config import Data, NodeConfig, absolute
from fl_split.errors import DataError

logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
IGNORED = -100  # label of a token that the loss does not count

Example = dict[str, list[int]]  # "input_ids" and "labels", one entry per token
Batch = dict[str, torch.Tensor]  # "input_ids", "attention_mask", "labels": [batch, seq]


@dataclass(frozen=True)
class Examples:
    """One node's examples: a part to train on, and a part that is never trained on."""

    train: list[Example]
    heldout: list[Example]


def load_examples(config: Data, node: NodeConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """Read, tokenize and divide one node's examples.

    Raises:
        DataError: Missing files or columns, or too few usable rows; names the key, never a row.
    """
    rows = _read(config, node, seed)
    examples = []
    for row in rows:
        example = _tokenize(row, config, tokenizer)
        if example is not None:
            examples.append(example)
    skipped = len(rows) - len(examples)
    if skipped:
        logger.warning(
            "skipped %d of %d rows: empty, or the prompt alone fills data.max-length=%d",
            skipped,
            len(rows),
            config.max_length,
        )
    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} usable examples of {len(rows)} rows: at least 2 are needed, one to train on and one to "
            "hold out; look for empty columns, or raise data.max-length"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    num_heldout = min(max(1, round(config.holdout * len(examples))), len(examples) - 1)
    shuffled = [examples[i] for i in order]
    return Examples(train=shuffled[num_heldout:], heldout=shuffled[:num_heldout])


def _read(config: Data, node: NodeConfig, seed: int) -> list[dict[str, Any]]:
    if node.data_path:
        return _rows(_find_files("data-path", node.data_path), config)
    path = str(demo.data_folder()) if config.path == "demo" else config.path
    files = _find_files("data.path", path)
    if len(files) > 1 and len(files) != node.num_partitions:
        raise DataError(
            f"data.path matches {len(files)} files, but the run has {node.num_partitions} nodes: use one node per file "
            f'(flwr run ... --federation-config "num-supernodes={len(files)}"), or one file, which is dealt out to all'
        )
    if len(files) > 1:
        return _rows([files[node.partition_id]], config)
    rows = _rows(files, config)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[node.partition_id :: node.num_partitions]]


def _find_files(key: str, path: str) -> list[Path]:
    pattern = absolute(key, path)
    if pattern.is_dir():
        found = [p for p in pattern.iterdir() if p.suffix in _READERS]
    else:
        found = [p for p in map(Path, glob.glob(str(pattern))) if p.is_file()]
    if not found:
        raise DataError(f"{key}={path!r} matches no file: expected a file, folder or pattern of {', '.join(_READERS)}")
    strange = [p.name for p in found if p.suffix not in _READERS]
    if strange:
        raise DataError(f"{key}={path!r} matches {strange[0]}: expected files that end in {', '.join(_READERS)}")
    return sorted(found)


def _rows(files: Sequence[Path], config: Data) -> list[dict[str, Any]]:
    columns = [config.text] if config.text else [config.prompt, config.response]
    keys = ["data.text"] if config.text else ["data.prompt", "data.response"]
    rows: list[dict[str, Any]] = []
    for file in files:
        try:  # streamed: a reader that caches would leave a copy of private data elsewhere on the disk
            read = list(
                datasets.load_dataset(_READERS[file.suffix], data_files=str(file), split="train", streaming=True)
            )
        except Exception as error:  # readers raise anything, with the offending text in the message
            raise DataError(
                f"{file} cannot be read as {file.suffix[1:]} ({type(error).__name__}): check the file"
            ) from None
        for key, column in zip(keys, columns, strict=True):
            if read and column not in read[0]:
                raise DataError(f"{file} has no column {key}={column!r}: it has {', '.join(sorted(map(str, read[0])))}")
        rows.extend(read)
    return rows


def _tokenize(row: dict[str, Any], config: Data, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """Token ids, and labels that count the response only (or all of a plain text); None if no label is left."""
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if config.text:
        prompt, response = "", row[config.text]
    else:
        prompt, response = row[config.prompt], row[config.response]
    if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
        return None
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    head = bos + (tokenizer.encode(f"{prompt}\n", add_special_tokens=False) if prompt else [])
    tail = tokenizer.encode(response, add_special_tokens=False) + eos
    ids = (head + tail)[: config.max_length]
    labels = ([IGNORED] * len(head) + tail)[: config.max_length]
    # The first token of a sequence has nothing to be predicted from.
    return {"input_ids": ids, "labels": labels} if any(label != IGNORED for label in labels[1:]) else None


def training_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int, first_example: int
) -> Iterator[Batch]:
    """Batches without end, each epoch in an order of its own, beginning with the `first_example`-th example drawn.

    The order depends on nothing but the arguments, so that a resumed round sees what it would have seen.
    """

    def draw() -> Iterator[Example]:
        epoch, start = divmod(first_example, len(examples))
        while True:
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(hash((seed, epoch)))).tolist()
            yield from (examples[i] for i in order[start:])
            epoch, start = epoch + 1, 0

    drawn = draw()
    collate = _collator(tokenizer)
    while True:
        yield collate([next(drawn) for _ in range(batch_size)])


def heldout_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterable[Batch]:
    """All examples once, those of similar length together."""
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    collate = _collator(tokenizer)
    for i in range(0, len(by_length), batch_size):
        yield collate(by_length[i : i + batch_size])


def _collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Pad on the right, with the end token where a tokenizer has no pad token (both are masked)."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
