"""float32 on a CPU in eager mode: C kernels, and matrix products by torch, or in C where an expert has few rows.

Each operator computes what the function of its name in router, balance, dispatch or experts defines, in one pass over
memory where torch needs several. What they save together: benchmarks/moe_layer.py, the table by backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sparse_mlp.moe import balance, dispatch, experts, router
from sparse_mlp.moe.kernels import cpu_experts, library
from sparse_mlp.moe.kernels.operator import Gradients, differentiable

MOST_EXPERTS = 512  # the kernels of the gates keep some vectors an expert on the stack


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


# ---- The router ----


@custom_op("sparse_mlp::top_gates", mutates_args=(), device_types="cpu")
def _top_gates(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    n, num_experts = logits_NE.shape
    gates_NK, experts_NK = _like_gates(logits_NE, top_k)
    library.call("top_gates", (logits_NE.contiguous(), experts_NK, gates_NK), n, num_experts, top_k)
    return gates_NK, experts_NK


@_top_gates.register_fake
def _like_gates(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (len(logits_NE), top_k)
    return logits_NE.new_empty(shape), logits_NE.new_empty(shape, dtype=torch.int64)


@custom_op("sparse_mlp::top_gates_backward", mutates_args=(), device_types="cpu")
def _top_gates_backward(logits_NE: Tensor, experts_NK: Tensor, grad_NK: Tensor) -> Tensor:
    grad_NE = torch.empty_like(logits_NE, memory_format=torch.contiguous_format)
    tensors = logits_NE.contiguous(), experts_NK.contiguous(), grad_NK.contiguous(), grad_NE
    library.call("top_gates_backward", tensors, *logits_NE.shape, experts_NK.shape[1])
    return grad_NE


def _top_gates_gradients(inputs: list[Any], kept: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
    return (None if grads[0] is None else _top_gates_backward(inputs[0], kept[0], grads[0])), None


# ---- Balance statistics ----


@custom_op("sparse_mlp::expert_totals", mutates_args=(), device_types="cpu")
def _expert_totals(logits_NE: Tensor, noisy_NE: Tensor, experts_NK: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    n, num_experts = logits_NE.shape
    sums = logits_NE.new_empty(2 * num_experts + 1)
    parts = logits_NE.new_empty(library.size("blocks_of", n), len(sums))
    tensors = logits_NE.contiguous(), noisy_NE.contiguous(), experts_NK.contiguous(), sums, parts
    library.call("expert_totals", tensors, n, num_experts, experts_NK.shape[1], noise_std=noise_std)
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
    library.call("expert_totals_backward", (*given, *grads), *sizes, noise_std=noise_std)
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
    library.call("sort_by_expert", tensors, experts_NK.numel(), experts_NK.shape[1], num_experts)
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
    library.call("gather", (items_ND.contiguous(), item_M.contiguous(), rows_MD), n, m, dim)
    return rows_MD


@_gather.register_fake
def _(items_ND: Tensor, item_M: Tensor) -> Tensor:
    return items_ND.new_empty(len(item_M), items_ND.shape[1])


@custom_op("sparse_mlp::combine", mutates_args=(), device_types="cpu")
def _combine(rows_MD: Tensor, row_NK: Tensor, gates_NK: Tensor | None) -> Tensor:
    (m, dim), (n, top_k) = rows_MD.shape, row_NK.shape
    rows_MD, y_ND = _dense_rows(rows_MD), rows_MD.new_empty(n, dim)
    gates_NK = None if gates_NK is None else gates_NK.contiguous()
    library.call("combine", (rows_MD, row_NK.contiguous(), gates_NK, y_ND), n, top_k, m, dim, rows_MD.stride(0))
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
    library.call("combine_backward", (*given, grad_MD, grad_NK, written), n, top_k, m, dim, rows_MD.stride(0))
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


# ---- The functions of moe/, by their names ----

_differentiable_gates = differentiable(router.top_gates, _top_gates, _top_gates_gradients, constant=(1,), kept=(1,))
_differentiable_totals = differentiable(balance.expert_totals, _expert_totals, _expert_totals_gradients, constant=(1,))
_differentiable_gather = differentiable(
    dispatch.gather, lambda items_ND, item_M, row_NK: (_gather(items_ND, item_M),), _gather_gradients
)
_differentiable_combine = differentiable(dispatch.combine, lambda *args: (_combine(*args),), _combine_gradients)
_differentiable_experts = differentiable(
    experts.apply_experts,
    lambda *args: cpu_experts.forward(*args, True),
    cpu_experts.gradients,
    constant=(1,),
    kept=(1,),
    without_gradient=lambda *args: cpu_experts.forward(*args, False),
)


def _apply_experts(rows_MD: Tensor, counts_E: Tensor | None, w1: Tensor, *others: Any) -> Tensor:
    if counts_E is None:  # every expert has as many
        counts_E = torch.full((len(w1),), len(rows_MD) // len(w1), device=rows_MD.device)
    return _differentiable_experts(rows_MD, counts_E, w1, *others)[0]


def _up_to_most_experts(plain: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """The fast form of a function of (N, E) logits, for E that it can take."""
    definition = plain.__wrapped__  # type: ignore[attr-defined]
    return lambda logits_NE, *args: (fast if logits_NE.shape[1] <= MOST_EXPERTS else definition)(logits_NE, *args)


OPERATORS: dict[str, Callable[..., Any]] = {
    "top_gates": _up_to_most_experts(router.top_gates, _differentiable_gates),
    "expert_totals": _up_to_most_experts(balance.expert_totals, _differentiable_totals),
    "sort_by_expert": _sort_by_expert,
    "gather": lambda *args: _differentiable_gather(*args)[0],
    "combine": lambda *args: _differentiable_combine(*args)[0],
    "apply_experts": _apply_experts,
}
