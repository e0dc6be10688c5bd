"""Requests laid out in passes: no result depends on who shared one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fl_split.trunk.layers import hold_layers
from fl_split.trunk.padding import is_causal, passes, run_packed
from fl_split.wire import Packed


def packed(*lengths: int, hidden_size: int = 4, seed: int = 0) -> Packed:
    rows = torch.randn(sum(lengths), hidden_size, generator=torch.Generator().manual_seed(seed))
    return Packed(rows, list(lengths), None)


def test_sequences_of_a_length_go_together() -> None:
    layout = list(passes([packed(*[200] * 4, *[10] * 20), packed(*[195] * 4, 190)]))
    lengths = [[span.length for span in group] for group in layout]
    assert [length for group in lengths for length in group] == sorted([200] * 4 + [195] * 4 + [190] + [10] * 20)[::-1]
    for group in lengths:
        assert sum(group) >= 0.85 * len(group) * max(group)


def test_a_few_short_sequences_do_not_get_a_pass_of_their_own() -> None:
    assert len(list(passes([packed(10, 8, 5)]))) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_result_does_not_depend_on_who_shared_the_batch(
    checkpoint: Callable[[str], Path], family: str, with_positions: bool
) -> None:
    """Tolerance: 1e-5 of the largest value, float32 on the CPU; matrix kernels round differently by batch size."""
    held = hold_layers(checkpoint(family), 2, 2)
    assert held.causal
    requests = [
        packed(*lengths, hidden_size=32, seed=i) for i, lengths in enumerate([(9, 4), (30,), (4, 4, 1), (17, 2)])
    ]
    if with_positions:
        rows, lengths = requests[0].rows, requests[0].lengths
        requests[0] = Packed(rows, lengths, torch.cat([torch.arange(3, 3 + n) for n in lengths]))
    together, _ = run_packed(held.run, requests, causal=held.causal)
    masked, _ = run_packed(held.run, requests, causal=False)
    for request, shared, with_mask in zip(requests, together, masked, strict=True):
        alone = run_packed(held.run, [request], causal=held.causal)[0][0]
        tolerance = 1e-5 * float(alone.abs().max())
        torch.testing.assert_close(shared, alone, rtol=0, atol=tolerance)
        torch.testing.assert_close(with_mask, alone, rtol=0, atol=tolerance)
        again = run_packed(held.run, [request], causal=held.causal)[0][0]
        assert torch.equal(alone, again)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_positions_matter(checkpoint: Callable[[str], Path], family: str) -> None:
    """Gaps, for rotary positions that are only shifted make no difference."""
    held = hold_layers(checkpoint(family), 2, 2)
    request, positions = packed(6, hidden_size=32), torch.tensor([0, 3, 4, 9, 10, 11])
    plain = run_packed(held.run, [request], causal=True)[0][0]
    moved = run_packed(held.run, [Packed(request.rows, [6], positions)], causal=True)[0][0]
    right = held.run(request.rows[None], torch.ones(1, 6, dtype=torch.long), positions[None])[0]
    torch.testing.assert_close(moved, right)
    assert float((moved - plain).abs().max()) > 0.01 * float(plain.abs().max())


def test_causality_is_found_out_by_trying() -> None:
    assert is_causal(lambda h, mask, positions: h.cumsum(1), 8)
    assert not is_causal(lambda h, mask, positions: h + h.mean(1, keepdim=True), 8)
    assert not is_causal(lambda h, mask, positions: h + 1e-4 * h[:, -1:], 8)
