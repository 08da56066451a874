"""The experts on a CPU in float32: matrix products by torch, or in C where an expert has few rows; the rest in C.

Expert by expert, so that the hidden activations of one are still in cache when the next operation reads them. Of these
only x w1 is kept for the backward, where autograd would keep two: GELU again costs less than to fetch it from memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from sparse_mlp.moe.kernels import library
from sparse_mlp.moe.kernels.operator import Gradients

FEW = 128  # rows of an expert up to which products in C are faster than a library's
LARGE = 2**23  # numbers of a weight's gradient, from which on it is written past the caches


@custom_op("sparse_mlp::experts", mutates_args=(), device_types="cpu")
def forward(
    rows_MD: Tensor,
    counts_E: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    approximate: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The rows' results, and x w1 of each row, which the backward needs; empty without `keep`."""
    num_experts, dim, hidden_dim = w1.shape
    counts, by_tanh = counts_E.tolist(), approximate == "tanh"
    if _has_few_rows(counts):
        ld_hidden, ld_out = library.size("row_stride", hidden_dim), library.size("row_stride", dim)
        hidden_MH, out_MD = rows_MD.new_empty(len(rows_MD), ld_hidden), rows_MD.new_empty(len(rows_MD), ld_out)
        act_MH = torch.empty_like(hidden_MH) if keep else hidden_MH
        given = (t.contiguous() for t in (rows_MD, _first_rows(counts_E), w1, b1, w2, b2))
        library.call("few_rows_experts", (*given, hidden_MH, act_MH, out_MD), num_experts, dim, hidden_dim, by_tanh)
        return out_MD[:, :dim], hidden_MH if keep else rows_MD.new_empty(0)
    out_MD, most = rows_MD.new_empty(rows_MD.shape), max(counts)
    act_nH = rows_MD.new_empty(most, hidden_dim)
    hidden_MH = rows_MD.new_empty(len(rows_MD) if keep else 0, hidden_dim)
    parts = zip(rows_MD.split(counts), out_MD.split(counts), w1, b1, w2, b2, strict=True)
    first = 0
    for x, out, w1_e, b1_e, w2_e, b2_e in parts:
        if n := len(x):
            act = act_nH[:n]
            hidden = torch.mm(x, w1_e, out=hidden_MH[first : first + n] if keep else act)
            library.call("bias_gelu", (hidden, b1_e.contiguous(), act), n, hidden_dim, by_tanh)
            torch.addmm(b2_e, act, w2_e, out=out)
            first += n
    return out_MD, hidden_MH if keep else rows_MD.new_empty(0)


@forward.register_fake
def _(rows_MD, counts_E, w1, b1, w2, b2, approximate, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_MD), rows_MD.new_empty((len(rows_MD), w1.shape[2]) if keep else 0)


@custom_op("sparse_mlp::experts_backward", mutates_args=(), device_types="cpu")
def backward(
    rows_MD: Tensor,
    counts_E: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    approximate: str,
    hidden_MH: Tensor,
    grad_MD: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, w1, b1, w2 and b2; empty for rows, w1 or w2 if not needed. Zero where an expert has no row."""
    (num_experts, dim, hidden_dim), counts, by_tanh = w1.shape, counts_E.tolist(), approximate == "tanh"
    dw1, dw2 = (
        torch.empty_like(w, memory_format=torch.contiguous_format) if need else w.new_empty(0)
        for w, need in zip((w1, w2), needed[1:], strict=True)
    )
    db1, db2 = b1.new_empty(b1.shape), b2.new_empty(b2.shape)
    for e in (e for e, n in enumerate(counts) if not n):
        for grad in (dw1, dw2, db1, db2):
            if grad.numel():
                grad[e].zero_()
    grads = dw1 if needed[1] else None, db1, dw2 if needed[2] else None, db2
    grad_MD = grad_MD.contiguous()
    sums = rows_MD.new_empty(torch.get_num_threads(), 2, max(dim, hidden_dim))
    if not _has_few_rows(counts):
        dx_MD = _many_rows_backward(rows_MD, counts, w1, b1, w2, by_tanh, hidden_MH, grad_MD, needed[0], grads, sums)
        return dx_MD, dw1, db1, dw2, db2
    dx_MD = rows_MD.new_empty(len(rows_MD), library.size("row_stride", dim))
    dout_MD, dhidden_MH, act_MH = torch.empty_like(dx_MD), torch.empty_like(hidden_MH), torch.empty_like(hidden_MH)
    given = (t.contiguous() for t in (rows_MD, _first_rows(counts_E), w1, b1, w2, hidden_MH, grad_MD))
    made = dx_MD if needed[0] else None, *grads, dout_MD, dhidden_MH, act_MH, sums
    sizes = num_experts, dim, hidden_dim, by_tanh, w1.numel() >= LARGE
    library.call("few_rows_experts_backward", (*given, *made), *sizes)
    return dx_MD[:, :dim] if needed[0] else rows_MD.new_empty(0), dw1, db1, dw2, db2


def _many_rows_backward(
    rows_MD: Tensor,
    counts: list[int],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    by_tanh: bool,
    hidden_MH: Tensor,
    grad_MD: Tensor,
    need_x: bool,
    grads: tuple[Tensor | None, ...],
    sums: Tensor,
) -> Tensor:
    """Writes the gradients of weights and biases into `grads`, those not needed None; returns that of the rows."""
    _, dim, hidden_dim = w1.shape
    dx_MD = rows_MD.new_empty(rows_MD.shape if need_x else 0)
    act_nH, dact_nH = (rows_MD.new_empty(max(counts), hidden_dim) for _ in range(2))
    first = 0
    for e, n in enumerate(counts):
        if not n:
            continue
        x, hidden, dy = (t[first : first + n] for t in (rows_MD, hidden_MH, grad_MD))
        act, (dw1_e, db1_e, dw2_e, db2_e) = act_nH[:n], (None if grad is None else grad[e] for grad in grads)
        dhidden = torch.mm(dy, w2[e].t(), out=dact_nH[:n])
        library.call(
            "bias_gelu_backward", (hidden, b1[e].contiguous(), dhidden, act, db1_e, sums), n, hidden_dim, by_tanh
        )
        library.call("column_sums", (dy, db2_e, sums), n, dim)
        if dw2_e is not None:
            torch.mm(act.t(), dy, out=dw2_e)
        if dw1_e is not None:
            torch.mm(x.t(), dhidden, out=dw1_e)
        if need_x:
            torch.mm(dhidden, w1[e].t(), out=dx_MD[first : first + n])
        first += n
    return dx_MD


def _has_few_rows(counts: list[int]) -> bool:
    """Whether C makes the products too: by how many rows an expert has, on average over the rows."""
    return sum(n * n for n in counts) <= FEW * sum(counts)


def _first_rows(counts_E: Tensor) -> Tensor:
    return torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])


def gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    if grads[0] is None:
        return (None,) * 7
    wanted = [needed[0], needed[2], needed[4]]
    dx, dw1, db1, dw2, db2 = backward(*inputs, kept[0], grads[0], wanted)
    dx_MD, dw1_E, dw2_E = (t if need else None for t, need in zip((dx, dw1, dw2), wanted, strict=True))
    return dx_MD, None, dw1_E, db1, dw2_E, db2, None


@register_flop_formula(torch.ops.sparse_mlp.experts)
def _flops(rows_shape, counts_shape, w1_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * rows_shape[0] * w1_shape[1] * w1_shape[2]


@register_flop_formula(torch.ops.sparse_mlp.experts_backward)
def _backward_flops(rows_shape, counts_shape, w1_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    needed = args[-1] if args and isinstance(args[-1], list) else kwargs["needed"]
    return 2 * (1 + sum(needed)) * rows_shape[0] * w1_shape[1] * w1_shape[2]
