"""Channels that read a neighbouring position: the one primitive under AS-MLP's axial shift and CycleMLP's cycle FC.

    out[b, i, j, c] = x[b, i + offsets[c], j, c]     (axis 1; along j for axis 2), 0 outside the map

Three forms with equal values. The plain one, slices and `torch.where`, is what a compiler fuses and an exporter writes.
In eager mode on a CPU it would cost several passes over memory; there a depthwise convolution with one-hot weights does
it in one, by oneDNN's kernel for channels-last maps. Products with 0 and 1 are exact, so values are the same to the bit
(an infinite value does turn its neighbours into NaN in this form). Where the memory is (B, C, H, W) and few runs of
channels are moved alike (axial shift), each run is one copy from a displaced stretch of memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

from sparse_mlp.moe.eager import runs_eagerly_on_cpu
from sparse_mlp.moe.kernels.operator import keep_signature

__all__ = ["shift_channels"]

MAX_RUNS = 16  # runs of equal offsets up to which moving planes run by run is the faster form


@functools.lru_cache(maxsize=256)
def _one_hot_kernel(offsets: tuple[int, ...], axis: int, dtype: torch.dtype) -> Tensor:
    """The depthwise kernel (C, 1, K, 1) or (C, 1, 1, K), K odd, that reads `offsets`."""
    reach = max(abs(offset) for offset in offsets)
    with torch.inference_mode(False):  # the cached tensor may be used in training later
        kernel = torch.zeros(len(offsets), 1, 2 * reach + 1, dtype=dtype, device="cpu")
        kernel[torch.arange(len(offsets), device="cpu"), 0, torch.tensor(offsets, device="cpu") + reach] = 1
        return kernel.unsqueeze(3 if axis == 1 else 2)


def _runs(offsets: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal offsets: (offset, first channel, channel after the last)."""
    start = 0
    for offset, run in itertools.groupby(offsets):
        stop = start + len(list(run))
        yield offset, start, stop
        start = stop


@functools.lru_cache(maxsize=256)
def _has_few_runs(offsets: tuple[int, ...]) -> bool:
    return sum(1 for _ in _runs(offsets)) <= MAX_RUNS


def _shift_planes(x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:
    """The shift of a map whose memory is (B, C, H, W): a run is one stretch of each image's memory."""
    planes = x.permute(0, 3, 1, 2)
    out = torch.empty_like(planes)
    source, target = planes.flatten(1), out.flatten(1)
    axis, size, plane, image = axis + 1, x.shape[axis], x.shape[1] * x.shape[2], source.shape[1]
    for offset, start, stop in _runs(offsets):
        step = offset * planes.stride(axis)
        first, last = max(start * plane, -step), min(stop * plane, image - step)
        if first < last:
            target.narrow(1, first, last - first).copy_(source.narrow(1, first + step, last - first))
        border = min(abs(offset), size)
        if border:  # what came from beyond it is of another row or channel
            out.narrow(1, start, stop - start).narrow(axis, size - border if offset > 0 else 0, border).zero_()
    return out.permute(0, 2, 3, 1)


# Not `custom_op`: its checks would be a tenth of the call's time.
torch.library.define("sparse_mlp::pick_neighbours", "(Tensor maps, Tensor kernel) -> Tensor")


@torch.library.impl("sparse_mlp::pick_neighbours", "cpu")
def _pick_neighbours(maps: Tensor, kernel: Tensor) -> Tensor:
    """The convolution of (B, C, H, W) maps. An operator, so that nobody counts products where there are none."""
    padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    return F.conv2d(maps, kernel, padding=padding, groups=len(kernel))


class _EagerShift(torch.autograd.Function):
    """The shift by planes or as a depthwise convolution; its gradient is the opposite shift."""

    generate_vmap_rule = True  # for a call in a transform with tensors that are none of its own

    @staticmethod
    def forward(x: Tensor, offsets: tuple[int, ...], axis: int) -> Tensor:
        if not x.is_contiguous() and x.permute(0, 3, 1, 2).is_contiguous() and _has_few_runs(offsets):
            return _shift_planes(x, offsets, axis)
        kernel = _one_hot_kernel(offsets, axis, x.dtype)
        return torch.ops.sparse_mlp.pick_neighbours(x.contiguous().permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, ...], int], output: Tensor) -> None:
        _, ctx.offsets, ctx.axis = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return shift_channels(grad, tuple(-offset for offset in ctx.offsets), ctx.axis), None, None


keep_signature(_EagerShift)


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


@register_notrace_function  # the choice of a form is no part of a traced graph
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
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        return (_EagerShift.apply if needs_gradient else _EagerShift.forward)(x, offsets, axis)
    return _plain_shift(x, offsets, axis)
