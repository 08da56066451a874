"""The linear map that all models here spend their time in, on the fastest product torch ships for it.

On a CPU in float32 `torch.nn.functional.linear` goes to MKL, which on processors not made by Intel runs at about half
the speed of oneDNN, which torch carries too but uses for low precision only. On those `linear` calls oneDNN where that
is possible in eager mode; it is `F.linear` (plus `F.gelu`) everywhere else: other devices and dtypes, autocast,
torch.compile, torch.export, tracing and torch.func. Both are float32 products that differ in rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from sparse_mlp.moe.dense import Parts, read_mlp
from sparse_mlp.moe.eager import onednn_is_faster, runs_eagerly_on_cpu
from sparse_mlp.moe.kernels.operator import keep_signature

__all__ = ["DType", "Device", "Linear", "Mlp", "linear"]

Device = torch.device | str | None
DType = torch.dtype | None

MIN_ROWS = 32  # below, a product is too small for the call's own cost to matter
HIDDEN_AT_ONCE = 2**22  # hidden values an Mlp holds at a time without gradients: 16 MB


def _fits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        runs_eagerly_on_cpu(*tensors)  # first: a compiler must not see, and guard on, the sizes below
        and onednn_is_faster()
        and all(t.dtype == torch.float32 for t in tensors)
        and x.dim() >= 2
        and x.numel() >= MIN_ROWS * x.shape[-1] > 0
    )


class _OneDnnLinear(torch.autograd.Function):
    """x W^T + b by oneDNN; its gradients are linear maps again, which can be differentiated in turn."""

    generate_vmap_rule = True  # for a call in a transform with tensors that are none of its own

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = linear(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            # torch's product reads transposed matrices where they are; oneDNN's copies them: up to twice the time.
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


keep_signature(_OneDnnLinear)


def _flops(x_shape, weight_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(x_shape) * weight_shape[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x W^T + b, or GELU of it (the exact one).

    x (..., in), weight (out, in), bias (out,) -> (..., out). Without gradients the GELU is applied inside the product.
    """
    if not _fits_onednn(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        # Rows in memory before the node, which saves them: the backward pass would copy a transposed x once more.
        y = _OneDnnLinear.apply(x.contiguous(), weight, bias)
        return F.gelu(y) if gelu else y
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


class Linear(nn.Linear):
    """`nn.Linear` on `linear`; `gelu=True` adds the activation that follows it. (..., in) -> (..., out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gelu: bool = False,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.gelu = gelu

    @classmethod
    def of(cls, layer: nn.Linear) -> Linear:
        """The same layer, with the same parameters, on `linear`."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))): the channel mixing of every block. (..., dim) -> (..., dim).

    Without gradients a CPU works through large inputs piece by piece: the hidden values stay in the cache, and out of
    the blocks over 32 MB that glibc takes from the system anew, page by page, every time. This keeps the time per pixel
    flat.
    """

    def __init__(self, dim: int, hidden_dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, gelu=True, device=device, dtype=dtype)
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not runs_eagerly_on_cpu(x):
            return self.fc2(self.fc1(x))
        rows = x.reshape(-1, x.shape[-1])
        pieces = rows.split(max(1, HIDDEN_AT_ONCE // self.fc1.out_features))
        if len(pieces) == 1:
            return self.fc2(self.fc1(x))
        return torch.cat([self.fc2(self.fc1(piece)) for piece in pieces]).view(x.shape)


@read_mlp.register
def _(mlp: Mlp) -> Parts:
    return Parts(("fc1",), "fc2", nn.GELU())
