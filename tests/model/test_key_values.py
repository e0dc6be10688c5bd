"""Layers with kept keys and values give what they give at once, for every family, whoever shares the pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import DECODERS, Family
from torch import Tensor
from transformers import PreTrainedModel

from fl_split.model.key_values import KeyValues, NewTokens, bytes_per_token, run_pass
from fl_split.model.trunk import load_trunk

WITHOUT = {"minimax"}  # keeps a state of its own
LENGTHS = (17, 9, 12)


def inputs(hidden_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, hidden_size, generator=generator) for n in LENGTHS]


def at_once(trunk: PreTrainedModel, rows: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = trunk(inputs_embeds=rows[None])[0][0]
    return out


def check(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-4 * expected.norm()  # most: 1e-6; deepseek_v3 4e-5


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    return load_trunk(checkpoint("llama"), 1, 2)


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_in_steps_equals_at_once(family: Family, tmp_path: Path) -> None:
    """Two streams of different lengths in one pass, with windows and with room to spare."""
    family.save(tmp_path)
    trunk = load_trunk(tmp_path, 1, 2)
    size = bytes_per_token(trunk)
    assert (size == 0) == (family.name in WITHOUT)
    if not size:
        return
    rows = inputs(trunk.config.hidden_size)
    three, one = KeyValues(3, 20), KeyValues(1, 18)
    run_pass(trunk, [NewTokens(three, i, r[:-5]) for i, r in enumerate(rows)])
    run_pass(trunk, [NewTokens(one, 0, rows[0][:4])])
    parts = [NewTokens(three, i, r[-5:]) for i, r in enumerate(rows)] + [NewTokens(one, 0, rows[0][4:])]
    for part, found, row in zip(parts, run_pass(trunk, parts), [*rows, rows[0]], strict=True):
        check(found, at_once(trunk, row)[-len(part.rows) :])
    assert three.size_bytes == 3 * 20 * size
    assert (three.lengths, one.lengths) == (list(LENGTHS), [17])


def test_after_truncation_and_reordering(llama: PreTrainedModel) -> None:
    rows = inputs(32)
    kept = KeyValues(3, 20)
    run_pass(llama, [NewTokens(kept, i, r) for i, r in enumerate(rows)])
    kept.truncate([6, 9, 0])
    kept.reorder([1, 0, 1])
    assert kept.lengths == [9, 6, 9]
    outs = run_pass(llama, [NewTokens(kept, 0, rows[2][:3]), NewTokens(kept, 1, rows[1][:2])])
    check(outs[0], at_once(llama, torch.cat([rows[1], rows[2][:3]]))[9:])
    check(outs[1], at_once(llama, torch.cat([rows[0][:6], rows[1][:2]]))[6:])
    (last,) = run_pass(llama, [NewTokens(kept, 2, rows[0][:1])])  # what its source got since is not its own
    check(last, at_once(llama, torch.cat([rows[1], rows[0][:1]]))[9:])


def test_given_positions_are_used(llama: PreTrainedModel) -> None:
    rows = inputs(32)[0]
    kept = KeyValues(1, 20)
    run_pass(llama, [NewTokens(kept, 0, rows[:5], torch.arange(10, 15))])
    (found,) = run_pass(llama, [NewTokens(kept, 0, rows[5:], torch.arange(15, 27))])
    with torch.no_grad():
        expected = llama(inputs_embeds=rows[None], position_ids=torch.arange(10, 27)[None])[0][0, 5:]
        check(found, expected)
        kept.truncate([5])
        (counted,) = run_pass(llama, [NewTokens(kept, 0, rows[5:])])
    assert (counted - expected).norm() > 1e-2 * expected.norm()


def test_a_failed_pass_keeps_nothing(llama: PreTrainedModel) -> None:
    kept = KeyValues(1, 4)
    run_pass(llama, [NewTokens(kept, 0, inputs(32)[0][:2])])
    with pytest.raises(RuntimeError, match="size"):
        run_pass(llama, [NewTokens(kept, 0, inputs(32)[0][:3])])  # no room: the caller is to look first
    assert kept.lengths == [2]
