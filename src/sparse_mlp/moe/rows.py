"""What the experts do to rows of items between their matrix products, as plain torch; `compiled` has the same in C.

P rows, N items, K choices of an item, D width, H hidden. `out`, `act` and the like are written to and returned.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def gather(x_ND: Tensor, item_P: Tensor, out_PD: Tensor) -> Tensor:
    """Row p is item_P[p] of x."""
    return torch.index_select(x_ND, 0, item_P, out=out_PD)


def combine(rows_PD: Tensor, row_NK: Tensor) -> Tensor:
    """sum_k row_k of each item: (P, D) -> (N, D)."""
    first, *others = (rows_PD.index_select(0, row_N) for row_N in row_NK.unbind(1))
    return reduce(Tensor.add_, others, first)


def combine_gated(rows_PD: Tensor, row_NK: Tensor, gates_NK: Tensor, experts_NK: Tensor, bias_ED: Tensor) -> Tensor:
    """sum_k gate_k (row_k + bias of expert_k) of each item: (P, D) -> (N, D)."""
    first, *others = (
        (rows_PD.index_select(0, row_N) + bias_ED.index_select(0, expert_N)).mul_(gate_N.unsqueeze(1))
        for row_N, gate_N, expert_N in zip(*(t.unbind(1) for t in (row_NK, gates_NK, experts_NK)), strict=True)
    )
    return reduce(Tensor.add_, others, first)


def gelu(hidden_PH: Tensor, bias_H: Tensor, approximate: str, act_PH: Tensor) -> Tensor:
    """GELU(hidden + bias)."""
    torch.add(hidden_PH, bias_H, out=act_PH)
    return torch.ops.aten.gelu.out(act_PH, approximate=approximate, out=act_PH)


def gelu_backward(
    hidden_PH: Tensor, bias_H: Tensor, approximate: str, grad_PH: Tensor, act_PH: Tensor, grad_bias_H: Tensor
) -> None:
    """The same GELU again, and `grad_PH`, so far with respect to it, becomes the gradient with respect to hidden."""
    biased_PH = hidden_PH + bias_H
    torch.ops.aten.gelu.out(biased_PH, approximate=approximate, out=act_PH)
    torch.ops.aten.gelu_backward.grad_input(grad_PH, biased_PH, approximate=approximate, grad_input=grad_PH)
    _column_sums(grad_PH, grad_bias_H)


def gather_gated(
    grad_ND: Tensor,
    item_P: Tensor,
    gate_P: Tensor,
    out_PD: Tensor,
    bias_D: Tensor,
    dout_PD: Tensor,
    dgate_P: Tensor,
    dbias_D: Tensor,
) -> Tensor:
    """Through `y_item += gate_p (out_p + bias)`: gradients with respect to out, the gates and the bias."""
    torch.index_select(grad_ND, 0, item_P, out=dout_PD)
    torch.sum(dout_PD * (out_PD + bias_D), 1, out=dgate_P)
    dout_PD *= gate_P.unsqueeze(1)
    _column_sums(dout_PD, dbias_D)
    return dout_PD


def _column_sums(rows_PD: Tensor, out_D: Tensor) -> None:
    """As a product: torch's own sum over rows takes several times as long on a CPU."""
    torch.mm(rows_PD.new_ones(1, len(rows_PD)), rows_PD, out=out_D.unsqueeze(0))
