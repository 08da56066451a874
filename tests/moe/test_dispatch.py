"""Where items go: V-MoE's slot examples by hand, and properties over sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mlp.moe import dispatch

# V-MoE's example: three items, K=2, capacity 2. First choices of all items are placed before second ones.
GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


def slots_of(prioritized: bool) -> dispatch.Slots:
    gates, experts = GATES.topk(2)
    return dispatch.capacity_slots(experts[None], gates[None], 3, capacity=2, prioritized=prioritized)


def test_plain_slots_by_hand() -> None:
    # first choices: item0 -> e0, item1 -> e0, item2 -> e2; second: item0 -> e2, item1 -> e2 (full), item2 -> e0 (full)
    slots = slots_of(prioritized=False)
    assert slots.slots_NK.tolist() == [[0, 5], [1, 6], [4, 6]]
    assert slots.kept_NK.tolist() == [[True, True], [True, False], [True, False]]


def test_prioritized_slots_by_hand() -> None:
    # by first gate: item2 (.6), item1 (.5), item0 (.4). First choices: item2 -> e2, item1 -> e0, item0 -> e0;
    # second: item2 -> e0 (full), item1 -> e2, item0 -> e2 (full)
    slots = slots_of(prioritized=True)
    assert slots.slots_NK.tolist() == [[1, 6], [0, 5], [4, 6]]
    assert slots.kept_NK.tolist() == [[True, False], [True, True], [True, False]]


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
def test_capacity_slots_are_a_valid_placing(routing, capacity: int, prioritized: bool) -> None:
    gates, chosen, experts = routing
    slots = dispatch.capacity_slots(chosen, gates, experts, capacity, prioritized)
    flat = chosen.flatten(0, 1)
    used = slots.slots_NK[slots.kept_NK].tolist()
    assert len(used) == len(set(used))  # no two assignments in one slot
    assert (slots.slots_NK[~slots.kept_NK] == slots.blocks * slots.size).all()
    owner = slots.slots_NK // slots.size
    assert (owner[slots.kept_NK] == flat[slots.kept_NK]).all()  # a slot belongs to the chosen expert
    # an expert drops only when its places in the group are all taken
    for chosen_g, kept_g in zip(chosen, slots.kept_NK.view_as(chosen), strict=True):
        for e in range(experts):
            assert kept_g[chosen_g == e].sum() == min(capacity, (chosen_g == e).sum())


@settings(max_examples=150, deadline=None)
@given(routings())
def test_blocks_hold_every_assignment_with_its_expert(routing) -> None:
    _, chosen, experts = routing
    chosen = chosen.flatten(0, 1)
    slots, expert_of_block = dispatch.block_slots(chosen, experts)
    flat = slots.slots_NK.flatten().tolist()
    assert len(flat) == len(set(flat))
    assert max(flat) < slots.blocks * slots.size
    assert (expert_of_block[slots.slots_NK // slots.size] == chosen).all()
    assert slots.blocks * slots.size <= (1 + 1 / 4) * chosen.numel() + 10 * experts  # two slots in each of 5 E blocks


@settings(max_examples=50, deadline=None)
@given(routings())
def test_fill_then_combine_weighs_each_item_by_its_gates(routing) -> None:
    gates, chosen, experts = routing
    slots = dispatch.capacity_slots(chosen, gates, experts, gates.shape[1])
    gates = gates.flatten(0, 1)
    items = torch.randn(len(gates), 5)
    torch.testing.assert_close(dispatch.combine(dispatch.fill(items, slots), slots, gates), items * gates.sum(1, True))


def test_sorted_order_is_stable() -> None:
    order, counts = dispatch.sort_by_expert(torch.tensor([[1, 0], [0, 1], [2, 0]]), 4)
    assert order.tolist() == [1, 2, 5, 0, 3, 4]
    assert counts.tolist() == [3, 2, 1, 0]
