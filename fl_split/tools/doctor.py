"""`fl-split doctor`: would this run work on this machine? Asked before it starts; each answer comes with its remedy.

The checks are those that a run makes anyway (`load_examples`, `build.connect`, `Boundaries.of`, `check_room`), made
early and all at once. What leaves the node is what connecting to a trunk sends: a token, and no data.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fl_split.config import NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.load import Examples, load_examples
from fl_split.data.readers import num_files
from fl_split.errors import ConfigError, FLSplitError, SplitError
from fl_split.model.checkpoint import read_config, weights_digest
from fl_split.model.family import examine
from fl_split.model.loading import Boundaries
from fl_split.model.loss import IGNORED
from fl_split.node.build import connect, find_model
from fl_split.plan.fits_here import Check, check_room
from fl_split.plan.plan import PROCESS_BYTES, auto_class, choose_split
from fl_split.plan.versions import check_versions

T = TypeVar("T")

_PATIENCE_S = 10.0  # for a trunk to answer
_MANY_CUT = 0.2  # of the examples
_SAMPLE = 256  # examples of which targets are counted


def diagnose(config: RunConfig, own: NodeConfig, max_rows: int | None = None) -> Iterator[Check]:
    """All checks, one after another; a check whose ground another one has taken away is left out.

    Args:
        config: The run's.
        own: The node's.
        max_rows: Look at the first rows of the data only.
    """
    yield from check_versions()
    model, found = _try("model", lambda: _model(config))
    yield model
    if found is None:
        return
    config, folder = found
    check, tokenizer = _try("tokenizer", lambda: _tokenizer(folder))
    yield check
    if tokenizer is not None:
        yield from check_data(config, own, tokenizer, max_rows)
    yield _try("trunk", lambda: _trunk(config, own, folder))[0]
    yield from check_room(config, own, PROCESS_BYTES)


def _try(name: str, look: Callable[[], tuple[str, T]]) -> tuple[Check, T | None]:
    """A check that passes with a text and what it found, or fails with the error's text, which holds the remedy.

    An error's notes are not for the server, but this is the node's own terminal.
    """
    try:
        text, found = look()
    except FLSplitError as error:
        return Check("fail", name, ": ".join((str(error), *getattr(error, "__notes__", ())))), None
    return Check("pass", name, text), found


def _model(config: RunConfig) -> tuple[str, tuple[RunConfig, Path]]:
    config = choose_split(config)
    folder = find_model(config)
    about = read_config(str(folder))
    cut = Boundaries.of(examine(about, auto_class(config)), config.split.bottom_layers, config.split.top_layers)
    if weights_digest(folder, cut.layers_name, range(cut.first)) is None or (
        weights_digest(folder, cut.layers_name, range(cut.end, cut.num_layers)) is None
    ):
        raise SplitError(
            f"the checkpoint in {folder} lacks weights of this node's layers (safetensors): fetch it again, and check "
            "model.name and model.revision"
        )
    text = f"{about.model_type}, {len(cut.bottom)} + {len(cut.trunk)} + {len(cut.top)} layers, in {folder}"
    return text, (config, folder)


def _tokenizer(folder: Path) -> tuple[str, PreTrainedTokenizerBase]:
    try:
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {folder} ({type(error).__name__}): put the model's tokenizer files there"
        ) from error
    return f"{len(tokenizer)} tokens, {'with a' if tokenizer.chat_template else 'no'} chat template", tokenizer


def check_data(
    config: RunConfig, own: NodeConfig, tokenizer: PreTrainedTokenizerBase, max_rows: int | None
) -> Iterator[Check]:
    """Columns, bad rows, lengths, and how much of the examples is learnt from."""

    def load() -> tuple[str, Examples]:
        node_config = own
        if not own.data_path and own.num_partitions == 1:  # nobody said how many nodes there are: one a file
            node_config = own.model_copy(update={"num_partitions": num_files(config.data)})
        return "", load_examples(config.data, node_config, tokenizer, config.train.seed, max_rows=max_rows)

    check, examples = _try("data", load)
    if examples is None:
        yield check
        return
    report, num_train, num_heldout = examples.report, len(examples.train), len(examples.heldout)
    looked = f"the first {report.num_rows}" if report.num_rows == max_rows else f"{report.num_rows}"
    yield Check("pass", "data", f"{looked} rows: {num_train} examples to train on, {num_heldout} held out")
    if report.bad:
        bad = report.explain(report.bad)
        yield Check("warn", "rows", f"{report.num_bad} are left out: {bad}; correct them, or accept their loss")
    lengths = examples.train.lengths
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    text = f"median {middle}, 95 % up to {most}, longest {lengths.max()} tokens"
    num_usable = num_train + num_heldout
    if report.num_truncated > _MANY_CUT * num_usable:
        text += f"; {report.num_truncated} of {num_usable} are cut, {report.num_cut} tokens lost: raise data.max-length"
        yield Check("warn", "lengths", text)
    else:
        yield Check("pass", "lengths", text + f"; {report.num_truncated} cut")
    if config.task == "causal-lm":
        sample = [label for example in examples.train[:_SAMPLE] for label in example["labels"]]
        share = sum(label != IGNORED for label in sample) / len(sample)
        yield Check("pass", "targets", f"the loss counts {100 * share:.0f} % of the tokens")


def _trunk(config: RunConfig, own: NodeConfig, folder: Path) -> tuple[str, None]:
    address = own.trunk_address or config.trunk.address
    if address == "embedded":
        return "embedded: the run starts it", None
    trunk = config.trunk.model_copy(update={"timeout_s": min(config.trunk.timeout_s, _PATIENCE_S)})
    with ExitStack() as stack:
        connect(config.model_copy(update={"trunk": trunk}), own, folder, address, stack)
    return f"{address} answers, holds this run's layers and lets this node in", None
