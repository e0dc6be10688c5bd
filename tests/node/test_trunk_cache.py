"""The trunk cache of a frozen bottom."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_split.node.trunk_cache import CachedTrunk


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
