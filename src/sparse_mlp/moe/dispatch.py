"""From items to the rows that experts take, and back.

Legend, here and in all of `moe/`: N items, E experts, K choices per item, M = N K rows, D width, H hidden, C capacity,
G groups.

A *plan* says which item each row holds and in which row each choice of an item lies; rows are in the order of experts.
A *dispatcher* brings items to experts by a plan and their results back; `local` does so within a process.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_mlp.moe.kernels import accelerated

Experts = Callable[[Tensor, Tensor | None], Tensor]


class Plan(NamedTuple):
    """Where items go.

    item_M: the item of each row, N for an empty row. row_NK: the row of each choice, M for one that was dropped.
    chosen_E: choices of each expert, before drops. kept_NK: which are not dropped, or None where none can be.
    """

    item_M: Tensor
    row_NK: Tensor
    chosen_E: Tensor
    kept_NK: Tensor | None = None

    @property
    def counts_E(self) -> Tensor | None:
        """Rows of each expert; None if all have as many, as with a capacity."""
        return self.chosen_E if self.kept_NK is None else None


Dispatcher = Callable[[Tensor, Tensor, Plan, Experts], Tensor]


def local(items_ND: Tensor, gates_NK: Tensor, plan: Plan, experts: Experts) -> Tensor:
    """The gate-weighted sum of each item's results, all experts being here: (N, D) -> (N, D)."""
    rows_MD = gather(items_ND, plan.item_M, plan.row_NK)
    rows_MD = experts(rows_MD, plan.counts_E)
    return combine(rows_MD, plan.row_NK, gates_NK.to(rows_MD.dtype))


def dropless(experts_NK: Tensor, num_experts: int) -> Plan:
    """Every choice has a row; those of an expert are in the order of the items."""
    return Plan(*sort_by_expert(experts_NK, num_experts))


def limited(experts_GNK: Tensor, gates_GNK: Tensor, num_experts: int, capacity: int, prioritized: bool = False) -> Plan:
    """Each expert has `capacity` rows in each of G groups of N items: rows in the order expert, group, place.

    All first choices are placed before any second one, and items in their order or, `prioritized`, by falling first
    gate (Batch Prioritized Routing, V-MoE section 3.3). What finds no place is dropped.
    """
    groups, items, top_k = experts_GNK.shape
    queue_GNK = experts_GNK
    if prioritized:
        rank_GN1 = gates_GNK[..., 0].argsort(dim=1, descending=True, stable=True).unsqueeze(-1)
        queue_GNK = experts_GNK.gather(1, rank_GN1.expand(-1, -1, top_k))
    place_GM, chosen_E = positions(queue_GNK.transpose(1, 2).flatten(1), num_experts)
    place_GNK = place_GM.unflatten(1, (top_k, items)).transpose(1, 2)
    if prioritized:
        place_GNK = place_GNK.gather(1, rank_GN1.argsort(dim=1).expand(-1, -1, top_k))
    group_G11 = torch.arange(groups, device=experts_GNK.device)[:, None, None]
    kept_GNK = place_GNK < capacity
    rows = num_experts * groups * capacity
    row_GNK = ((experts_GNK * groups + group_G11) * capacity + place_GNK).where(kept_GNK, rows)
    row_NK = row_GNK.flatten(0, 1)
    item_NK = torch.arange(groups * items, device=row_NK.device).unsqueeze(1).expand_as(row_NK)
    item_M = row_NK.new_full((rows + 1,), groups * items).scatter(0, row_NK.flatten(), item_NK.flatten())[:rows]
    return Plan(item_M, row_NK, chosen_E, kept_GNK.flatten(0, 1))


def capacity(items: int, num_experts: int, top_k: int, ratio: float) -> int:
    """Rows of one expert: ceil(items K ratio / E) (V-MoE). Integers only, so that it also holds for symbolic sizes."""
    exact = Fraction(ratio).limit_denominator(10_000)
    return -(-items * top_k * exact.numerator // (exact.denominator * num_experts))


def positions(experts_GM: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """How many choices before each one, in its group, are of the same expert, (G, M); and the choices of each, (E,)."""
    hot_GME = (experts_GM.unsqueeze(-1) == torch.arange(num_experts, device=experts_GM.device)).to(torch.int32)
    rank_GME = hot_GME.cumsum(1, dtype=torch.int32)
    return rank_GME.gather(2, experts_GM.unsqueeze(-1)).squeeze(-1).long() - 1, hot_GME.sum((0, 1))


@accelerated
def sort_by_expert(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices sorted by expert: item of each row (M,), row of each choice (N, K), choices of each expert (E,)."""
    experts_M = experts_NK.flatten()
    place_1M, chosen_E = positions(experts_M.unsqueeze(0), num_experts)
    row_M = (chosen_E.cumsum(0) - chosen_E)[experts_M] + place_1M[0]
    item_NK = torch.arange(experts_NK.shape[0], device=row_M.device).unsqueeze(1).expand_as(experts_NK)
    item_M = torch.empty_like(row_M).scatter(0, row_M, item_NK.flatten())
    return item_M, row_M.view_as(experts_NK), chosen_E


@accelerated
def gather(items_ND: Tensor, item_M: Tensor, row_NK: Tensor) -> Tensor:
    """The rows of a plan: (N, D) -> (M, D), an empty one zero."""
    return torch.cat([items_ND, items_ND.new_zeros(1, items_ND.shape[1])])[item_M]


@accelerated
def combine(rows_MD: Tensor, row_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """The gate-weighted sum of each item's rows: (M, D) -> (N, D); a dropped choice adds zero."""
    padded = torch.cat([rows_MD, rows_MD.new_zeros(1, rows_MD.shape[1])])
    return (padded[row_NK] * gates_NK.unsqueeze(-1)).sum(1)
