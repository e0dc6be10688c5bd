"""The descent ratio, and the trunk cache of a frozen bottom."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fl_split import demo
from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.model import adapters
from fl_split.model.loss import Batch
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.node import train
from fl_split.node.descent import DescentProbe, warn_if_stuck
from fl_split.node.trunk_cache import CachedTrunk
from fl_split.tools.gradcheck import Candidate, build


@pytest.fixture(scope="module")
def batches(demo_model: Path) -> list[Batch]:
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    node = NodeConfig(data_path=str(demo.data_folder() / "hospital-south.jsonl"))
    examples = load_examples(Data.model_validate({"max-length": 64}), node, tokenizer, 0)
    return list(islice(training_batches(examples.train, tokenizer, 8, 0, 0), 8))


def ratio_of(demo_model: Path, candidate: Candidate, batches: list[Batch]) -> float:
    """After two small steps on the probe's own batch."""
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), candidate, Lora())
    config = Train.model_validate({"steps": 2, "bottom-lr": 3e-5, "top-lr": 3e-5})
    probe = DescentProbe(model, batches[0])
    train.train_round(model, train.make_optimizer(model, config), iter([batches[0]] * 2), config)
    return probe.ask().ratio


def test_ratio_of_a_small_update_is_about_one_for_the_exact_gradient_and_not_for_the_identity(
    demo_model: Path, batches: list[Batch]
) -> None:
    # the demo's model comes out a little different on every kind of processor: identity was seen at 0.71 and at 1.41,
    # the exact gradient within 0.005 of 1
    assert ratio_of(demo_model, Candidate("exact"), batches) == pytest.approx(1, abs=0.03)
    assert abs(ratio_of(demo_model, Candidate("identity"), batches) - 1) > 0.1


def test_probe_leaves_model_and_gradients_as_they_are(demo_model: Path, batches: list[Batch]) -> None:
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("blocks", 2), Lora())
    probe = DescentProbe(model, batches[0])
    config = Train.model_validate({"steps": 2})
    train.train_round(model, train.make_optimizer(model, config), iter(batches), config)
    trained = adapters.adapter_state(model)
    probe.ask()
    assert all(torch.equal(value, trained[name]) for name, value in adapters.adapter_state(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_probe_measures_the_bottom_alone(demo_model: Path, batches: list[Batch]) -> None:
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("blocks", 2), Lora())
    probe = DescentProbe(model, batches[0])
    config = Train.model_validate({"steps": 4, "bottom-lr": 0.0, "top-lr": 1e-2})
    train.train_round(model, train.make_optimizer(model, config), iter(batches), config)
    descent = probe.ask()
    assert descent.measured == pytest.approx(0, abs=1e-6)
    assert descent.predicted == descent.ratio == 0


def test_bottom_that_does_not_learn_is_called_out(caplog: pytest.LogCaptureFixture) -> None:
    assert not warn_if_stuck([-1.0, -1.0], "identity")  # too early to tell
    assert not warn_if_stuck([-1.0, 0.1, 0.1, 0.1], "identity")
    assert not caplog.text
    assert warn_if_stuck([1.0, -0.1, 0.05, 0.0], "identity")
    assert "over 3 rounds the bottom's updates have not lowered the loss, but raised it by 0.0500 in all" in caplog.text
    assert "surrogate.layers" in caplog.text and "train.bottom-lr" in caplog.text


class CountingTrunk:
    """h2 = 2 h1; counts sequences."""

    def __init__(self) -> None:
        self.asked = 0

    def start(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> "Future[Tensor]":
        self.asked += len(hidden)
        done: Future[Tensor] = Future()
        done.set_result(hidden * 2)
        return done


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., tuple[CountingTrunk, CachedTrunk]]:
    def make(limit_bytes: int = 10**6, salt: bytes = b"") -> tuple[CountingTrunk, CachedTrunk]:
        trunk = CountingTrunk()
        return trunk, CachedTrunk(trunk, tmp_path / "cache.sqlite", limit_bytes, salt)

    return make


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def test_each_sequence_is_asked_for_once_however_it_is_batched_and_across_restarts(
    make_cache: Callable[..., tuple[CountingTrunk, CachedTrunk]],
) -> None:
    hidden = torch.randn(3, 4, 8)
    trunk, cache = make_cache()
    first = cache.start(hidden, MASK, None).result()
    other = torch.randn(1, 4, 8)
    mixed = cache.start(torch.cat([hidden[[2, 0]], other]), torch.cat([MASK[[2, 0]], torch.ones(1, 4)]), None).result()
    assert trunk.asked == 4
    assert (cache.hits, cache.misses) == (2, 4)
    real = MASK.bool()
    assert torch.equal(first[real], 2 * hidden[real])
    assert torch.equal(mixed[0][real[2]], 2 * hidden[2][real[2]])
    assert torch.equal(mixed[2], 2 * other[0])
    cache.close()
    trunk, cache = make_cache()
    assert torch.equal(cache.start(hidden, MASK, None).result()[real], 2 * hidden[real])
    assert trunk.asked == 0
    cache.close()


def test_another_trunk_or_other_positions_are_asked_for_anew(
    make_cache: Callable[..., tuple[CountingTrunk, CachedTrunk]],
) -> None:
    hidden = torch.randn(1, 4, 8)
    trunk, cache = make_cache()
    cache.start(hidden, None, None).result()
    cache.start(hidden, None, torch.arange(2, 6)[None]).result()
    assert trunk.asked == 2
    cache.close()
    trunk, cache = make_cache(salt=b"other weights")
    cache.start(hidden, None, None).result()
    assert trunk.asked == 1
    cache.close()


def test_full_cache_keeps_what_it_has_and_asks_for_the_rest(
    make_cache: Callable[..., tuple[CountingTrunk, CachedTrunk]], caplog: pytest.LogCaptureFixture
) -> None:
    trunk, cache = make_cache(limit_bytes=4 * 8 * 4 + 10)
    hidden = torch.randn(2, 4, 8)
    for _ in range(2):
        assert torch.equal(cache.start(hidden, None, None).result(), 2 * hidden)
    assert trunk.asked == 2 + 1
    assert caplog.text.count("trunk.cache-mb") == 1
    cache.close()


def test_a_trunks_error_reaches_whoever_waits(tmp_path: Path) -> None:
    class Broken:
        def start(self, *args: object) -> "Future[Tensor]":
            failed: Future[Tensor] = Future()
            failed.set_exception(RuntimeError("gone"))
            return failed

    cache = CachedTrunk(Broken(), tmp_path / "cache.sqlite", 10**6, b"")
    with pytest.raises(RuntimeError, match="gone"):
        cache.start(torch.randn(1, 2, 8), None, None).result()
    cache.close()
