"""float32 on a CPU in eager mode: C kernels, and matrix products by torch, or in C where an expert has few rows.

Each operator computes what the function of its name in router, balance, dispatch or experts defines, in one pass over
memory where torch needs several. What they save together: benchmarks/moe_layer.py, the table by backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from sparse_mlp.moe import balance, dispatch, experts, router
from sparse_mlp.moe.kernels import library
from sparse_mlp.moe.kernels.operator import Gradients, differentiable

FEW = 128  # rows of an expert up to which products in C are faster than a library's
LARGE = 2**23  # numbers of a weight's gradient, from which on it is written past the caches
MOST_EXPERTS = 512  # the kernels of the gates keep some vectors an expert on the stack

_POINTERS = {
    "column_sums": "rows total parts",
    "gather": "x item out",
    "combine": "rows row gate y",
    "combine_backward": "grad rows row gate grad_rows grad_gate written",
    "sort_by_expert": "expert item row count",
    "top_gates": "logits chosen gates",
    "top_gates_backward": "logits chosen grad_gates grad_logits",
    "expert_totals": "logits noisy chosen totals parts",
    "expert_totals_backward": "logits noisy chosen grad_totals grad_logits grad_noisy",
    "bias_gelu": "hidden bias act",
    "bias_gelu_backward": "hidden bias grad act grad_bias parts",
    "few_rows_experts": "x first_row w1 b1 w2 b2 hidden act out",
    "few_rows_experts_backward": (
        "x first_row w1 b1 w2 hidden grad grad_x grad_w1 grad_b1 grad_w2 grad_b2 grad_rows grad_hidden act parts"
    ),
}
_SIZES = {
    "column_sums": "n d",
    "gather": "n m d",
    "combine": "n k m d stride",
    "combine_backward": "n k m d stride",
    "sort_by_expert": "m k experts",
    "top_gates": "n experts k",
    "top_gates_backward": "n experts k",
    "expert_totals": "n experts k",
    "expert_totals_backward": "n experts k",
    "bias_gelu": "n d by_tanh",
    "bias_gelu_backward": "n d by_tanh",
    "few_rows_experts": "experts d h by_tanh",
    "few_rows_experts_backward": "experts d h by_tanh large",
}


def serves(args: tuple[Any, ...]) -> bool:
    """Whether these are float32 (or whole) numbers on a CPU, not being traced, and there is a library."""
    return (
        all(
            arg.device.type == "cpu" and (arg.dtype == torch.float32 or not arg.is_floating_point())
            for arg in args
            if isinstance(arg, Tensor)
        )
        and not torch.jit.is_tracing()
        and not isinstance(library.load(), str)
    )


@cache
def _struct(name: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in _POINTERS[name].split()]
    fields += [(field, ctypes.c_int64) for field in (*_SIZES[name].split(), "threads")]
    if name.startswith("expert_totals"):
        fields.append(("noise_std", ctypes.c_double))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _call(name: str, tensors: tuple[Tensor | None, ...], *sizes: int, noise_std: float | None = None) -> None:
    """Run a C function; the tensors are in the order of its struct, contiguous, and alive until it returns."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    values = [*pointers, *sizes, torch.get_num_threads(), *([] if noise_std is None else [noise_std])]
    getattr(library.load(), name)(ctypes.byref(_struct(name)(*values)))


def _size(name: str, value: int) -> int:
    return getattr(library.load(), name)(value)


# ---- The router ----


@custom_op("sparse_mlp::top_gates", mutates_args=(), device_types="cpu")
def _top_gates(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    n, num_experts = logits_NE.shape
    gates_NK, experts_NK = _like_gates(logits_NE, top_k)
    _call("top_gates", (logits_NE.contiguous(), experts_NK, gates_NK), n, num_experts, top_k)
    return gates_NK, experts_NK


@_top_gates.register_fake
def _like_gates(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (len(logits_NE), top_k)
    return logits_NE.new_empty(shape), logits_NE.new_empty(shape, dtype=torch.int64)


@custom_op("sparse_mlp::top_gates_backward", mutates_args=(), device_types="cpu")
def _top_gates_backward(logits_NE: Tensor, experts_NK: Tensor, grad_NK: Tensor) -> Tensor:
    grad_NE = torch.empty_like(logits_NE, memory_format=torch.contiguous_format)
    tensors = logits_NE.contiguous(), experts_NK.contiguous(), grad_NK.contiguous(), grad_NE
    _call("top_gates_backward", tensors, *logits_NE.shape, experts_NK.shape[1])
    return grad_NE


def _top_gates_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    return (None if grads[0] is None else _top_gates_backward(inputs[0], kept[0], grads[0])), None


# ---- Balance statistics ----


@custom_op("sparse_mlp::expert_totals", mutates_args=(), device_types="cpu")
def _expert_totals(logits_NE: Tensor, noisy_NE: Tensor, experts_NK: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    n, num_experts = logits_NE.shape
    sums = logits_NE.new_empty(2 * num_experts + 1)
    parts = logits_NE.new_empty(_size("blocks_of", n), len(sums))
    tensors = logits_NE.contiguous(), noisy_NE.contiguous(), experts_NK.contiguous(), sums, parts
    _call("expert_totals", tensors, n, num_experts, experts_NK.shape[1], noise_std=noise_std)
    kinds = 2 if noise_std > 0 else 1
    return sums[: kinds * num_experts].view(kinds, -1).clone(), sums[-1].clone()


@_expert_totals.register_fake
def _(logits_NE: Tensor, noisy_NE: Tensor, experts_NK: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    return logits_NE.new_empty(2 if noise_std > 0 else 1, logits_NE.shape[1]), logits_NE.new_empty(())


@custom_op("sparse_mlp::expert_totals_backward", mutates_args=(), device_types="cpu")
def _expert_totals_backward(
    logits_NE: Tensor, noisy_NE: Tensor, experts_NK: Tensor, noise_std: float, grad_totals: Tensor
) -> tuple[Tensor, Tensor]:
    grads = [torch.empty_like(logits_NE, memory_format=torch.contiguous_format) for _ in range(2)]
    given = logits_NE.contiguous(), noisy_NE.contiguous(), experts_NK.contiguous(), grad_totals.contiguous()
    sizes = *logits_NE.shape, experts_NK.shape[1]
    _call("expert_totals_backward", (*given, *grads), *sizes, noise_std=noise_std)
    return grads[0], grads[1]


def _expert_totals_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    if grads[0] is None:
        return (None,) * 4
    grad_logits, grad_noisy = _expert_totals_backward(*inputs, grads[0])
    return grad_logits, grad_noisy if inputs[-1] > 0 else None, None, None


# ---- Dispatch ----


@custom_op("sparse_mlp::sort_by_expert", mutates_args=(), device_types="cpu")
def _sort_by_expert(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    item_M, row_NK, counts_E = _like_sorted(experts_NK, num_experts)
    tensors = experts_NK.contiguous(), item_M, row_NK, counts_E
    _call("sort_by_expert", tensors, experts_NK.numel(), experts_NK.shape[1], num_experts)
    return item_M, row_NK, counts_E


@_sort_by_expert.register_fake
def _like_sorted(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        experts_NK.new_empty(experts_NK.numel()),
        experts_NK.new_empty(experts_NK.shape),
        experts_NK.new_empty(num_experts),
    )


@custom_op("sparse_mlp::gather", mutates_args=(), device_types="cpu")
def _gather(items_ND: Tensor, item_M: Tensor) -> Tensor:
    (n, dim), m = items_ND.shape, len(item_M)
    rows_MD = items_ND.new_empty(m, dim)
    _call("gather", (items_ND.contiguous(), item_M.contiguous(), rows_MD), n, m, dim)
    return rows_MD


@_gather.register_fake
def _(items_ND: Tensor, item_M: Tensor) -> Tensor:
    return items_ND.new_empty(len(item_M), items_ND.shape[1])


@custom_op("sparse_mlp::combine", mutates_args=(), device_types="cpu")
def _combine(rows_MD: Tensor, row_NK: Tensor, gates_NK: Tensor | None) -> Tensor:
    (m, dim), (n, top_k) = rows_MD.shape, row_NK.shape
    rows_MD, y_ND = _dense_rows(rows_MD), rows_MD.new_empty(n, dim)
    gates_NK = None if gates_NK is None else gates_NK.contiguous()
    _call("combine", (rows_MD, row_NK.contiguous(), gates_NK, y_ND), n, top_k, m, dim, rows_MD.stride(0))
    return y_ND


@_combine.register_fake
def _(rows_MD: Tensor, row_NK: Tensor, gates_NK: Tensor | None) -> Tensor:
    return rows_MD.new_empty(len(row_NK), rows_MD.shape[1])


@custom_op("sparse_mlp::combine_backward", mutates_args=(), device_types="cpu")
def _combine_backward(rows_MD: Tensor, row_NK: Tensor, gates_NK: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    (m, dim), (n, top_k) = rows_MD.shape, row_NK.shape
    rows_MD = _dense_rows(rows_MD)
    grad_MD, grad_NK = rows_MD.new_empty(m, dim), gates_NK.new_empty(n, top_k)
    given = grad_ND.contiguous(), rows_MD, row_NK.contiguous(), gates_NK.contiguous()
    written = torch.zeros(m, dtype=torch.bool, device=rows_MD.device)
    _call("combine_backward", (*given, grad_MD, grad_NK, written), n, top_k, m, dim, rows_MD.stride(0))
    return grad_MD, grad_NK


def _dense_rows(rows_MD: Tensor) -> Tensor:
    return rows_MD if rows_MD.stride(1) == 1 and rows_MD.stride(0) >= rows_MD.shape[1] else rows_MD.contiguous()


def _gather_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    return (None if grads[0] is None else _combine(grads[0], inputs[2], None)), None, None


def _combine_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    if grads[0] is None:
        return (None,) * 3
    grad_MD, grad_NK = _combine_backward(*inputs, grads[0])
    return grad_MD, None, grad_NK


# ---- Experts ----


@custom_op("sparse_mlp::experts", mutates_args=(), device_types="cpu")
def _experts(
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
        ld_hidden, ld_out = _size("row_stride", hidden_dim), _size("row_stride", dim)
        hidden_MH, out_MD = rows_MD.new_empty(len(rows_MD), ld_hidden), rows_MD.new_empty(len(rows_MD), ld_out)
        act_MH = torch.empty_like(hidden_MH) if keep else hidden_MH
        given = (t.contiguous() for t in (rows_MD, _first_rows(counts_E), w1, b1, w2, b2))
        _call("few_rows_experts", (*given, hidden_MH, act_MH, out_MD), num_experts, dim, hidden_dim, by_tanh)
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
            _call("bias_gelu", (hidden, b1_e.contiguous(), act), n, hidden_dim, by_tanh)
            torch.addmm(b2_e, act, w2_e, out=out)
            first += n
    return out_MD, hidden_MH if keep else rows_MD.new_empty(0)


@_experts.register_fake
def _(rows_MD, counts_E, w1, b1, w2, b2, approximate, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_MD), rows_MD.new_empty((len(rows_MD), w1.shape[2]) if keep else 0)


@custom_op("sparse_mlp::experts_backward", mutates_args=(), device_types="cpu")
def _experts_backward(
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
    counts = counts_E.tolist()
    grads = (*(torch.empty_like(w) if need else w.new_empty(0) for w, need in zip((w1, w2), needed[1:], strict=True)),)
    dw1, dw2, db1, db2 = (t.contiguous() for t in (*grads, torch.empty_like(b1), torch.empty_like(b2)))
    for e in (e for e, n in enumerate(counts) if not n):
        for grad in (dw1, dw2, db1, db2):
            if grad.numel():
                grad[e].zero_()
    run = _few_rows_backward if _has_few_rows(counts) else _many_rows_backward
    made = dw1 if needed[1] else None, db1, dw2 if needed[2] else None, db2
    dx_MD = run(rows_MD, counts_E, w1, b1, w2, approximate == "tanh", hidden_MH, grad_MD.contiguous(), needed[0], *made)
    return dx_MD, dw1, db1, dw2, db2


def _few_rows_backward(
    rows_MD: Tensor,
    counts_E: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    by_tanh: bool,
    hidden_MH: Tensor,
    grad_MD: Tensor,
    need_x: bool,
    *grads: Tensor | None,
) -> Tensor:
    num_experts, dim, hidden_dim = w1.shape
    dx_MD = rows_MD.new_empty(len(rows_MD), _size("row_stride", dim))
    dout_MD, dhidden_MH, act_MH = torch.empty_like(dx_MD), torch.empty_like(hidden_MH), torch.empty_like(hidden_MH)
    parts = rows_MD.new_empty(torch.get_num_threads(), 2, max(dim, hidden_dim))
    given = (t.contiguous() for t in (rows_MD, _first_rows(counts_E), w1, b1, w2, hidden_MH, grad_MD))
    made = dx_MD if need_x else None, *grads, dout_MD, dhidden_MH, act_MH, parts
    sizes = num_experts, dim, hidden_dim, by_tanh, w1.numel() >= LARGE
    _call("few_rows_experts_backward", (*given, *made), *sizes)
    return dx_MD[:, :dim] if need_x else rows_MD.new_empty(0)


def _many_rows_backward(
    rows_MD: Tensor,
    counts_E: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    by_tanh: bool,
    hidden_MH: Tensor,
    grad_MD: Tensor,
    need_x: bool,
    *grads: Tensor | None,
) -> Tensor:
    counts, (_, dim, hidden_dim) = counts_E.tolist(), w1.shape
    dx_MD = rows_MD.new_empty(rows_MD.shape if need_x else 0)
    act_nH, dact_nH = (rows_MD.new_empty(max(counts), hidden_dim) for _ in range(2))
    sums = rows_MD.new_empty(torch.get_num_threads(), 2, max(dim, hidden_dim))
    first = 0
    for e, n in enumerate(counts):
        if not n:
            continue
        x, hidden, dy = (t[first : first + n] for t in (rows_MD, hidden_MH, grad_MD))
        act, (dw1_e, db1_e, dw2_e, db2_e) = act_nH[:n], (None if grad is None else grad[e] for grad in grads)
        dhidden = torch.mm(dy, w2[e].t(), out=dact_nH[:n])
        _call("bias_gelu_backward", (hidden, b1[e].contiguous(), dhidden, act, db1_e, sums), n, hidden_dim, by_tanh)
        _call("column_sums", (dy, db2_e, sums), n, dim)
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


def _experts_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    if grads[0] is None:
        return (None,) * 7
    wanted = [needed[0], needed[2], needed[4]]
    dx, dw1, db1, dw2, db2 = _experts_backward(*inputs, kept[0], grads[0], wanted)
    dx_MD, dw1_E, dw2_E = (t if need else None for t, need in zip((dx, dw1, dw2), wanted, strict=True))
    return dx_MD, None, dw1_E, db1, dw2_E, db2, None


@register_flop_formula(torch.ops.sparse_mlp.experts)
def _experts_flops(rows_shape, counts_shape, w1_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * rows_shape[0] * w1_shape[1] * w1_shape[2]


@register_flop_formula(torch.ops.sparse_mlp.experts_backward)
def _experts_backward_flops(rows_shape, counts_shape, w1_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    needed = args[-1] if args and isinstance(args[-1], list) else kwargs["needed"]
    return 2 * (1 + sum(needed)) * rows_shape[0] * w1_shape[1] * w1_shape[2]


# ---- The functions of moe/, by their names ----

_differentiable_gates = differentiable(router.top_gates, _top_gates, _top_gates_gradients, constant=(1,), kept=(1,))
_differentiable_totals = differentiable(balance.expert_totals, _expert_totals, _expert_totals_gradients, constant=(1,))
_differentiable_gather = differentiable(
    dispatch.gather, lambda items_ND, item_M, row_NK: (_gather(items_ND, item_M),), _gather_gradients
)
_differentiable_combine = differentiable(dispatch.combine, lambda *args: (_combine(*args),), _combine_gradients)
_differentiable_experts = differentiable(
    experts.apply_experts,
    lambda *args: _experts(*args, True),
    _experts_gradients,
    constant=(1,),
    kept=(1,),
    without_gradient=lambda *args: _experts(*args, False),
)


def _apply_experts(rows_MD: Tensor, counts_E: Tensor | None, w1: Tensor, *others: Any) -> Tensor:
    if counts_E is None:  # every expert has as many
        counts_E = torch.full((len(w1),), len(rows_MD) // len(w1), device=rows_MD.device)
    return _differentiable_experts(rows_MD, counts_E, w1, *others)[0]


OPERATORS: dict[str, Callable[..., Any]] = {
    "top_gates": _differentiable_gates,
    "expert_totals": _differentiable_totals,
    "sort_by_expert": _sort_by_expert,
    "gather": lambda *args: _differentiable_gather(*args)[0],
    "combine": lambda *args: _differentiable_combine(*args)[0],
    "apply_experts": _apply_experts,
}
