"""The experts on torch's grouped matrix products, for other devices and types, and under torch.compile.

`torch.nn.functional.grouped_mm` takes the counts as they lie on the device, so that nothing waits for them, and the
experts' weights as they are. Widths that are no multiple of 16 bytes, which it refuses, are padded here.

Not where every expert has as many rows: that is one batched product, as the definition has it. And not on a GPU that
has no kernel for it, for there torch copies the counts to the host and loops over the experts, which neither a CUDA
graph nor a queue of work that never waits can have; the definition copies weights instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(args: tuple[Any, ...]) -> bool:
    """Whether grouped products exist for these: rows in one of the types, and counts of them, on a real device."""
    rows_MD, counts_E = args[:2]
    if not isinstance(rows_MD, Tensor) or counts_E is None or rows_MD.dtype not in TYPES:
        return False
    if rows_MD.device.type == "cuda":
        return has_kernel(rows_MD.dtype, *_gpu(rows_MD.device.index))
    return rows_MD.device.type != "meta"


def has_kernel(dtype: torch.dtype, major: int, nvidia: bool = True) -> bool:
    """Whether torch has a grouped product of this type on a GPU of this compute capability: since Hopper, bfloat16."""
    return dtype == torch.bfloat16 and major in (9, 10) and nvidia


@torch.compiler.assume_constant_result
def _gpu(index: int) -> tuple[int, bool]:
    return torch.cuda.get_device_capability(index)[0], torch.version.hip is None


@custom_op("sparse_mlp::grouped_product", mutates_args=())
def product(rows_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert: (M, K), (E, K, N) -> (M, N). Those of expert e end before ends_E[e]."""
    width = weight_EKN.shape[2]
    multiple = 16 // rows_MK.element_size()
    k, n = -rows_MK.shape[1] % multiple, -width % multiple
    rows_MK = F.pad(rows_MK, (0, k)) if k else rows_MK.contiguous()
    if k or n:
        weight_EKN = F.pad(weight_EKN, (0, n, 0, k))
    elif not (weight_EKN.is_contiguous() or weight_EKN.mT.is_contiguous()):
        weight_EKN = weight_EKN.contiguous()
    return F.grouped_mm(rows_MK, weight_EKN, offs=ends_E)[:, :width].contiguous()


@custom_op("sparse_mlp::grouped_outer", mutates_args=())
def outer(rows_MK: Tensor, grad_MN: Tensor, ends_E: Tensor) -> Tensor:
    """The sum over each expert's rows of row x gradient: (M, K), (M, N) -> (E, K, N)."""
    width, height = grad_MN.shape[1], rows_MK.shape[1]
    multiple = 16 // rows_MK.element_size()
    rows_MK, grad_MN = (F.pad(t, (0, -t.shape[1] % multiple)).contiguous() for t in (rows_MK, grad_MN))
    result_EKN = F.grouped_mm(rows_MK.t(), grad_MN, offs=ends_E)[:, :height, :width].contiguous()
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return result_EKN.masked_fill_(empty_E[:, None, None], 0)  # not every kernel writes what has no rows


@product.register_fake
def _(rows_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return rows_MK.new_empty(rows_MK.shape[0], weight_EKN.shape[2])


@outer.register_fake
def _(rows_MK: Tensor, grad_MN: Tensor, ends_E: Tensor) -> Tensor:
    return rows_MK.new_empty(ends_E.shape[0], rows_MK.shape[1], grad_MN.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    rows_MK, weight_EKN, ends_E = ctx.saved_tensors
    need_rows, need_weight, _ = ctx.needs_input_grad
    grad_rows = product(grad_MN, weight_EKN.mT, ends_E) if need_rows else None
    return grad_rows, outer(rows_MK, grad_MN, ends_E) if need_weight else None, None


def _outer_backward(ctx: Any, grad_EKN: Tensor) -> tuple[Tensor | None, ...]:
    rows_MK, grad_MN, ends_E = ctx.saved_tensors
    return product(grad_MN, grad_EKN.mT, ends_E), product(rows_MK, grad_EKN, ends_E), None


register_autograd("sparse_mlp::grouped_product", _product_backward, setup_context=_save)
register_autograd("sparse_mlp::grouped_outer", _outer_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparse_mlp.grouped_product)
def _product_flops(rows_shape, weight_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * rows_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.sparse_mlp.grouped_outer)
def _outer_flops(rows_shape, grad_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * rows_shape[0] * rows_shape[1] * grad_shape[1]


def apply_experts(
    rows_MD: Tensor, counts_E: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, approximate: str
) -> Tensor:
    """See `experts.apply_experts`."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    ones_M1 = rows_MD.new_ones(rows_MD.shape[0], 1)  # biases as products too: their gradients are sums over rows
    hidden_MH = product(rows_MD, w1, ends_E) + product(ones_M1, b1.unsqueeze(1), ends_E)
    act_MH = F.gelu(hidden_MH, approximate=approximate)
    return product(act_MH, w2, ends_E) + product(ones_M1, b2.unsqueeze(1), ends_E)


def expert_linear(rows_MD: Tensor, counts_E: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `general_experts.expert_linear`."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    y_MN = product(rows_MD, weight, ends_E)
    return y_MN if bias is None else y_MN + product(rows_MD.new_ones(rows_MD.shape[0], 1), bias.unsqueeze(1), ends_E)


OPERATORS: dict[str, Callable[..., Any]] = {"apply_experts": apply_experts, "expert_linear": expert_linear}
