"""Tokens are drawn as softmax says, by seed and place alone."""

import pytest
import torch

from fl_split.node.draw import Draw

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def drawn(seed: str, temperature: float = 1.0, top_p: float = 1.0, place: int = 0) -> int:
    ids = torch.zeros(1, 3 + place, dtype=torch.long)
    return int(Draw([seed], temperature, top_p, 3)(ids, LOGITS[None]).argmax())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_tokens_come_as_often_as_softmax_says(temperature: float, top_p: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0)
    if top_p < 1:  # 0.64 and 0.24 are the likeliest that reach it
        expected = torch.where(expected > 0.2, expected, 0.0)
        expected /= expected.sum()
    counts = torch.bincount(torch.tensor([drawn(str(i), temperature, top_p) for i in range(4000)]), minlength=5)
    torch.testing.assert_close(counts / 4000, expected, atol=0.025, rtol=0)


def test_a_place_is_drawn_the_same_again_and_another_is_not() -> None:
    first = [drawn("7", place=place) for place in range(40)]
    assert first == [drawn("7", place=place) for place in range(40)]
    assert len(set(first)) > 1
    assert first != [drawn("8", place=place) for place in range(40)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_the_coldest_is_greedy(temperature: float) -> None:
    assert {drawn(str(seed), temperature, top_p) for seed in range(20) for top_p in (1.0, 0.5)} == {4}
