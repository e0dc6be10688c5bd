"""The algebra of shared adapters: exact where it says so, whatever the order, ranks and weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_split.config import Combine
from fl_split.errors import AggregationError
from fl_split.model.products import truncate
from fl_split.node.received import moved, take
from fl_split.server.aggregation import Update, check_scaling, combine

A, B = "m.lora_A.weight", "m.lora_B.weight"
IN, OUT = 7, 5


def update(seed: int, rank: int = 2, weight: float = 1.0, scaling: float = 2.0, node: str = "node") -> Update:
    generator = torch.Generator().manual_seed(seed)
    arrays = {A: torch.randn(rank, IN, generator=generator), B: torch.randn(OUT, rank, generator=generator)}
    return Update(arrays, weight, scaling, node)


def product(u: Update) -> Tensor:
    return u.scaling * u.arrays[B].double() @ u.arrays[A].double()


def mean_of_products(updates: list[Update]) -> Tensor:
    total = sum(u.weight for u in updates)
    return torch.stack([u.weight / total * product(u) for u in updates]).sum(0)


def effect(combined: dict[str, Tensor], how: Combine, scaling: float, rank: int) -> Tensor:
    """What a node's model computes beyond the base after it took what was combined."""
    fresh = {A: torch.ones(rank, IN), B: torch.zeros(OUT, rank)}
    adapter, residual = take(combined, how, fresh, fresh, scaling)
    whole = scaling * adapter[B].double() @ adapter[A].double()
    if residual:
        whole = whole + residual["m.residual_B.weight"].double() @ residual["m.residual_A.weight"].double()
    return whole


many = st.lists(
    st.tuples(st.integers(0, 999), st.integers(1, 4), st.floats(0.1, 100), st.floats(0.1, 8)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(many, st.permutations(range(5)))
@pytest.mark.parametrize("how", ["svd", "stack"])
def test_mean_of_products_is_exact_for_any_ranks_weights_and_scalings_in_any_order(
    how: Combine, nodes: list[tuple[int, int, float, float]], order: list[int]
) -> None:
    updates = [update(*node) for node in nodes]
    expected = mean_of_products(updates)
    combined = combine([updates[i] for i in order if i < len(updates)], how)
    if how == "svd":  # with the largest rank of the nodes it is the best approximation
        rank = max(node[1] for node in nodes)
        u, s, v = torch.linalg.svd(expected)
        expected = u[:, :rank] @ torch.diag(s)[:rank, :rank] @ v[:rank]
    got = effect(combined, how, scaling=3.0, rank=4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.floats(0.1, 100)), min_size=1, max_size=5))
def test_exact_is_the_mean_of_products_and_keeps_the_factors_apart(nodes: list[tuple[int, float]]) -> None:
    updates = [update(seed, weight=weight) for seed, weight in nodes]
    combined = combine(updates, "exact")
    torch.testing.assert_close(combined[A], combine(updates, "mean")[A])
    expected = mean_of_products(updates)
    torch.testing.assert_close(effect(combined, "exact", 2.0, 2), expected, rtol=1e-4, atol=1e-4)


def test_mean_of_factors_is_not_the_mean_of_products() -> None:
    updates = [update(0), update(1)]
    apart = effect(combine(updates, "mean"), "mean", 2.0, 2)
    assert (apart - mean_of_products(updates)).abs().max() > 0.5


@pytest.mark.parametrize("how", ["mean", "svd", "stack", "exact"])
def test_single_node_is_unchanged_in_what_it_computes(how: Combine) -> None:
    only = update(3, rank=2)
    torch.testing.assert_close(effect(combine([only], how), how, 2.0, 2), product(only), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["stack", "exact"])
def test_residuals_of_earlier_rounds_stay_and_what_absent_nodes_missed_is_in_them(how: Combine) -> None:
    first = [update(0), update(1), update(2)]
    combined = combine(first, how)
    fresh = {A: torch.ones(2, IN), B: torch.zeros(OUT, 2)}
    adapter, residual = take(combined, how, fresh, fresh, 2.0)
    # two of three take part in the second round: each trains on from what it took
    second = [
        Update({A: adapter[A] + 0.1 * update(i).arrays[A], B: adapter[B] + update(i).arrays[B]}, float(i), 2.0)
        for i in (7, 8)
    ]
    again = combine(second, how, combined)
    expected = residual["m.residual_B.weight"].double() @ residual["m.residual_A.weight"].double()
    torch.testing.assert_close(effect(again, how, 2.0, 2), expected + mean_of_products(second), rtol=1e-4, atol=1e-4)


def test_residual_never_outgrows_the_matrix() -> None:
    combined: dict[str, Tensor] = {}
    for i in range(8):
        combined = combine([update(10 * i + j, rank=3) for j in range(3)], "stack", combined)
    assert combined["m.residual_A.weight"].shape == (OUT, IN)  # min(in, out) directions hold anything


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 5))
def test_truncation_is_the_best_of_its_rank(seed: int, rank: int) -> None:
    factors = update(seed, rank=6).arrays
    whole = factors[B].double() @ factors[A].double()
    a, b = truncate((factors[A], factors[B]), rank)
    best = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    torch.testing.assert_close((b.double() @ a.double() - whole).norm(), best, rtol=1e-4, atol=1e-4)


def test_nodes_with_more_rank_than_the_update_go_on_learning_in_the_rest() -> None:
    combined = combine([update(0, rank=2)], "svd")
    own = {A: torch.zeros(4, IN), B: torch.ones(OUT, 4)}
    fresh = {A: torch.full((4, IN), 9.0), B: torch.zeros(OUT, 4)}
    adapter, _ = take(combined, "svd", own, fresh, 2.0)
    assert adapter[A].shape == (4, IN) and bool((adapter[A][2:] == 9).all()) and not adapter[B][:, 2:].any()
    thin = {A: fresh[A][:1], B: fresh[B][:, :1]}
    small, _ = take(combined, "svd", thin, thin, 2.0)
    torch.testing.assert_close(small[A], adapter[A][:1])


def test_stack_starts_the_adapter_anew() -> None:
    fresh = {A: torch.full((2, IN), 9.0), B: torch.zeros(OUT, 2)}
    adapter, _ = take(combine([update(0)], "stack"), "stack", update(0).arrays, fresh, 2.0)
    assert torch.equal(adapter[A], fresh[A]) and torch.equal(adapter[B], fresh[B])
    assert take({}, "stack", fresh, fresh, 2.0) == ({}, {})  # the start


def test_other_arrays_are_averaged_by_weight() -> None:
    updates = [
        Update({**update(i).arrays, "score.weight": torch.full((2,), float(i))}, weight, 2.0)
        for i, weight in ((0, 1.0), (4, 3.0))
    ]
    for how in ("mean", "svd", "stack", "exact"):
        assert combine(updates, how)["score.weight"].tolist() == [3.0, 3.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("updates", "how", "message"),
    [
        ([], "mean", "no node shared anything"),
        ([update(0, weight=0.0)], "mean", "weight 0"),
        ([update(0, scaling=float("nan"))], "svd", "alpha/rank nan: both must be numbers above 0"),
        ([update(0), Update({A: torch.ones(2, IN)}, 1.0, 2.0, "clinic")], "mean", r"clinic and node share .*lora_B"),
        ([update(0), update(1, scaling=4.0)], "mean", "alpha/rank is 4 .* use 'svd' or 'stack'"),
        ([update(0), update(1, rank=4)], "mean", "different ranks need aggregation.combine 'svd' or 'stack'"),
        ([Update({A: torch.ones(2, IN)}, 1.0, 2.0)], "svd", "an A without a B of the same rank"),
    ],
)  # fmt: skip
def test_updates_that_do_not_belong_together_are_refused(updates: list[Update], how: Combine, message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        combine(updates, how)


def test_an_update_of_nothing_moves_by_a_hair_and_any_other_stays_as_it_is() -> None:
    old = update(0).arrays
    new = {name: value.clone() for name, value in old.items()}
    norm = sum(float((moved(new, old)[n] - old[n]).square().sum()) for n in old) ** 0.5
    assert 0 < norm < 1e-5 and all(torch.equal(new[n], old[n]) for n in old)
    assert moved({A: torch.zeros(2, 2)}, {A: torch.zeros(2, 2)})[A].norm() > 0
    new[B][0, 0] += 1
    assert all(torch.equal(value, new[n]) for n, value in moved(new, old).items())
    assert moved({}, {}) == {}


def test_scaling_must_be_what_alpha_and_the_rank_make() -> None:
    check_scaling([update(0, rank=2, scaling=8.0), update(1, rank=4, scaling=4.0)], 16.0, by_root=False)
    check_scaling([update(0, rank=4, scaling=8.0)], 16.0, by_root=True)
    check_scaling([Update({"score.weight": torch.ones(2, 3)}, 1.0, 7.0)], 16.0, by_root=False)
    half = {"a-only": {A: update(0).arrays[A]}, "b-only": {B: update(0).arrays[B]}, "both": update(0).arrays}
    for arrays in half.values():
        with pytest.raises(AggregationError, match=r"clinic says that alpha/rank is 4, but lora\.alpha=16 .*rank 2"):
            check_scaling([update(1, scaling=8.0), Update(arrays, 1.0, 4.0, "clinic")], 16.0, by_root=False)


def test_only_ranks_may_differ() -> None:
    odd = Update({A: torch.ones(2, IN + 1), B: torch.ones(OUT, 2)}, 1.0, 2.0)
    with pytest.raises(AggregationError, match="only ranks may differ"):
        combine([update(0), odd], "svd")
