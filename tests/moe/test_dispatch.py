"""Where items go: V-MoE's slot examples by hand, and properties over sizes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_mlp.moe import dispatch

# V-MoE's example: three items, K=2, capacity 2. First choices of all items are placed before second ones.
GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


def plan_of(prioritized: bool) -> dispatch.Plan:
    gates, experts = GATES.topk(2)
    return dispatch.limited(experts[None], gates[None], 3, capacity=2, prioritized=prioritized)


def test_plain_places_by_hand() -> None:
    # first choices: item0 -> e0, item1 -> e0, item2 -> e2; second: item0 -> e2, item1 -> e2 (full), item2 -> e0 (full)
    plan = plan_of(prioritized=False)
    assert plan.row_NK.tolist() == [[0, 5], [1, 6], [4, 6]]
    assert plan.item_M.tolist() == [0, 1, 3, 3, 2, 0]  # 3: an empty row
    assert plan.chosen_E.tolist() == [3, 0, 3]
    assert plan.kept_NK.tolist() == [[True, True], [True, False], [True, False]]


def test_prioritized_places_by_hand() -> None:
    # by first gate: item2 (.6), item1 (.5), item0 (.4). First choices: item2 -> e2, item1 -> e0, item0 -> e0;
    # second: item2 -> e0 (full), item1 -> e2, item0 -> e2 (full)
    plan = plan_of(prioritized=True)
    assert plan.row_NK.tolist() == [[1, 6], [0, 5], [4, 6]]
    assert plan.kept_NK.tolist() == [[True, False], [True, True], [True, False]]


@pytest.mark.parametrize(
    ("items", "experts", "top_k", "ratio", "wanted"),
    [(100, 8, 1, 1.05, 14), (100, 4, 2, 1.0, 50), (3, 8, 1, 1.0, 1), (392, 4, 2, 1.05, 206), (20, 20, 1, 1.05, 2)],
)
def test_capacity_rounds_up(items: int, experts: int, top_k: int, ratio: float, wanted: int) -> None:
    assert dispatch.capacity(items, experts, top_k, ratio) == wanted


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """gates (G, N, K), experts (G, N, K), E."""
    experts, groups = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    items, top_k = groups * draw(st.integers(1, 12)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    gates, chosen = torch.rand(items, experts, generator=generator).softmax(-1).topk(top_k)
    return gates.unflatten(0, (groups, -1)), chosen.unflatten(0, (groups, -1)), experts


@settings(max_examples=150, deadline=None)
@given(routings(), st.integers(1, 8), st.booleans())
def test_places_under_a_capacity_are_valid(routing, capacity: int, prioritized: bool) -> None:
    gates, chosen, experts = routing
    plan = dispatch.limited(chosen, gates, experts, capacity, prioritized)
    flat = chosen.flatten(0, 1)
    used = plan.row_NK[plan.kept_NK].tolist()
    assert len(used) == len(set(used))  # no two choices in one row
    assert (plan.row_NK[~plan.kept_NK] == len(plan.item_M)).all()
    owner = plan.row_NK // (len(plan.item_M) // experts)
    assert (owner[plan.kept_NK] == flat[plan.kept_NK]).all()  # a row belongs to the chosen expert
    assert torch.equal(plan.chosen_E, flat.flatten().bincount(minlength=experts))
    # an expert drops only when its places in the group are all taken
    for chosen_g, kept_g in zip(chosen, plan.kept_NK.view_as(chosen), strict=True):
        for e in range(experts):
            assert kept_g[chosen_g == e].sum() == min(capacity, (chosen_g == e).sum())
    _check_rows(plan)


def _check_rows(plan: dispatch.Plan) -> None:
    """The row of a choice holds its item, and all other rows are empty."""
    n, m = len(plan.row_NK), len(plan.item_M)
    item_NK = torch.arange(n).unsqueeze(1).expand_as(plan.row_NK)
    held = plan.row_NK < m
    assert torch.equal(plan.item_M[plan.row_NK[held]], item_NK[held])
    assert (plan.item_M < n).sum() == held.sum()


@pytest.mark.usefixtures("backend")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(routings())
def test_without_a_capacity_rows_are_sorted_by_expert(routing) -> None:
    _, chosen, experts = routing
    chosen = chosen.flatten(0, 1)
    plan = dispatch.dropless(chosen, experts)
    expert_M = torch.repeat_interleave(torch.arange(experts), plan.counts_E)
    assert torch.equal(expert_M[plan.row_NK], chosen)
    assert len(plan.row_NK.unique()) == chosen.numel() == len(plan.item_M)
    _check_rows(plan)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("capacity", [1, 5])
def test_gather_then_combine_weighs_each_item_by_its_gates(capacity: int) -> None:
    """Forward and gradients; an item whose choices were all dropped gives zero."""
    torch.manual_seed(0)
    gates_NK, experts_NK = torch.randn(20, 4).softmax(-1).topk(2)
    items_ND, gates_NK = torch.randn(20, 5, requires_grad=True), gates_NK.requires_grad_()
    for plan in (
        dispatch.dropless(experts_NK, 4),
        dispatch.limited(experts_NK[None], gates_NK[None].detach(), 4, capacity),
    ):
        kept_NK = torch.ones_like(experts_NK) if plan.kept_NK is None else plan.kept_NK
        y_ND = dispatch.local(items_ND, gates_NK, plan, lambda rows_MD, counts_E: 2 * rows_MD)
        expected_ND = 2 * items_ND * (gates_NK * kept_NK).sum(1, keepdim=True)
        torch.testing.assert_close(y_ND, expected_ND)
        weight = torch.linspace(-1, 1, 100).view(20, 5)
        found, expected = (torch.autograd.grad((y * weight).sum(), (items_ND, gates_NK)) for y in (y_ND, expected_ND))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("backend")
def test_sorted_order_is_stable() -> None:
    plan = dispatch.dropless(torch.tensor([[1, 0], [0, 1], [2, 0]]), 4)
    assert plan.item_M.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.row_NK.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert plan.chosen_E.tolist() == [3, 2, 1, 0]
