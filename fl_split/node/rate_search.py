"""`train.top-lr = "auto"`: the rates at which this node trains, found once, before its first round of a run.

From the start, before anything that others have sent, the top alone trains a few steps at one rate after another,
always on the same batches, with the run's scheduler; the loss on *other* examples to train on says what each wins, and
all is put back. The held-out examples, by which rounds are judged, are not looked at. Taken is the smallest rate that
wins nearly as much as the best: a few steps do not show what a high rate costs later. The bottom's is half of it, as
in sweeps of whole runs.

On a pretrained decoder (SmolLM2-135M, 2 + 26 + 2, 8 x 80 tokens) ten steps win 0.10 at 4e-3, 0.13 at 8e-3 and 0.12 at
1.6e-2; in whole runs of 60 steps the best rate is 8e-3.

What leaves the node: hidden states of these examples after the frozen bottom, once each as far as `trunk.cache-mb` has
room for the trunk's answers, which are kept until the rates are settled. Which rates came out is not sent, but for the
error of a training that diverges at them.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path

import torch
from peft import PeftModel

from fl_split.config import CAREFUL_RATE, RunConfig
from fl_split.errors import TrainingError
from fl_split.files import write_atomic
from fl_split.model.loss import Batch
from fl_split.model.slots import in_its_place, trunk_calls_of
from fl_split.node.train import RoundSettings, make_optimizer
from fl_split.node.trial import Gain, gain, losses_after, measure
from fl_split.node.trunk_cache import CachedTrunk

logger = logging.getLogger(__name__)

STEPS = 10  # of each rate's test
MEASURED = 64  # examples, at most
LEAST_STEPS = 30  # of a run in all: in fewer a test takes longer than what it is for
_FIRST, _LOWEST, _HIGHEST = 4e-3, 2.5e-4, 1.6e-2
_ENOUGH = 0.9  # of what the best rate wins

Draw = Callable[[], tuple[list[Batch], list[Batch]] | None]  # batches to train on and to measure on: `trial.draw`


@dataclass(frozen=True)
class Found:
    """A rate for the top, and why."""

    rate: float
    why: str

    def __str__(self) -> str:
        return f"train.top-lr='auto' is {self.rate:g} here: {self.why}"


def settle(config: RunConfig, model: PeftModel, draw: Draw, kept: Path, answers: Path, late: bool) -> RunConfig:
    """The run's configuration with a rate for this node where it is ``auto``; the same in all rounds of a run.

    Args:
        config: The run's.
        model: The node's, with adapters as they begin; is as before afterwards.
        draw: Draws the examples.
        kept: The file that remembers the rate.
        answers: A folder for what the trunk answers meanwhile; is deleted.
        late: The node has trained in this run without one.
    """
    if config.train.top_lr != "auto":
        return config
    if kept.is_file() and not config.dp.is_record:
        return config.with_rate(Found(**json.loads(kept.read_text(encoding="utf-8"))).rate)
    found = find(config, model, draw, answers, late)
    write_atomic(kept, json.dumps(asdict(found)))
    logger.info("%s", found)
    return config.with_rate(found.rate)


def find(config: RunConfig, model: PeftModel, draw: Draw, answers: Path, late: bool) -> Found:
    """Apply the rule; arguments as of `settle`."""
    num_steps = config.num_server_rounds * config.train.steps
    if config.dp.is_record:
        return Found(CAREFUL_RATE, "dp.record-* lets nothing be chosen by private examples")
    if late:
        return Found(CAREFUL_RATE, "that is what the rounds before were trained with")
    if num_steps < LEAST_STEPS:
        return Found(CAREFUL_RATE, f"a test is not worth it for {num_steps} steps in all, fewer than {LEAST_STEPS}")
    drawn = draw()
    if drawn is None:
        return Found(CAREFUL_RATE, "the examples to train on are too few for a test")
    base, limit_bytes = model.get_base_model(), config.trunk.cache_mb * 1_000_000
    _forget(answers)  # after a kill, the trunk may be another
    try:
        with closing(CachedTrunk(trunk_calls_of(base).trunk, answers / "answers.sqlite", limit_bytes, b"")) as memo:
            with in_its_place(base, memo):
                tried = _try_rates(model, *drawn, config)
    finally:
        _forget(answers)
    return choose(tried)


def _forget(answers: Path) -> None:
    if answers.exists():
        shutil.rmtree(answers)


def _try_rates(
    model: PeftModel, batches: Sequence[Batch], measured: Sequence[Batch], config: RunConfig
) -> dict[float, Gain]:
    settings = RoundSettings(in_flight=config.trunk.in_flight, trains_bottom=False)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        before = measure(model, measured, settings.in_flight)

        def gain_at(rate: float) -> Gain:
            torch.manual_seed(config.train.seed)  # of dropout: the same for all, and so are the hidden states sent
            train = config.train.model_copy(update={"steps": STEPS, "bottom_lr": 0.0, "top_lr": rate})
            try:
                after = losses_after(model, make_optimizer(model, train), batches, measured, train, settings)
            except TrainingError:
                return Gain(-inf)
            found = gain(before, after)
            return found if isfinite(found.mean) else Gain(-inf)

        return search(gain_at)


def search(gain_at: Callable[[float], Gain]) -> dict[float, Gain]:
    """Double the rate while that wins more; then halve it while less might be enough; what each has won."""
    tried: dict[float, Gain] = {}
    rate = _FIRST
    while rate <= _HIGHEST:
        tried[rate] = gain_at(rate)
        if tried[rate].mean <= 0 or tried[rate] is not _best(tried):
            break
        rate *= 2
    rate = _FIRST / 2
    while rate >= _LOWEST and (_is_enough(tried, 2 * rate) or not _best(tried).is_sure):
        tried[rate] = gain_at(rate)
        rate /= 2
    return tried


def choose(tried: Mapping[float, Gain]) -> Found:
    """Take the smallest rate that wins nearly as much as the best, if that wins for sure."""
    said = ", ".join(f"{tried[rate].mean:.3f} at {rate:g}" for rate in sorted(tried))
    what = f"{STEPS} steps of the top alone lower the loss on other examples by {said}"
    if not _best(tried).is_sure:
        return Found(CAREFUL_RATE, f"{what}, none of it for sure")
    return Found(min(rate for rate in tried if _is_enough(tried, rate)), f"{what}; this is the smallest that is enough")


def _best(tried: Mapping[float, Gain]) -> Gain:
    return max(tried.values(), key=lambda gain: gain.mean)


def _is_enough(tried: Mapping[float, Gain], rate: float) -> bool:
    return tried[rate].mean >= _ENOUGH * _best(tried).mean
