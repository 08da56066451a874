"""Channels that read a neighbouring position: the one primitive under AS-MLP's axial shift and CycleMLP's cycle FC.

    out[b, i, j, c] = x[b, i + offsets[c], j, c]     (axis 1; along j for axis 2), 0 outside the map

Three forms with equal values. The plain one, slices and `torch.where`, is what a compiler fuses and an exporter writes.
In eager mode on a CPU it would cost several passes over memory; there a depthwise convolution with one-hot weights does
it in one, by oneDNN's kernel for channels-last maps. Products with 0 and 1 are exact, so values are the same to the bit
(an infinite value does turn its neighbours into NaN in this form). Maps whose memory is (B, C, H, W) are moved plane by
plane instead, at the speed of a copy.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_mlp.moe.eager import runs_eagerly_on_cpu

__all__ = ["shift_channels"]

MAX_RUNS = 16  # runs of equal offsets up to which moving planes one by one is the faster form


@functools.lru_cache(maxsize=256)
def _one_hot_kernel(offsets: tuple[int, ...], axis: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The depthwise kernel (C, 1, K, 1) or (C, 1, 1, K) that reads `offsets`, and its padding."""
    reach = max(abs(offset) for offset in offsets)
    with torch.inference_mode(False):  # the cached tensor may be used in training later
        kernel = torch.zeros(len(offsets), 1, 2 * reach + 1, dtype=dtype, device="cpu")
        kernel[torch.arange(len(offsets), device="cpu"), 0, torch.tensor(offsets, device="cpu") + reach] = 1
        return kernel.unsqueeze(3 if axis == 1 else 2), reach


def _shift_planes(x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:
    """The shift of a map whose memory is (B, C, H, W): each run of equal offsets is one move of whole planes."""
    planes = x.permute(0, 3, 1, 2)
    out = torch.empty_like(planes)
    size, unit = x.shape[axis], x.shape[2] if axis == 1 else 1
    start = 0
    for offset, run in itertools.groupby(offsets):
        stop = start + len(list(run))
        source, target = planes[:, start:stop], out[:, start:stop]
        kept = source.shape[2] * source.shape[3] - abs(offset) * unit
        if abs(offset) < size:
            flat = target.flatten(2).narrow(2, max(-offset, 0) * unit, kept)
            flat.copy_(source.flatten(2).narrow(2, max(offset, 0) * unit, kept))
        border = min(abs(offset), size)  # what came from beyond the border, or from a neighbouring row, is 0
        target.narrow(axis + 1, size - border if offset > 0 else 0, border).zero_()
        start = stop
    return out.permute(0, 2, 3, 1)


def _has_planes(x: Tensor, offsets: tuple[int, ...]) -> bool:
    """Whether `_shift_planes` fits: memory as (B, C, H, W), and few runs of equal offsets."""
    runs = sum(1 for _ in itertools.groupby(offsets))
    return runs <= MAX_RUNS and not x.is_contiguous() and x.permute(0, 3, 1, 2).is_contiguous()


class _EagerShift(torch.autograd.Function):
    """The shift as a depthwise convolution or by planes; its gradient is the opposite shift."""

    @staticmethod
    def forward(ctx, x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.offsets, ctx.axis = offsets, axis
        if _has_planes(x, offsets):
            return _shift_planes(x, offsets, axis)
        x = x.contiguous()
        kernel, reach = _one_hot_kernel(offsets, axis, x.dtype)
        padding = (reach, 0) if axis == 1 else (0, reach)
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=padding, groups=len(offsets)).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return shift_channels(grad, tuple(-offset for offset in ctx.offsets), ctx.axis), None, None


def _plain_shift(x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:
    reach = max(abs(offset) for offset in offsets)
    size = x.shape[axis]
    border = (0, 0, reach, reach) if axis == 2 else (0, 0, 0, 0, reach, reach)
    padded = F.pad(x, border)
    channel_offset = torch.tensor(offsets, device=x.device)
    out = torch.zeros_like(x)
    for offset in sorted(set(offsets)):
        out = torch.where(channel_offset == offset, padded.narrow(axis, reach + offset, size), out)
    return out


def shift_channels(x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:
    """Let channel c of x (B, H, W, C) read the position `offsets[c]` further along axis 1 (rows) or 2 (columns); 0
    outside.

    Any dtype and device; the result has the shape of x. Raises ValueError if there is not one offset per channel.
    """
    if x.dim() != 4 or x.shape[-1] != len(offsets) or axis not in (1, 2):
        raise ValueError(
            f"shift_channels needs (B, H, W, {len(offsets)}) and axis 1 or 2, got {tuple(x.shape)} and axis {axis}"
        )
    if not any(offsets):
        return x
    if x.is_floating_point() and runs_eagerly_on_cpu(x):
        return _EagerShift.apply(x, offsets, axis)
    return _plain_shift(x, offsets, axis)
