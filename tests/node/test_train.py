"""The local round: accumulation, evaluation, and continuing where one stopped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from fl_split.config import Lora, Train
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loss import IGNORED, Batch, accumulate, count_targets
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.evaluate import evaluate


@pytest.fixture
def make_model(checkpoint: Callable[[str], Path]) -> Callable[[], PeftModel]:
    def make() -> PeftModel:
        folder = checkpoint("llama")
        client = load_ends(folder, 1, 2, LocalTrunk(load_trunk(folder, 1, 2)))
        return adapters.attach(client, Lora(), train_bottom=True, seed=0)

    return make


def make_batch(seed: int, lengths: tuple[int, ...], num_prompt: int = 2) -> Batch:
    """Random tokens, padded on the right; the loss counts those after the prompt."""
    generator = torch.Generator().manual_seed(seed)
    seq = max(lengths)
    ids = torch.randint(3, 99, (len(lengths), seq), generator=generator)
    mask = (torch.arange(seq)[None] < torch.tensor(lengths)[:, None]).long()
    labels = torch.where((mask == 1) & (torch.arange(seq)[None] >= num_prompt), ids, IGNORED)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def endless(first: int = 0) -> Iterator[Batch]:
    while True:
        yield make_batch(first, (9, 5))
        first += 1


def gradients(model: PeftModel) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(make_model: Callable[[], PeftModel]) -> None:
    whole, parts = make_model(), make_model()
    batch = make_batch(0, (9, 9, 6, 4))
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    loss = accumulate(whole, [batch])
    assert accumulate(parts, rows) == pytest.approx(loss, rel=1e-5)
    assert len(gradients(parts)) > 0
    for got, expected in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_loss_counts_response_tokens_only(make_model: Callable[[], PeftModel]) -> None:
    model, batch = make_model(), make_batch(0, (9, 5), num_prompt=4)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    real = batch["labels"][:, 1:] != IGNORED
    assert int(real.sum()) == count_targets(batch) == 5 + 1
    assert evaluate(model, [batch])["loss"] == pytest.approx((losses[real].sum() / real.sum()).item(), rel=1e-5)


def test_evaluation_is_the_same_however_it_is_batched(make_model: Callable[[], PeftModel]) -> None:
    model, batch = make_model(), make_batch(0, (9, 6, 4))
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    assert evaluate(model, rows)["loss"] == pytest.approx(evaluate(model, [batch])["loss"], rel=1e-5)


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_two_rounds_with_state_kept_between_equal_one_long_round(
    make_model: Callable[[], PeftModel], scheduler: str
) -> None:
    config = Train.model_validate({"steps": 3, "scheduler": scheduler})
    once = make_model()
    long = config.model_copy(update={"steps": 6})
    train.train_round(once, train.make_optimizer(once, long), endless(), long, train.RoundSettings(total_steps=6))

    first = make_model()
    optimizer = train.make_optimizer(first, config)
    train.train_round(first, optimizer, endless(), config, train.RoundSettings(total_steps=6))
    kept_adapter, kept_optimizer = adapters.adapter_state(first), train.optimizer_state(first, optimizer)

    second = make_model()
    optimizer = train.make_optimizer(second, config)
    adapters.load_adapter_state(second, kept_adapter)
    train.load_optimizer_state(second, optimizer, kept_optimizer)
    train.train_round(second, optimizer, endless(3), config, train.RoundSettings(3, 6))

    expected, got = adapters.adapter_state(once), adapters.adapter_state(second)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(not torch.equal(kept_adapter[name], expected[name]) for name in expected)


def test_each_end_has_its_own_rate(make_model: Callable[[], PeftModel]) -> None:
    model = make_model()
    before = adapters.adapter_state(model)
    config = Train.model_validate({"steps": 2, "bottom-lr": 0.0, "top-lr": 1e-2})
    train.train_round(model, train.make_optimizer(model, config), endless(), config)
    moved = {adapters.part_of(model, n) for n, v in adapters.adapter_state(model).items() if not v.equal(before[n])}
    assert moved == {"top"}


def test_training_lowers_the_loss(make_model: Callable[[], PeftModel]) -> None:
    model, batch = make_model(), make_batch(0, (9, 7))
    config = Train.model_validate({"steps": 30, "bottom-lr": 1e-2, "top-lr": 1e-2})
    before = evaluate(model, [batch])["loss"]
    train.train_round(model, train.make_optimizer(model, config), iter([batch] * 30), config)
    assert evaluate(model, [batch])["loss"] < before - 0.5


def test_proximal_term_is_that_of_the_formula_and_for_shared_weights_only(make_model: Callable[[], PeftModel]) -> None:
    config, mu = (
        Train.model_validate(
            {"steps": 2, "top-lr": 0.1, "bottom-lr": 0.1, "max-grad-norm": 1e9, "scheduler": "constant"}
        ),
        0.5,
    )

    def trained(proximal_mu: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, moved = make_model(), []
        optimizer = torch.optim.SGD(adapters.parameter_groups(model, 0.1, 0.1))
        start = adapters.adapter_state(model)
        train.train_round(
            model,
            optimizer,
            endless(),
            config,
            train.RoundSettings(proximal_mu=proximal_mu, anchored=lambda name: adapters.part_of(model, name) == "top"),
            lambda step: moved.append(adapters.adapter_state(model)),
        )
        # the first step starts at the anchor, so the term only shows in the second: -lr * mu * (w1 - w0)
        return moved[1], {n: -0.1 * mu * (moved[0][n] - start[n]) * (".layers.0." not in n) for n in start}

    (plain, term), (pulled, _) = trained(0.0), trained(mu)
    for name, value in plain.items():
        torch.testing.assert_close(pulled[name] - value, term[name], rtol=1e-3, atol=2e-6)
    assert max(float(t.abs().max()) for t in term.values()) > 1e-4
