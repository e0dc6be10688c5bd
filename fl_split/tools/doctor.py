"""`fl-split doctor`: would this run work on this machine? Asked before it starts; each answer comes with its remedy.

The checks are those that a run makes anyway (`load_examples`, `build.connect`, `Boundaries.of`, `check_room`), made
early and all at once. What leaves the node is what connecting to a trunk sends: a token, and no data.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fl_split.config import UNCOVERED, Data, NodeConfig, RunConfig
from fl_split.data.batches import prepare_tokenizer
from fl_split.data.examples import Example
from fl_split.data.fits import check_fits
from fl_split.data.load import COPIES, Examples, load_examples
from fl_split.data.sources import num_files
from fl_split.errors import ConfigError, FLSplitError, SplitError
from fl_split.model.causal import check_causal_config
from fl_split.model.checkpoint import read_config, weights_digest
from fl_split.model.ends import check_weights
from fl_split.model.family import auto_class, examine
from fl_split.model.loading import INDEX, WHOLE, Boundaries, check_quantized
from fl_split.model.loss import IGNORED
from fl_split.node.account import epsilon_of
from fl_split.node.build import check_demo_data, connect, connect_shares, find_model
from fl_split.node.choice import Choice, choose, chosen
from fl_split.node.record_dp import check_delta, sampling_of
from fl_split.plan.fits_here import Check, check_room
from fl_split.plan.plan import PROCESS_BYTES, choose_split
from fl_split.plan.versions import check_versions
from fl_split.tools.audit.page import NOISE

T = TypeVar("T")

_PATIENCE_S = 10.0  # for a trunk to answer
_MANY_CUT = 0.2  # of the examples
_MANY_COPIES = 0.05
_SAMPLE = 256  # examples of which targets are counted


def diagnose(config: RunConfig, own: NodeConfig, max_rows: int | None = None, numbered: bool = True) -> Iterator[Check]:
    """All checks, one after another; a check whose ground another one has taken away is left out.

    Args:
        config: The run's.
        own: The node's.
        max_rows: Look at the first rows of the data only.
        numbered: Somebody has given the node its partition-id.
    """
    yield from check_versions()
    if not numbered:
        yield Check("warn", "node", "node-config lacks partition-id, without which a deployed node refuses to train")
    for key, near in own.unknown.items():
        yield Check("warn", "node", f"{key!r} is no key of fl-split's (the nearest is {near!r}), and left alone")
    check, together = _try("record-dp", lambda: ("", own.with_record_dp(config)))
    if together is None:
        yield check
        return
    config = together
    model, found = _try("model", lambda: _model(config))
    yield model
    if found is None:
        return
    config, folder = found
    if config.surrogate.kind == "auto":
        check, choice = _try("surrogate", lambda: _choice(config, own, folder))
        yield check
        if choice is None:
            return
        config = chosen(config, choice.kind, folder)
    yield _try("weights", lambda: (_weights(config, folder), None))[0]
    check, tokenizer = _try("tokenizer", lambda: _tokenizer(folder))
    yield check
    if tokenizer is not None and tokenizer.eos_token is None:
        yield Check("warn", "tokenizer", "it has no end token, so that answers are learnt without an end")
    if tokenizer is not None:
        yield from check_data(config, own, read_config(str(folder)), tokenizer, max_rows)
    yield _try("trunk", lambda: _trunk(config, own, folder))[0]
    yield Check(
        "pass", "privacy", f"the trunk's operator can read what is sent, as 'fl-split audit' shows here: {NOISE}"
    )
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


def _choice(config: RunConfig, own: NodeConfig, folder: Path) -> tuple[str, Choice]:
    choice = choose(config, own, folder)
    return str(choice), choice


def _model(config: RunConfig) -> tuple[str, tuple[RunConfig, Path]]:
    config = choose_split(config)
    folder = find_model(config)
    about = read_config(str(folder))
    check_quantized(about)
    cut = Boundaries.of(examine(about, auto_class(config.task)), config.split.bottom_layers, config.split.top_layers)
    if weights_digest(folder, cut.layers_name, range(cut.first)) is None or (
        weights_digest(folder, cut.layers_name, range(cut.end, cut.num_layers)) is None
    ):
        raise SplitError(_lacking(folder))
    if config.surrogate.kind == "streamed" and weights_digest(folder, cut.layers_name, cut.trunk) is None:
        raise SplitError(
            f"the checkpoint in {folder} lacks the trunk's layers, which surrogate.kind='streamed' reads from it: put "
            "the whole checkpoint there, or use another surrogate.kind"
        )
    if config.task == "causal-lm":
        check_causal_config(about)
    text = f"{about.model_type}, {len(cut.bottom)} + {len(cut.trunk)} + {len(cut.top)} layers, in {folder}"
    return text, (config, folder)


def _weights(config: RunConfig, folder: Path) -> str:
    split, surrogate, labels = config.split, config.surrogate, config.data.label_names
    ends = (split.bottom_layers, split.top_layers)
    looked = check_weights(folder, *ends, surrogate.planned, surrogate.layers, labels)
    return "all names and shapes are those of the configuration" if looked else "quantized: not looked at"


def _lacking(folder: Path) -> str:
    if any(folder.glob("*.safetensors")) and not any((folder / name).is_file() for name in (WHOLE, INDEX)):
        return f"the checkpoint in {folder} has neither {WHOLE} nor {INDEX}, by which others are found: fetch it again"
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return (
            f"the checkpoint in {folder} lacks weights of this node's layers (safetensors): fetch it again, and check "
            "model.name and model.revision"
        )
    return (
        f"the checkpoint in {folder} has its weights in .bin files, which can run code and are not read: make "
        "safetensors files of them with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
    )


def _tokenizer(folder: Path) -> tuple[str, PreTrainedTokenizerBase]:
    try:
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {folder} ({type(error).__name__}): put the model's tokenizer files there"
        ) from error
    return f"{len(tokenizer)} tokens, {'with a' if tokenizer.chat_template else 'no'} chat template", tokenizer


def check_data(
    config: RunConfig,
    own: NodeConfig,
    about: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_rows: int | None,
) -> Iterator[Check]:
    """Columns, bad rows, lengths, and how much of the examples is learnt from: of this node, or of all simulated ones.

    Args:
        config: The run's.
        own: The node's.
        about: The base model's configuration.
        tokenizer: The base model's.
        max_rows: Look at the first rows only.
    """
    check, nodes = _try("data", lambda: ("", _nodes(config, own)))
    if nodes is None:
        yield check
        return
    for node in nodes:
        which = f"node {node.partition_id}: " if len(nodes) > 1 else ""
        for check in _check_node(config, node, about, tokenizer, max_rows):
            yield replace(check, text=which + check.text)


def _nodes(config: RunConfig, own: NodeConfig) -> list[NodeConfig]:
    """This node; of a simulation, of which nobody said how many nodes it has, one for each file."""
    check_demo_data(config, own)
    if own.data_path or own.num_partitions > 1:
        return [own]
    count = num_files(config.data)
    return [own.model_copy(update={"partition_id": i, "num_partitions": count}) for i in range(count)]


def _check_node(
    config: RunConfig,
    node: NodeConfig,
    about: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_rows: int | None,
) -> Iterator[Check]:
    def load() -> tuple[str, Examples]:
        found = load_examples(config.data, node, tokenizer, config.train.seed, max_rows=max_rows)
        report = found.report
        looked = f"the first {report.num_rows}" if report.num_rows == max_rows else f"{report.num_rows}"
        evaluated = f", {len(found.heldout)} of them evaluated" if len(found.heldout) < found.num_heldout else ""
        parts = f"{len(found.train)} examples to train on, {found.num_heldout} held out{evaluated}"
        return f"{looked} rows of {report.path}: {parts}", found

    check, examples = _try("data", load)
    yield check
    if examples is None:
        return
    report = examples.report
    check, remarks = _try("fit", lambda: ("", check_fits(about, tokenizer, examples, config.data)))
    yield from [check] if remarks is None else [Check("warn", "fit", remark) for remark in remarks]
    if report.bad:
        bad = report.explain(report.bad)
        yield Check("warn", "rows", f"{report.num_bad} are left out: {bad}; correct them, or accept their loss")
    for note in report.all_notes():
        yield Check("warn", "rows", note)
    if report.unread:
        yield Check("pass", "columns", report.unread_columns())
    if config.data.redact or node.redact_rules:
        found = report.say_redacted()
        yield Check("pass" if found else "warn", "redact", f"replaced by pseudonyms: {found or 'nothing was found'}")
    if config.dp.is_record and report.num_rows != max_rows:
        yield _check_record_dp(config, len(examples.train))
    yield from _check_copies(examples)
    yield _check_lengths(examples, config.data.max_length)
    if report.template:
        yield Check("pass", "template", f"prompt and response are written as {report.template}")
    if config.task == "causal-lm":
        sample = [label for example in examples.train[:_SAMPLE] for label in example["labels"]]
        share = sum(label != IGNORED for label in sample) / len(sample)
        yield Check("pass", "targets", f"the loss counts {100 * share:.0f} % of the tokens; --show 2 prints which")


def _check_record_dp(config: RunConfig, num_examples: int) -> Check:
    """What the run would come to, if this node takes part in every round."""
    dp, steps = config.dp, config.num_server_rounds * config.train.steps

    def look() -> tuple[str, float]:
        check_delta(dp, num_examples)
        spent = epsilon_of([(sampling_of(config, num_examples), dp.record_noise_multiplier, steps)], dp.record_delta)
        return f"epsilon {spent:.2f} at delta {dp.record_delta:g} for one example after {steps} steps", spent

    check, spent = _try("record-dp", look)
    if spent is None:
        return check
    if 0 < dp.record_max_epsilon < spent:
        text = f"{check.text}: dp.record-max-epsilon={dp.record_max_epsilon:g} ends training before; {UNCOVERED}"
        return Check("warn", "record-dp", text)
    return replace(check, text=f"{check.text}; {UNCOVERED}")


def _check_copies(examples: Examples) -> Iterator[Check]:
    """Equal rows are on one side; rows that are equal but for what was cut off may not be."""
    report = examples.report
    usable = report.num_rows - report.num_bad
    if report.num_copies:
        many = report.num_copies > _MANY_COPIES * usable
        yield Check("warn" if many else "pass", "copies", COPIES % (report.num_copies, usable))
    held = {str(example["input_ids"]) for example in examples.heldout}
    across = sum(str(example["input_ids"]) in held for example in examples.train)
    if across:
        text = f"{across} examples to train on have the tokens of held-out ones, though their rows differ"
        yield Check("warn", "copies", f"{text}: raise data.max-length, or accept that held-out scores are flattered")


def _check_lengths(examples: Examples, max_length: int) -> Check:
    """Lengths before cutting: what `data.max-length` would have to be."""
    report, train, heldout = examples.report, examples.train, examples.heldout
    lengths = np.concatenate([train.lengths + train.cut, heldout.lengths + heldout.cut])
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    text = f"median {middle}, 95 % up to {most}, longest {lengths.max()} tokens"
    usable = report.num_rows - report.num_bad
    if report.num_truncated <= _MANY_CUT * usable:
        return Check("pass", "lengths", f"{text}; {report.num_truncated} cut to {max_length}")
    text += f"; {report.num_truncated} of {usable} are cut, {report.num_cut} tokens lost: raise data.max-length"
    return Check("warn", "lengths", text)


def show_examples(config: RunConfig, own: NodeConfig, count: int) -> Iterator[str]:
    """What the model will see of some examples, with what the loss counts between « and »; for the node's own terminal.

    Args:
        config: The run's.
        own: The node's.
        count: How many examples.

    Raises:
        FLSplitError: There is nothing to show; `diagnose` says the same.
    """
    config = choose_split(config)
    _, tokenizer = _tokenizer(find_model(config))
    for node in _nodes(config, own)[:1]:
        found = load_examples(config.data, node, tokenizer, config.train.seed, max_rows=max(_SAMPLE, 4 * count))
        for number, example in enumerate(found.train[:count], 1):
            yield f"example {number}, {_shown(example, tokenizer, config.data)}"


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase, config: Data) -> str:
    ids, labels = example["input_ids"], example["labels"]
    if isinstance(labels, int):
        return f"{len(ids)} tokens, label {config.label_names[labels]}:\n{tokenizer.decode(ids)}"
    counted = [False, *(label != IGNORED for label in labels[1:])]
    changes = [0, *(i for i in range(1, len(ids)) if counted[i] != counted[i - 1]), len(ids)]
    text = ""
    for start, end in pairwise(changes):
        before, after = str(tokenizer.decode(ids[:start])), str(tokenizer.decode(ids[:end]))
        # Alone, a piece may lose its first space; among others, some tokenizers write what precedes it otherwise.
        piece = after.removeprefix(before) if after.startswith(before) else str(tokenizer.decode(ids[start:end]))
        text += f"«{piece}»" if counted[start] else piece
    return f"{len(ids)} tokens, {sum(counted)} of them counted:\n{text}"


def _trunk(config: RunConfig, own: NodeConfig, folder: Path) -> tuple[str, None]:
    address = own.trunk_address or config.trunk.address
    if address == "embedded":
        return "embedded: the run starts it", None
    trunk = config.trunk.model_copy(update={"timeout_s": min(config.trunk.timeout_s, _PATIENCE_S)})
    config = config.model_copy(update={"trunk": trunk})
    with ExitStack() as stack:
        if config.surrogate.kind == "shares":
            connect_shares(config, own, folder, (address, trunk.share_address), stack)
            second = own.trunk_share_address or trunk.share_address
            return f"{address} and {second} answer, hold this run's layers, are apart and let this node in", None
        connect(config, own, folder, address, stack)
    return f"{address} answers, holds this run's layers and lets this node in", None
