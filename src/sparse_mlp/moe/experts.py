"""E stacked two-layer MLPs: rows and counts in, rows out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.moe.autocast import autocast_type
from sparse_mlp.moe.kernels import accelerated

GELU = {"gelu": "none", "gelu_tanh": "tanh"}
BLOCKS_PER_EXPERT = 4


@accelerated
def apply_experts(
    rows_MD: Tensor, counts_E: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, approximate: str
) -> Tensor:
    """GELU(x w1 + b1) w2 + b2 of each row with the weights of its expert: (M, D) -> (M, D).

    The rows are in the order of experts, counts_E[e] of expert e; None means as many of each.

    Sizes must not depend on the counts, so that any transform, compiler or exporter can follow. So the rows are put
    into R E + E blocks of S = ceil(M / (R E)) + 1 rows, R = 4, each with one expert, and each block takes a copy of the
    weights of that one: sum_e ceil(count_e / S) <= M / S + E, so the blocks always suffice.
    """
    if counts_E is None:
        return _batched(rows_MD.unflatten(0, (w1.shape[0], -1)), w1, b1, w2, b2, approximate).flatten(0, 1)
    blocks = Blocks.of(counts_E, rows_MD.shape[0])
    expert_B, x_BSD = blocks.expert_B, blocks.take(rows_MD)
    return blocks.give_back(_batched(x_BSD, w1[expert_B], b1[expert_B], w2[expert_B], b2[expert_B], approximate))


class Blocks(NamedTuple):
    """Rows of experts in blocks of one expert each, B = R E + E of S rows.

    expert_B: of each block. row_BS: its rows, M, a row of zeros, past the expert's last. block_M, place_M: of each row.
    """

    expert_B: Tensor
    row_BS: Tensor
    block_M: Tensor
    place_M: Tensor

    @classmethod
    def of(cls, counts_E: Tensor, m: int) -> Blocks:
        num_experts, device = counts_E.shape[0], counts_E.device
        size = (m + BLOCKS_PER_EXPERT * num_experts - 1) // (BLOCKS_PER_EXPERT * num_experts) + 1
        last_E, last_block_E = counts_E.cumsum(0), ((counts_E + size - 1) // size).cumsum(0)
        first_E = torch.cat([last_E.new_zeros(1), last_E])[:-1]
        first_block_E = torch.cat([last_E.new_zeros(1), last_block_E])[:-1]
        block_B = torch.arange((BLOCKS_PER_EXPERT + 1) * num_experts, device=device)
        expert_B = (block_B.unsqueeze(1) >= last_block_E).sum(1).clamp(max=num_experts - 1)
        row_BS = (first_E + (block_B.unsqueeze(1) - first_block_E) * size)[block_B, expert_B].unsqueeze(1)
        row_BS = row_BS + torch.arange(size, device=device)
        row_BS = row_BS.where(row_BS < last_E[expert_B].unsqueeze(1), m)
        row_M = torch.arange(m, device=device)
        expert_M = (row_M.unsqueeze(1) >= last_E).sum(1)
        place_M = row_M - first_E[expert_M]
        block_M = place_M // size  # of the expert's own
        return cls(expert_B, row_BS, first_block_E[expert_M] + block_M, place_M - block_M * size)

    def take(self, rows_MD: Tensor) -> Tensor:
        """(M, D) -> (B, S, D)."""
        return torch.cat([rows_MD, rows_MD.new_zeros(1, rows_MD.shape[1])])[self.row_BS]

    def give_back(self, y_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (M, D)."""
        return y_BSD[self.block_M, self.place_M]


def _batched(x_ESD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, approximate: str) -> Tensor:
    hidden_ESH = torch.baddbmm(b1.unsqueeze(1), x_ESD, w1)
    return torch.baddbmm(b2.unsqueeze(1), F.gelu(hidden_ESH, approximate=approximate), w2)


def product_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else autocast_type(x) or x.dtype


class ExpertLinear(nn.Module):
    """E linear maps: weight (E, in, out), bias (E, out) or None. A call gives both; the experts multiply."""

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features, device=device, dtype=dtype))
        empty = torch.empty(num_experts, out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert from its own random start (equal experts would stay equal), as timm starts a Mixer's MLP."""
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=1e-6)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the type that products with these rows run in: autocast's where it is on."""
        dtype = product_type(rows)
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        num_experts, in_features, out_features = self.weight.shape
        return f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}"


class Experts(nn.Module):
    """E two-layer MLPs with one GELU, stacked: fc1 (E, D, H), fc2 (E, H, D). Other forms: `general_experts`.

    Input: rows (M, D) in the order of experts, and how many each has, (E,), or None for as many each. Output: (M, D).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        act: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gelu = GELU[act]
        self.fc1 = ExpertLinear(num_experts, dim, hidden_dim, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, device, dtype)

    def forward(self, rows_MD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        (w1, b1), (w2, b2) = self.fc1(rows_MD), self.fc2(rows_MD)
        assert b1 is not None and b2 is not None
        return apply_experts(rows_MD.to(product_type(rows_MD)), counts_E, w1, b1, w2, b2, self.gelu)
