"""From items to the order in which experts take them, and back.

Legend, here and in all of `moe/`: N items, E experts, K choices per item, D width, H hidden, C capacity, G groups,
M = N K assignments, B blocks of S slots.

A *slot* is a row of the buffer that the experts work on. Everything here has static shapes and never waits for the
device, except `sort_by_expert`, whose counts the caller reads.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS_PER_EXPERT = 4


class Slots(NamedTuple):
    """Where each assignment goes, in `blocks` blocks of `size` slots; a block is worked on by one expert.

    `slots_NK` are in [0, blocks * size), or blocks * size for a dropped assignment; `kept_NK` says which are kept.
    """

    slots_NK: Tensor
    kept_NK: Tensor
    blocks: int
    size: int


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Assignments ordered by expert, items in their own order within one: (order_M into the flat (N, K), counts_E)."""
    flat_M = experts_NK.reshape(-1)
    order_M = flat_M.argsort(stable=True)
    return order_M, torch.bincount(flat_M, minlength=num_experts)


def capacity(items: int, num_experts: int, top_k: int, ratio: float) -> int:
    """Slots of one expert: ceil(items K ratio / E) (V-MoE). Integers only, so that it also holds for symbolic sizes."""
    exact = Fraction(ratio).limit_denominator(10_000)
    return -(-items * top_k * exact.numerator // (exact.denominator * num_experts))


def positions(experts_GM: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """How many assignments before each one, in its group, chose the same expert: (positions_GM, counts_GE)."""
    hot_GME = (experts_GM.unsqueeze(-1) == torch.arange(num_experts, device=experts_GM.device)).to(torch.int32)
    rank_GME = hot_GME.cumsum(1, dtype=torch.int32)
    return rank_GME.gather(2, experts_GM.unsqueeze(-1)).squeeze(-1).long() - 1, hot_GME.sum(1)


def capacity_slots(
    experts_GNK: Tensor, gates_GNK: Tensor, num_experts: int, capacity: int, prioritized: bool = False
) -> Slots:
    """Each expert's `capacity` slots in each of G groups of N items; slot order is expert, group, place.

    All first choices are placed before any second one, and items in their order or, `prioritized`, by falling first
    gate (Batch Prioritized Routing, V-MoE section 3.3). What finds no place is dropped. Returns slots of the
    (G N, K) assignments.
    """
    groups, items, top_k = experts_GNK.shape
    queue_GNK = experts_GNK
    if prioritized:
        rank_GN1 = gates_GNK[..., 0].argsort(dim=1, descending=True, stable=True).unsqueeze(-1)
        queue_GNK = experts_GNK.gather(1, rank_GN1.expand(-1, -1, top_k))
    place_GM, _ = positions(queue_GNK.transpose(1, 2).flatten(1), num_experts)
    place_GNK = place_GM.unflatten(1, (top_k, items)).transpose(1, 2)
    if prioritized:
        place_GNK = place_GNK.gather(1, rank_GN1.argsort(dim=1).expand(-1, -1, top_k))
    group_G11 = torch.arange(groups, device=experts_GNK.device)[:, None, None]
    slots_GNK = (experts_GNK * groups + group_G11) * capacity + place_GNK
    kept_GNK = place_GNK < capacity
    slots_NK = slots_GNK.where(kept_GNK, num_experts * groups * capacity).flatten(0, 1)
    return Slots(slots_NK, kept_GNK.flatten(0, 1), num_experts, groups * capacity)


def block_slots(experts_NK: Tensor, num_experts: int) -> tuple[Slots, Tensor]:
    """Dropless with static shapes: R E + E blocks of S = ceil(N K / (R E)) + 1 slots, R = 4; each block has one expert.

    Every expert's items fill whole blocks, the last one in part: sum_e ceil(n_e / S) <= N K / S + E, so the blocks
    always suffice. Returns the slots and the expert of each block. The price: 1/R more rows to work on, and a copy
    of the weights per block. Serves `torch.compile` and `torch.export`, where the size of an expert's load cannot be
    read; eager mode sorts instead.
    """
    top_k = experts_NK.shape[1]
    experts_1M = experts_NK.reshape(1, -1)
    blocks = (BLOCKS_PER_EXPERT + 1) * num_experts
    size = (experts_NK.shape[0] * top_k + BLOCKS_PER_EXPERT * num_experts - 1) // (BLOCKS_PER_EXPERT * num_experts) + 1
    place_1M, counts_1E = positions(experts_1M, num_experts)
    last_E = ((counts_1E[0] + size - 1) // size).cumsum(0)  # first block after each expert's
    first_E = torch.cat([last_E.new_zeros(1), last_E[:-1]])
    slots_NK = (first_E[experts_1M] * size + place_1M).view_as(experts_NK)
    block_ids = torch.arange(blocks, device=experts_NK.device)
    expert_of_block = (block_ids[:, None] >= last_E).sum(1).clamp(max=num_experts - 1)
    return Slots(slots_NK, torch.ones_like(slots_NK, dtype=torch.bool), blocks, size), expert_of_block


def fill(items_ND: Tensor, slots: Slots) -> Tensor:
    """Items into their slots: (N, D) -> (blocks, size, D); empty slots are zero."""
    n = items_ND.shape[0]
    # indexed by block and place: a flat buffer could not be viewed as blocks when exported with a dynamic batch
    row_BS = torch.full((slots.blocks + 1, slots.size), n, device=items_ND.device)
    rows_NK = torch.arange(n, device=items_ND.device).unsqueeze(1).expand_as(slots.slots_NK)
    block_NK = slots.slots_NK // slots.size
    row_BS = row_BS.index_put((block_NK, slots.slots_NK - block_NK * slots.size), rows_NK)
    padded = torch.cat([items_ND, items_ND.new_zeros(1, items_ND.shape[1])])
    return F.embedding(row_BS[: slots.blocks], padded)


def combine(slots_BSD: Tensor, slots: Slots, gates_NK: Tensor) -> Tensor:
    """Gate-weighted sum of each item's slots: (blocks, size, D) -> (N, D); a dropped assignment adds zero."""
    n, top_k = gates_NK.shape
    dim = slots_BSD.shape[-1]
    # unbind, not flatten, for the same reason as in `fill`
    padded = torch.cat([*slots_BSD.unbind(0), slots_BSD.new_zeros(1, dim)])
    chosen_NKD = padded.index_select(0, slots.slots_NK.reshape(-1)).view(n, top_k, dim)
    return (chosen_NKD * gates_NK.to(slots_BSD.dtype).unsqueeze(-1)).sum(1)
