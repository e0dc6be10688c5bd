"""Gradients of `dp.record-*`: each example's is clipped by itself, and the noise is as large as said."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fl_split.config import Lora, RunConfig, Train
from fl_split.data.store import Prepared, in_memory
from fl_split.errors import ConfigError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import IGNORED, Batch
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.account import Charge
from fl_split.node.record_dp import RecordDp, check_delta, sampling_of

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
)
LENGTHS = (9, 5, 12, 7, 4)


@pytest.fixture
def make_model(checkpoint: Callable[[str], Path]) -> Callable[..., PeftModel]:
    def make(kind: Any = "blocks", **lora: Any) -> PeftModel:
        folder = checkpoint("llama")
        client = load_ends(folder, 1, 2, LocalTrunk(load_trunk(folder, 1, 2)), surrogate=kind, surrogate_layers=1)
        model = adapters.attach(client, Lora.model_validate(lora), train_bottom=kind != "none", seed=0)
        with torch.no_grad():  # B is zero at the start, and so is A's gradient
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1, generator=generator)
        return model

    return make


def examples(lengths: tuple[int, ...] = LENGTHS) -> Prepared:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]
    return in_memory([{"input_ids": ids, "labels": [-100, *ids[1:]], "key": 0, "cut": 0} for ids in rows])  # type: ignore[typeddict-unknown-key]


def private(noise: float = 0.0, clip: float = 1.0, sampling: float = 1.0, steps: int = 1, **given: Any) -> RecordDp:
    charge = Charge(1, steps, sampling, noise, 1e-5, 0.0)
    return RecordDp(charge, clip, given.pop("of", examples()), TOKENIZER, np.random.default_rng(given.pop("seed", 0)))


def parameters_of(model: PeftModel) -> list[Tensor]:
    return [p for group in adapters.parameter_groups(model, 1.0, 1.0) for p in group["params"]]  # type: ignore[attr-defined]


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def alone(model: PeftModel, batch: Batch) -> Tensor:
    """One example's gradient, by nothing of what is tested."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=IGNORED).backward()
    gradient = flat([p.grad for p in parameters_of(model)])
    model.zero_grad(set_to_none=True)
    return gradient


def made(model: PeftModel, record: RecordDp, batches: list[Batch], in_flight: int = 1) -> Tensor:
    """The gradient of a step, times the number of examples that it is divided by."""
    parameters = parameters_of(model)
    record.accumulate(model, parameters, batches, in_flight)
    return flat([p.grad for p in parameters]) * record.charge.sampling * len(LENGTHS)


# --------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize(
    ("kind", "lora"),
    [("none", {}), ("identity", {}), ("blocks", {}), ("streamed", {}), ("exact", {}), ("blocks", {"variant": "dora"})],
)
def test_each_examples_gradient_is_clipped_by_itself(
    make_model: Callable[..., PeftModel], kind: str, lora: dict[str, Any], in_flight: int
) -> None:
    model, batches = make_model(kind, **lora), private().draw()
    each = [alone(model, batch) for batch in batches]
    norms = sorted(gradient.norm().item() for gradient in each)
    clip = norms[2]  # two are longer, two are shorter
    expected = sum(gradient * min(1.0, clip / gradient.norm().item()) for gradient in each)
    got = made(model, private(clip=clip), batches, in_flight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert norms[1] < clip < norms[3] and len(batches) == len(LENGTHS)


def test_one_example_moves_the_sum_by_the_clip_at_most(make_model: Callable[..., PeftModel]) -> None:
    model, batches = make_model(), private().draw()
    record = private(clip=0.01)
    assert min(alone(model, batch).norm().item() for batch in batches) > 1
    without, whole = made(model, record, batches[1:]), made(model, record, batches)
    assert 0.0099 < (whole - without).norm().item() <= 0.01 * (1 + 1e-5)


def test_an_example_whose_gradient_is_not_finite_adds_nothing_and_tells_nothing(
    make_model: Callable[..., PeftModel],
) -> None:
    model, batches = make_model(), private().draw()
    expected = made(model, private(), batches[1:])
    batches[0]["labels"][:] = IGNORED  # a mean of nothing
    assert torch.equal(made(model, private(), batches), expected)
    config = Train.model_validate({"steps": 1})
    nothing = in_memory([{"input_ids": [4, 5, 6], "labels": [IGNORED] * 3, "key": 0, "cut": 0}])  # type: ignore[typeddict-unknown-key]
    settings = train.RoundSettings(record_dp=private(of=nothing))
    assert math.isnan(train.train_round(model, train.make_optimizer(model, config), iter(()), config, settings).loss)


# ------------------------------------------------------------------------------------------------------ noise


def test_noise_has_the_standard_deviation_that_epsilon_counts_on(make_model: Callable[..., PeftModel]) -> None:
    model, record = make_model(), private(noise=1.5, clip=0.4)
    first, second = made(model, record, []), made(model, record, [])
    count = len(first)
    for noise in (first, second, (first + second) / math.sqrt(2)):
        assert noise.std().item() == pytest.approx(1.5 * 0.4, rel=4 / math.sqrt(2 * count))
        assert abs(noise.mean().item()) < 4 * 0.6 / math.sqrt(count)
        assert (noise.abs() < 0.6).double().mean().item() == pytest.approx(0.6827, abs=4 * 0.466 / math.sqrt(count))
    batches = record.draw()
    with_noise, without = made(model, private(noise=1.5, clip=0.4), batches), made(model, private(clip=0.4), batches)
    assert (with_noise - without).std().item() == pytest.approx(0.6, rel=4 / math.sqrt(2 * count))


def test_a_step_divides_by_the_expected_number_of_examples(make_model: Callable[..., PeftModel]) -> None:
    model, batches = make_model(), private().draw()
    parameters, gradients = parameters_of(model), []
    for sampling in (1.0, 0.2):
        private(sampling=sampling).accumulate(model, parameters, batches)
        gradients.append(flat([p.grad for p in parameters]))
    torch.testing.assert_close(gradients[1], 5 * gradients[0], rtol=1e-4, atol=1e-7)


def test_neither_noise_nor_examples_follow_a_seed_that_others_know(make_model: Callable[..., PeftModel]) -> None:
    model, drawn, noises = make_model(), [], []
    many = examples((3,) * 200)
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        record = RecordDp(Charge(1, 1, 0.5, 1.0, 1e-5, 0.0), 1.0, many, TOKENIZER)
        drawn.append([batch["input_ids"].tolist() for batch in record.draw()])
        noises.append(made(model, record, []))
    assert drawn[0] != drawn[1] and not torch.equal(*noises)


def test_examples_are_drawn_each_by_itself() -> None:
    """Poisson: sizes are binomial, every example is as likely as any other, and none comes twice."""
    many = examples(tuple(range(3, 43)))
    record, sizes, counts = private(sampling=0.3, of=many), [], np.zeros(43)
    for _ in range(400):
        lengths = [batch["input_ids"].shape[1] for batch in record.draw()]
        assert len(set(lengths)) == len(lengths)
        sizes.append(len(lengths))
        counts[lengths] += 1
    assert np.mean(sizes) == pytest.approx(12, abs=4 * math.sqrt(8.4 / 400))
    assert np.var(sizes) == pytest.approx(8.4, rel=0.3)
    assert np.abs(counts[3:] - 120).max() < 4 * math.sqrt(400 * 0.3 * 0.7)


# --------------------------------------------------------------------------------------------------- training


def test_a_round_takes_the_steps_that_were_charged(make_model: Callable[..., PeftModel]) -> None:
    model, config = make_model(), Train.model_validate({"steps": 7, "bottom-lr": 1e-2, "top-lr": 1e-2})
    said: list[train.Step] = []
    before = adapters.adapter_state(model)
    for steps in (0, 3):
        settings = train.RoundSettings(record_dp=private(noise=0.1, steps=steps))
        optimizer = train.make_optimizer(model, config)
        trained = train.train_round(model, optimizer, iter(()), config, settings, said.append)
        moved = any(not torch.equal(value, before[name]) for name, value in adapters.adapter_state(model).items())
        assert (len(said), moved, math.isnan(trained.loss)) == (steps, steps > 0, steps == 0)
    assert trained.num_tokens == 3 * sum(LENGTHS)


def test_it_learns_with_little_noise(make_model: Callable[..., PeftModel]) -> None:
    model, config = make_model(), Train.model_validate({"steps": 40, "bottom-lr": 1e-2, "top-lr": 1e-2})
    losses: list[float] = []
    settings = train.RoundSettings(record_dp=private(noise=0.01, steps=40))
    train.train_round(
        model, train.make_optimizer(model, config), iter(()), config, settings, lambda s: losses.append(s.loss)
    )
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------------------------ config

ON: dict[str, Any] = {"dp.record-noise-multiplier": 1.0, "train.keep": "last", "surrogate.kind": "none"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surrogate.kind": "auto"}, r"surrogate\.kind='auto': it times a step"),
        ({"surrogate.kind": "distilled"}, r"surrogate\.kind='distilled': what the surrogate learns"),
        ({"surrogate.kind": "exact", "trunk.exact-gradient": True}, r"surrogate\.kind='exact': a batch's gradient"),
        (
            {"surrogate.kind": "shares", "trunk.share-address": "embedded"},
            r"surrogate\.kind='shares': a batch's gradient",
        ),
        (
            {"surrogate.kind": "matched", "surrogate.file": "/s", "surrogate.check": False, "surrogate.distill": True},
            r"surrogate\.distill=true: what the surrogate learns",
        ),
        ({"surrogate.kind": "blocks"}, r"surrogate\.check=true: a trial on private examples"),
        ({"train.keep": "best"}, r"train\.keep='best': private examples decide which"),
        (
            {"aggregation.personal": True, "aggregation.share": "top", "aggregation.min-nodes": 3},
            r"aggregation\.personal=true does not go with dp\.record-noise-multiplier: private examples decide",
        ),
        ({"data.packing": True}, r"data\.packing=true: each example's gradient is clipped by itself"),
        ({"data.group-by-length": True}, r"data\.group-by-length=true: each example is drawn by itself"),
        ({"dp.record-noise-multiplier": 0.2}, r"record-noise-multiplier=0\.2 is too little .* set 0\.3 or more"),
        ({"dp.record-clip": 0.0}, r"dp\.record-clip=0\.0: input should be greater than 0"),
        ({"dp.record-delta": 1.0}, r"dp\.record-delta=1\.0: input should be less than 1"),
        ({"dp.record-max-epsilon": -1.0}, r"dp\.record-max-epsilon=-1\.0: input should be greater than or equal to 0"),
    ],
)
def test_what_looks_at_private_examples_outside_the_account_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat({**ON, **values})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"surrogate.kind": "streamed"},
        {"surrogate.kind": "blocks", "surrogate.check": False},
        {"surrogate.kind": "identity", "surrogate.check": False},
        {"surrogate.kind": "matched", "surrogate.file": "/s", "surrogate.check": False},
    ],
)
def test_what_is_inside_the_account_is_accepted(values: dict[str, Any]) -> None:
    assert RunConfig.from_flat({**ON, **values}).dp.is_record
    assert not RunConfig().dp.is_record


def test_a_delta_that_would_give_an_example_away_is_refused() -> None:
    dp = RunConfig.from_flat({**ON, "dp.record-delta": 1e-3}).dp
    check_delta(dp, 999)
    with pytest.raises(ConfigError, match=r"dp\.record-delta=0\.001 is too large for this node"):
        check_delta(dp, 1000)


def test_a_step_has_as_many_examples_as_without_on_average() -> None:
    config = RunConfig.from_flat({**ON, "train.batch-size": 8, "train.accumulation": 4})
    assert sampling_of(config, 320) == pytest.approx(0.1)
    assert sampling_of(config, 20) == 1.0
